"""``megatron-dmc data prepare`` and ``data check``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dmc.data.corpus import BadLines, Corpus
    from megatron_dmc.data.prepare import Split

SMALL_VOCABULARY = 1024
PREPARE = """Tokenizes documents into one indexed data set per split. Read are: JSON lines (.jsonl, .ndjson, .json, or
any other file whose first line is an object with the text), a document per line; Parquet, a document per row; other
files as UTF-8 text, a document per file; each also compressed (.gz, .zst). Of a folder: .jsonl, .ndjson, .json,
.parquet and .txt files, sorted by path. Parquet and .zst need the extra megatron_dmc[data]. Which split a document
falls into depends on its content alone."""


def add_parser(subparsers: Any) -> None:
    """Add the command ``data`` with its two parts."""
    parser = subparsers.add_parser("data", help="text to Megatron's indexed data sets, and their checks")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_check(commands)


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="text, JSONL or Parquet and a tokenizer -> train, validation and test (.bin, .idx, .json)",
        description=PREPARE,
    )
    parser.add_argument("inputs", nargs="*", metavar="PATH", help="files and folders, read in the order given")
    parser.add_argument("--python-source", action="store_true", help="take the source of Python's standard library")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="tokenizer.json, .model file or Hugging Face directory")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        nargs="?",
        const=SMALL_VOCABULARY,
        metavar="VOCABULARY",
        help=f"train a sentencepiece tokenizer on the input (default size {SMALL_VOCABULARY})",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory")
    parser.add_argument("--json-key", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--skip-bad-lines", action="store_true", help="count lines and rows without text, and go on")
    parser.add_argument(
        "--split", default="90,5,5", help="shares of the documents for train,validation,test (default: 90,5,5)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize (default: 1)")
    parser.set_defaults(run=run_prepare)


def _add_check(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="verify data sets and Megatron's index cache",
        description="Compares each data set with its index, its manifest and the vocabulary. Exit code 2: a check "
        "failed.",
    )
    parser.add_argument("prefixes", nargs="+", type=Path, metavar="PREFIX", help="data set, without .bin or .idx")
    parser.add_argument("--tokenizer", type=Path, help="must be the one that the data sets were prepared with")
    parser.add_argument("--data-cache-path", type=Path, help="Megatron's index cache, checked too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_check)


def run_prepare(args: argparse.Namespace) -> int:
    """Tokenize and write; prints one line per split."""
    from megatron_dmc.data.corpus import BadLines, python_source, user_corpus
    from megatron_dmc.data.prepare import prepare_directory

    if args.python_source and args.inputs:
        raise ValueError("--python-source and input files: give one of the two")
    corpus = python_source() if args.python_source else user_corpus(args.inputs, args.json_key)
    bad = BadLines() if args.skip_bad_lines else None
    manifests = prepare_directory(
        corpus,
        args.output,
        tokenizer=args.train_tokenizer if args.tokenizer is None else args.tokenizer,
        split=_split(args.split),
        workers=args.workers,
        overwrite=args.overwrite,
        bad=bad,
    )
    print("\n".join(_input_lines(corpus, args.tokenizer, bad)))
    for name, manifest in manifests.items():
        print(f"{args.output / name}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens")
    return 0


def _input_lines(corpus: Corpus, tokenizer: Path | None, bad: BadLines | None) -> list[str]:
    """What was taken, and what was left out."""
    from megatron_dmc.data.tokenizer import load_tokenizer

    lines = [f"files read: {len(corpus.files):,}"]
    if corpus.left_out:
        lines.append(f"files left out: {len(corpus.left_out):,} of another kind, first {corpus.left_out[0]}")
    if bad is not None:
        lines.append(f"bad lines left out: {bad.count:,}" + (f"; the first: {bad.first}" if bad.first else ""))
    if tokenizer is not None:
        lines.append(f"tokenizer: {load_tokenizer(tokenizer).path}")
    return lines


def run_check(args: argparse.Namespace) -> int:
    """Check and print the findings."""
    from megatron_dmc.data.check import check_cache, check_data_set, check_tokenizers_agree
    from megatron_dmc.support.findings import show

    findings = [finding for prefix in args.prefixes for finding in check_data_set(prefix, args.tokenizer)]
    if args.tokenizer is not None:
        findings += check_tokenizers_agree(args.tokenizer)
    if args.data_cache_path is not None:
        findings += check_cache(args.data_cache_path)
    return show(findings, as_json=args.json)


def _split(text: str) -> Split:
    from megatron_dmc.data.prepare import Split

    try:
        shares = [float(share) for share in text.split(",")]
        train, validation, test = shares
    except ValueError:
        raise ValueError(f"--split {text}: give three numbers, for example 90,5,5") from None
    return Split(train, validation, test)
