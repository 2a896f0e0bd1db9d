"""``megatron-dmc convert``: checkpoints between Hugging Face and Megatron, compared and inspected."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add ``convert`` and its own commands."""
    parser = subparsers.add_parser("convert", help="convert checkpoints between Hugging Face and Megatron, and verify")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(parser))
    _add_import(commands)
    _add_export(commands)


def _add_import(commands: Any) -> None:
    parser = commands.add_parser("import", help="Hugging Face Llama -> Megatron checkpoint")
    _add_paths(parser)
    parser.set_defaults(run=_run_import)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face directory")
    _add_paths(parser)
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory or sentencepiece .model to put beside")
    parser.add_argument("--as-llama", action="store_true", help="plain Llama weights: the model without compression")
    parser.add_argument("--vocab-size", type=int, help="ids of the tokenizer, for a checkpoint that does not state it")
    parser.set_defaults(run=_run_export)


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("destination", metavar="DST", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def _run_import(args: argparse.Namespace) -> int:
    from checkpoints_convert.hf_to_megatron import import_checkpoint

    import_checkpoint(args.source, args.destination, overwrite=args.overwrite)
    return 0


def _run_export(args: argparse.Namespace) -> int:
    from checkpoints_convert.megatron_to_hf import export_checkpoint

    export_checkpoint(
        args.source,
        args.destination,
        tokenizer=args.tokenizer,
        as_llama=args.as_llama,
        vocab_size=args.vocab_size,
        overwrite=args.overwrite,
    )
    return 0
