"""``megatron-dmc convert``: checkpoints between Hugging Face and Megatron, compared and inspected."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dmc.support.units import byte_count


def add_parser(subparsers: Any) -> None:
    """Add ``convert`` and its own commands."""
    parser = subparsers.add_parser("convert", help="convert checkpoints between Hugging Face and Megatron, and verify")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(parser))
    _add_import(commands)
    _add_export(commands)
    _add_import_dmc_release(commands)
    _add_merge_kv_heads(commands)
    _add_verify(commands)
    _add_inspect(commands)


def _add_import(commands: Any) -> None:
    parser = _add_conversion(commands, "import", "Hugging Face model -> Megatron checkpoint", _run_import)
    parser.add_argument(
        "--format",
        choices=("torch_dist", "torch"),
        default="torch_dist",
        help="torch_dist is read under any layout; torch is the legacy layout, cut for one (default: torch_dist)",
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="for --format torch (default: 1)")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="for --format torch (default: 1)")
    parser.add_argument("--num-layers-per-virtual-pipeline-stage", type=int, help="for --format torch")
    parser.add_argument(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine",
        help="whose names the legacy layout uses for the norms (default: transformer_engine)",
    )
    _add_ignored_settings(parser)
    parser.add_argument("--dry-run", action="store_true", help="print tensors, shapes, bytes, memory and disk needed")


def _add_export(commands: Any) -> None:
    parser = _add_conversion(commands, "export", "Megatron checkpoint -> Hugging Face directory", _run_export)
    _add_tokenizer(parser)
    parser.add_argument("--as-llama", action="store_true", help="plain Llama weights: the model without compression")
    parser.add_argument("--measured-cr", type=float, help="measured compression ratio, for the model card")
    parser.add_argument("--vocab-size", type=int, help="ids of the tokenizer, for a checkpoint that does not state it")
    parser.add_argument("--dry-run", action="store_true", help="print tensors, shapes, bytes, memory and disk needed")


def _add_import_dmc_release(commands: Any) -> None:
    about = "NVIDIA's published DMC checkpoint -> DST/megatron and DST/hugging_face"
    parser = _add_conversion(commands, "import-dmc-release", about, _run_import_dmc_release)
    parser.add_argument("--target-cr", type=float, required=True, help="compression ratio in the name (8 for 8x)")
    _add_tokenizer(parser)
    parser.add_argument("--vocab-size", type=int, help="where it is not Llama 2's (default: 32000)")


def _add_merge_kv_heads(commands: Any) -> None:
    about = "average the K and V heads of a model in groups (the GQA up-training baseline)"
    parser = _add_conversion(commands, "merge-kv-heads", about, _run_merge_kv_heads)
    parser.add_argument("--num-kv-heads", type=int, required=True, help="KV heads of the result; divides the model's")
    _add_ignored_settings(parser)


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="compare two checkpoints: tensors bit for bit, and logits")
    parser.add_argument("first", metavar="A", type=Path)
    parser.add_argument("second", metavar="B", type=Path)
    parser.add_argument("--no-logits", action="store_true", help="compare the tensors only")
    _add_max_memory(parser)
    _add_ignored_settings(parser)
    parser.set_defaults(run=_run_verify)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what a checkpoint is, and what is missing or damaged in it")
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument("--no-hashes", action="store_true", help="compare sizes with the manifest, not SHA-256")
    _add_ignored_settings(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run_inspect)


def _add_conversion(commands: Any, name: str, about: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("destination", metavar="DST", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--no-verify", action="store_true", help="leave out the comparison at the end")
    _add_max_memory(parser)
    parser.set_defaults(run=lambda args: _with_large_pages(run, args))
    return parser


def _with_large_pages(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Conversions allocate every tensor anew, which large pages make cheaper; torch reads this when it starts."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return run(args)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory or sentencepiece .model to put beside")


def _add_max_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-memory", type=_byte_count, help="memory that may be taken, for example 8G or 6GiB")


def _add_ignored_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-setting",
        action="append",
        default=[],
        metavar="NAME",
        help="an unknown setting of config.json that does not change what the model computes; may be repeated",
    )


def _byte_count(text: str) -> int:
    try:
        return byte_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _options(args: argparse.Namespace) -> Any:
    from checkpoints_convert.options import Options

    ignored = tuple(getattr(args, "ignore_setting", ()))
    return Options(args.overwrite, not args.no_verify, args.max_memory, ignored)


def _run_import(args: argparse.Namespace) -> int:
    from checkpoints_convert.hf_to_megatron import import_checkpoint, import_plan
    from checkpoints_convert.megatron_writer import MegatronLayout

    layout = MegatronLayout(
        args.format,
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.num_layers_per_virtual_pipeline_stage,
        args.transformer_impl,
    )
    if args.dry_run:
        print("\n".join(import_plan(args.source, args.destination, layout=layout, options=_options(args))))
        return 0
    import_checkpoint(args.source, args.destination, layout=layout, options=_options(args))
    return _done(args)


def _run_export(args: argparse.Namespace) -> int:
    from checkpoints_convert.megatron_to_hf import export_checkpoint, export_plan

    if args.dry_run:
        print("\n".join(export_plan(args.source, args.destination, args.vocab_size)))
        return 0
    export_checkpoint(
        args.source,
        args.destination,
        tokenizer=args.tokenizer,
        as_llama=args.as_llama,
        measured_cr=args.measured_cr,
        vocab_size=args.vocab_size,
        options=_options(args),
    )
    return _done(args)


def _run_import_dmc_release(args: argparse.Namespace) -> int:
    from checkpoints_convert.dmc_branch_to_megatron import import_dmc_release

    import_dmc_release(
        args.source,
        args.destination,
        target_cr=args.target_cr,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        options=_options(args),
    )
    return _done(args)


def _run_merge_kv_heads(args: argparse.Namespace) -> int:
    from checkpoints_convert.merge_kv_heads import merge_kv_heads

    merge_kv_heads(args.source, args.destination, num_kv_heads=args.num_kv_heads, options=_options(args))
    return _done(args)


def _run_verify(args: argparse.Namespace) -> int:
    from checkpoints_convert.verify import verify

    verification = verify(
        args.first,
        args.second,
        logits=not args.no_logits,
        max_memory=args.max_memory,
        ignored_settings=args.ignore_setting,
    )
    print("\n".join(verification.lines()))
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    from checkpoints_convert.inspect import inspect_checkpoint
    from megatron_dmc.support.errors import EXIT_CHECK_FAILED
    from megatron_dmc.support.files import to_json

    inspection = inspect_checkpoint(args.path, hashes=not args.no_hashes, ignored_settings=args.ignore_setting)
    if args.json:
        print(to_json({**inspection.facts, "problems": inspection.problems}, indent=2))
    else:
        print("\n".join(inspection.lines()))
    return EXIT_CHECK_FAILED if inspection.problems else 0


def _done(args: argparse.Namespace) -> int:
    print(f"{args.destination} is complete")
    return 0
