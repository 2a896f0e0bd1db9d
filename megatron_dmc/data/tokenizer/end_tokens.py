"""Which tokens end a generated text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.checkpoint.companions import token_ids
from megatron_dmc.data.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class EndTokens:
    """Ids that end a text, and who states them."""

    ids: frozenset[int]
    stated_by: str


def end_tokens(model: Path, tokenizer: Tokenizer) -> EndTokens:
    """The end tokens of a model: those that its configuration states, and always the tokenizer's end of document.

    Args:
        model: the folder of its ``generation_config.json``, which counts, or else ``config.json``. Where neither
            states an end, those beside the tokenizer count.
        tokenizer: its end of document is what training data of this package teaches.

    Raises:
        ValueError: a file that is no JSON object, or states something else than ids.
    """
    for folder in (model, tokenizer.path.parent):
        stated = token_ids(folder).get("eos_token_id")
        if stated is not None:
            ids = stated if isinstance(stated, list) else [stated]
            return EndTokens(frozenset([*ids, tokenizer.eod]), f"the model's configuration in {folder}")
    return EndTokens(frozenset([tokenizer.eod]), str(tokenizer.path))
