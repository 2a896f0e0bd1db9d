"""``megatron-dmc evaluate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.cli.evaluate_output import lines_of, table_of
from megatron_dmc.cli.model_options import OpenedModel, add_model_options, open_model, open_tokenizer
from megatron_dmc.cli.reference_options import OpenedReference, add_reference_options, open_reference
from megatron_dmc.support.units import duration

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from megatron_dmc.evaluation.greedy_match import GreedyMatch
    from megatron_dmc.evaluation.perplexity import Evaluation, SoFar
    from megatron_dmc.evaluation.scores import Storage
    from megatron_dmc.inference.decoder.decoder import Decoder

PATHS = ("teacher-forced", "decode", "both")


def add_parser(subparsers: Any) -> None:
    """Add the command ``evaluate``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="perplexity and measured compression of a model on your data",
        description="Reads held-out text twice: whole sequences with hard decisions (teacher-forced), and token by "
        "token through the compressed cache (decode). In float32 the two must agree; exit code 2: they do not. With "
        "--kv-dtype fp8 or int8 the difference is reported: whole sequences have no cache to store in 8 bits. With "
        "--reference each path is also compared with another model, or with the same one without compression.",
    )
    add_model_options(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, metavar="PREFIX", help="indexed data set, without .bin or .idx")
    data.add_argument("--text", type=Path, metavar="FILE", help="text file, tokenized here")
    parser.add_argument("--path", choices=PATHS, default="both", help="what to measure (default: both)")
    parser.add_argument("--sequences", type=int, help="the first so many sequences of each length (default: all)")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--seq-length", type=int, help="tokens per sequence (default: as long as the model reads)")
    lengths.add_argument(
        "--lengths", type=numbers, metavar="N,N,...", help="measure at several lengths, one after the other"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at once (default: 32)")
    parser.add_argument(
        "--prefill-length",
        type=int,
        default=0,
        help="tokens of each sequence that decoding reads in one pass first (default: 0)",
    )
    add_reference_options(parser)
    add_origin_options(parser)
    parser.set_defaults(run=run)


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them, as an option."""
    return [int(word) for word in text.split(",")]


def add_origin_options(parser: argparse.ArgumentParser) -> None:
    """Add what a result says about itself, for ``report``."""
    origin = parser.add_argument_group("what the result says about the model")
    origin.add_argument("--name", help="method as reports name its line (default: how the cache is kept)")
    origin.add_argument("--tokens-trained", type=int, metavar="N", help="tokens that it was trained on; 0: none")


def origin(args: argparse.Namespace, opened: OpenedModel) -> dict[str, Any]:
    """What a result says about the model. Raises ``ValueError`` on a number of tokens that there is not."""
    if args.tokens_trained is not None and args.tokens_trained < 0:
        raise ValueError(f"--tokens-trained {args.tokens_trained}: must be at least 0 (0 = not trained)")
    dmc = opened.source.dmc
    return {
        "model": str(args.model),
        "name": args.name or opened.method.name,
        "method": opened.method.name,
        "budget": args.budget,
        "kv_dtype": opened.kv_format.name,
        "tokens_trained": args.tokens_trained,
        "dmc": dmc.to_dict() if dmc else None,
    }


def run(args: argparse.Namespace) -> int:
    """Measure, print, and insist that the paths agree."""
    from megatron_dmc.evaluation.perplexity import cut_sequences
    from megatron_dmc.support.files import to_json

    opened = open_model(args)
    said = {**origin(args, opened), "reference": args.reference}
    reference = open_reference(args, opened)
    tokens = _tokens(args, opened)
    lengths = args.lengths or [args.seq_length or opened.max_tokens]
    texts = [cut_sequences(tokens, length, args.sequences) for length in lengths]
    for text in texts:
        _require_memory(args, opened, reference, text.shape[1] - 1, len(text))
    results = _measure(args, opened, reference, texts)
    if args.json:
        figures = [
            {**evaluation.to_dict(), "greedy_match": match.to_dict() if match else None}
            for evaluation, match in results
        ]
        print(to_json(said | ({"evaluations": figures} if args.lengths else figures[0]), indent=2))
    else:
        for evaluation, match in results:
            print("\n".join(lines_of(evaluation, match)))
        if len(results) > 1:
            print("\n".join(table_of([evaluation for evaluation, _ in results])))
    for evaluation, _ in results:
        if evaluation.agreement is not None:
            evaluation.agreement.require()
    return 0


def _measure(
    args: argparse.Namespace, opened: OpenedModel, reference: OpenedReference | None, texts: list[Tensor]
) -> list[tuple[Evaluation, GreedyMatch | None]]:
    """One result for the sequences of each length; what cannot be measured is refused before the first."""
    from megatron_dmc.evaluation.perplexity import check

    model = opened.load()
    other = None if reference is None else reference.load(model)
    storage = _storage(opened)
    for text in texts:
        check(model, text, args.path, args.batch_size, args.prefill_length, storage=storage, reference=other)
    return [(_evaluate(args, opened, model, other, text), _match(args, opened, model, other, text)) for text in texts]


def _evaluate(
    args: argparse.Namespace, opened: OpenedModel, model: Decoder, reference: Decoder | None, sequences: Tensor
) -> Evaluation:
    from megatron_dmc.evaluation.perplexity import Watch, evaluate
    from megatron_dmc.support.progress import progress

    total = sequences.shape[0] * (sequences.shape[1] - 1)
    watch = _Watch(len(sequences), total, args.path)
    with progress(f"evaluating {args.model.name}", total, "tokens", note=watch.note) as advance:
        return evaluate(
            model,
            sequences,
            path=args.path,
            batch_size=args.batch_size,
            prefill_length=args.prefill_length,
            storage=_storage(opened),
            reference=reference,
            watch=Watch(advance, watch),
        )


def _match(
    args: argparse.Namespace, opened: OpenedModel, model: Decoder, reference: Decoder | None, sequences: Tensor
) -> GreedyMatch | None:
    """Greedy texts of both, behind the beginnings of the sequences."""
    from megatron_dmc.evaluation.greedy_match import greedy_match
    from megatron_dmc.support.progress import progress

    seq_length = sequences.shape[1] - 1
    num_new = min(args.match_tokens, seq_length // 2)
    if reference is None or not num_new:
        return None
    prompts = sequences[: args.match_prompts, : seq_length - num_new].tolist()
    with progress("greedy texts of both", 2 * num_new * len(prompts), "tokens") as advance:
        return greedy_match(
            model,
            reference,
            prompts,
            num_new,
            storage=_storage(opened),
            batch_size=args.batch_size,
            advance=advance,
        )


def _storage(opened: OpenedModel) -> Storage:
    from megatron_dmc.evaluation.scores import Storage

    return Storage(opened.block_size, opened.kv_format.name)


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


def _require_memory(
    args: argparse.Namespace,
    opened: OpenedModel,
    reference: OpenedReference | None,
    seq_length: int,
    num_sequences: int,
) -> None:
    """Refuse what does not fit, before the weights are read."""
    from megatron_dmc.inference.memory_need import Need

    memory, batch = opened.memory, max(1, min(args.batch_size, num_sequences))
    at_once = batch * (args.prefill_length if args.path == "decode" else seq_length)
    cache = 0 if args.path == "teacher-forced" else memory.cache([seq_length] * batch)
    weights = memory.weights + (reference.weights if reference else 0)
    need = Need(weights, cache, memory.workspace(max(at_once, batch), batch))
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
