"""``megatron-dmc evaluate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.cli.model_options import OpenedModel, add_model_options, open_model, open_tokenizer
from megatron_dmc.support.units import duration

if TYPE_CHECKING:
    import numpy as np

    from megatron_dmc.evaluation.perplexity import Evaluation, PathResult, SoFar

PATHS = ("teacher-forced", "decode", "both")


def add_parser(subparsers: Any) -> None:
    """Add the command ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="perplexity and measured compression of a model on your data",
        description="Reads held-out text twice: whole sequences with hard decisions (teacher-forced), and token by "
        "token through the compressed cache (decode). In float32 the two must agree; exit code 2: they do not. With "
        "--kv-dtype fp8 or int8 the difference is reported: whole sequences have no cache to store in 8 bits.",
    )
    add_model_options(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, metavar="PREFIX", help="indexed data set, without .bin or .idx")
    data.add_argument("--text", type=Path, metavar="FILE", help="text file, tokenized here")
    parser.add_argument("--path", choices=PATHS, default="both", help="what to measure (default: both)")
    parser.add_argument("--sequences", type=int, help="the first so many sequences (default: all)")
    parser.add_argument("--seq-length", type=int, help="tokens per sequence (default: as long as the model reads)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at once (default: 32)")
    parser.add_argument(
        "--prefill-length",
        type=int,
        default=0,
        help="tokens of each sequence that decoding reads in one pass first (default: 0)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and insist that the paths agree."""
    from megatron_dmc.evaluation.perplexity import cut_sequences, evaluate
    from megatron_dmc.evaluation.scores import Storage
    from megatron_dmc.support.files import to_json
    from megatron_dmc.support.progress import progress

    opened = open_model(args)
    seq_length = args.seq_length or opened.max_tokens
    sequences = cut_sequences(_tokens(args, opened), seq_length, args.sequences)
    _require_memory(args, opened, sequences.shape[1] - 1, len(sequences))
    model = opened.load()
    total = sequences.shape[0] * (sequences.shape[1] - 1)
    watch = _Watch(len(sequences), total, args.path)
    with progress(f"evaluating {args.model.name}", total, "tokens", note=watch.note) as advance:
        evaluation = evaluate(
            model,
            sequences,
            path=args.path,
            batch_size=args.batch_size,
            prefill_length=args.prefill_length,
            storage=Storage(opened.block_size, opened.kv_format.name),
            advance=advance,
            after_batch=watch,
        )
    if args.json:
        settings = model.settings.to_dict() if model.settings else None
        print(to_json({"model": str(args.model), "dmc": settings, **evaluation.to_dict()}, indent=2))
    else:
        print("\n".join(_lines(evaluation)))
    if evaluation.agreement is not None:
        evaluation.agreement.require()
    return 0


class _Watch:
    """Says beforehand how much is read, after the first batch about how long it takes, and the perplexity so far."""

    def __init__(self, num_sequences: int, num_tokens: int, path: str) -> None:
        self._num_sequences = num_sequences
        self._so_far: SoFar | None = None
        by = "both paths" if path == PATHS[-1] else f"the path {path}"
        print(f"{num_sequences:,} sequences, {num_tokens:,} tokens, by {by}", file=sys.stderr, flush=True)

    def __call__(self, so_far: SoFar) -> None:
        if self._so_far is None and so_far.num_sequences < self._num_sequences:
            whole = so_far.seconds * self._num_sequences / so_far.num_sequences
            print(f"the first batch says: about {duration(whole)} in all", file=sys.stderr, flush=True)
        self._so_far = so_far

    def note(self) -> str:
        """The perplexity so far; empty before the first batch has ended."""
        return f"perplexity so far {self._so_far.perplexity:.3f}" if self._so_far else ""


def _require_memory(args: argparse.Namespace, opened: OpenedModel, seq_length: int, num_sequences: int) -> None:
    """Refuse what does not fit, before the weights are read."""
    from megatron_dmc.inference.memory_need import Need

    memory, batch = opened.memory, max(1, min(args.batch_size, num_sequences))
    at_once = batch * (args.prefill_length if args.path == "decode" else seq_length)
    cache = 0 if args.path == "teacher-forced" else memory.cache([seq_length] * batch)
    need = Need(memory.weights, cache, memory.workspace(max(at_once, batch), batch))
    remedy = "lower --batch-size or --seq-length, or take --dtype bfloat16"
    print(need.require(opened.device_memory, remedy), file=sys.stderr)


def _tokens(args: argparse.Namespace, opened: OpenedModel) -> np.ndarray:
    """The stream of tokens to read."""
    import numpy as np

    from megatron_dmc.data.indexed import IndexedTokens
    from megatron_dmc.data.manifest import read_manifest

    if args.data is not None:
        tokens = IndexedTokens(args.data).tokens
        manifest = read_manifest(args.data)
        if manifest is not None and args.tokenizer is not None:
            tokenizer = open_tokenizer(args, opened)
            if tokenizer.sha256 != manifest["tokenizer_sha256"]:
                raise ValueError(
                    f"{args.data} was made with another tokenizer than {tokenizer.path}: give that one; where a "
                    "directory holds two, name its file"
                )
        return tokens
    if not args.text.is_file():
        raise ValueError(f"{args.text} is missing: give a text file, or a data set with --data")
    try:
        text = args.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text} is not UTF-8 text: {error}") from error
    return np.array(open_tokenizer(args, opened).encode(text), dtype=np.int64)


def _lines(evaluation: Evaluation) -> list[str]:
    """The result as people read it."""
    lines = [f"{evaluation.num_sequences} sequences of {evaluation.seq_length} tokens, {evaluation.dtype}"]
    for name, result in (("teacher-forced", evaluation.teacher_forced), ("decode", evaluation.decode)):
        if result is not None:
            loss = f"loss {result.loss:.5f} +- {result.standard_error:.5f}"
            figures = f"perplexity {result.perplexity:.4f} ({loss}), compression ratio {result.compression_ratio:.3f}"
            lines.append(f"{name + ':':<15} {figures}, {result.seconds:.1f} s")
    shown = evaluation.decode or evaluation.teacher_forced
    assert shown is not None
    lines += _cache_lines(shown)
    if evaluation.agreement is not None:
        agreed = evaluation.agreement.to_dict()
        lines.append(
            f"agreement: {agreed['share_of_equal_decisions']:.6%} of decisions equal, largest log-probability "
            f"difference {agreed['largest_log_prob_difference']:.2e} over {agreed['num_tokens_compared']} of "
            f"{agreed['num_tokens']} tokens{'' if agreed['asserted'] else ' (reported only: not float32 throughout)'}"
        )
    return lines


def _cache_lines(result: PathResult) -> list[str]:
    """Size of the cache, and the ratio by layer and KV head."""
    lines = [] if result.cache is None else [result.cache.summary()]
    if result.compression_ratio > 1:
        lines.append("compression ratio by layer (rows) and KV head (columns):")
        for layer, ratios in enumerate(result.compression_ratio_per_layer_and_kv_head):
            lines.append(f"  {layer:>3}  " + " ".join(f"{ratio:7.2f}" for ratio in ratios))
    return lines
