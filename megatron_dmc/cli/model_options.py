"""Options of the commands that run a model, and how they open it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.cli.ranks import num_ranks
from megatron_dmc.models.config import DTYPES

if TYPE_CHECKING:
    import torch

    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.inference.decoder.decoder import Decoder
    from megatron_dmc.inference.decoder.parallel import TensorParallel


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and what says how it is run."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Megatron checkpoint, or Hugging Face directory (exported or plain Llama)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, .model file or Hugging Face directory (default: the model's own)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute in this type (default: the stored one)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--block-size", type=int, default=32, help="entries per block of the cache (default: 32)")
    parser.add_argument(
        "--policy", metavar="NAME", help="keep the cache of any model by a policy that needs no training; with --budget"
    )
    parser.add_argument("--budget", type=int, help="entries per head that the policy keeps")
    parser.add_argument("--json", action="store_true", help="print JSON")


def open_model(args: argparse.Namespace, parallel: TensorParallel | None = None) -> tuple[Decoder, Path]:
    """The model that ``args`` name, and the directory where its own tokenizer would be.

    Args:
        parallel: the ranks that hold it together; None: this process alone.

    Raises:
        ValueError: no readable model, no such device, or ranks that a command cannot use.
    """
    from megatron_dmc.checkpoint.source import open_source
    from megatron_dmc.inference.decoder.decoder import Decoder
    from megatron_dmc.inference.decoder.parallel import ALONE
    from megatron_dmc.methods import policy

    if parallel is None and num_ranks() > 1:
        raise ValueError("this command runs on one process: start it without torchrun (generate runs on several)")

    if (args.policy is None) != (args.budget is None):
        raise ValueError("--policy and --budget belong together: give both, or neither for the model's own method")
    method = None if args.policy is None else policy(args.policy, args.budget)
    device = device_of(args.device, parallel or ALONE)
    source = open_source(args.model)
    model = Decoder(source, dtype=args.dtype, device=device, method=method, parallel=parallel or ALONE)
    return model, source.companions


def device_of(asked: str | None, parallel: TensorParallel) -> torch.device:
    """The device that the user asks for; of several ranks each takes the GPU of its number.

    Raises:
        ValueError: there is no such device, or it would be that of several ranks.
    """
    import torch

    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if parallel.size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device {name}: every rank needs a GPU of its own; give --device cuda")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; cpu always works") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def open_tokenizer(args: argparse.Namespace, companions: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that ``args`` name, or that stands beside the model.

    Raises:
        ValueError: there is none, or its ids exceed the model's vocabulary. Tokens that were added without a row in the
            model (``<pad>``) are named on stderr only: a text that holds one is refused later.
    """
    from megatron_dmc.data.tokenizer import load_tokenizer

    if args.tokenizer is None and not companions.is_dir():
        raise ValueError(f"{args.model} has no tokenizer beside it: give one with --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer or companions)
    if tokenizer.base_vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.base_vocab_size} ids, the model's vocabulary {vocab_size}: give the "
            "tokenizer that the model was trained with"
        )
    if tokenizer.vocab_size > vocab_size:
        beyond = ", ".join(filter(None, map(tokenizer.token, range(vocab_size, tokenizer.vocab_size))))
        print(f"the model has no row for the added tokens {beyond} of {tokenizer.path}", file=sys.stderr)
    return tokenizer
