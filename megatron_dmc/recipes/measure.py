"""Perplexity and cache of base, control and DMC on the same held-out text, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dmc.data.indexed import IndexedTokens
from megatron_dmc.support.progress import progress


def measure(model_path: Path, data: Path, seq_length: int, num_sequences: int, *, decode: bool) -> dict[str, Any]:
    """Evaluate one model.

    Args:
        model_path: checkpoint or exported model.
        data: prefix of the held-out data set.
        seq_length: tokens read per sequence.
        num_sequences: the first so many sequences at most.
        decode: read every sequence a second time, token by token through the cache, and compare.

    Returns:
        the figures, ready for JSON.
    """
    from megatron_dmc.checkpoint.source import open_source
    from megatron_dmc.evaluation.perplexity import BOTH, TEACHER_FORCED, Watch, cut_sequences, evaluate
    from megatron_dmc.inference.decoder.decoder import Decoder

    sequences = cut_sequences(IndexedTokens(data).tokens, seq_length, num_sequences)
    model = Decoder(open_source(model_path), dtype="float32")
    with progress(f"measuring {model_path.name}", len(sequences) * seq_length, "tokens") as advance:
        result = evaluate(model, sequences, path=BOTH if decode else TEACHER_FORCED, watch=Watch(advance))
    return result.to_dict()
