"""Options of the commands that run a model, and how they open it."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.cli.ranks import num_ranks, num_ranks_here
from megatron_dmc.models.config import DTYPES

if TYPE_CHECKING:
    import torch

    from megatron_dmc.checkpoint.source import Source
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.inference.decoder.decoder import Decoder
    from megatron_dmc.inference.decoder.parallel import TensorParallel
    from megatron_dmc.inference.memory_need import DeviceMemory, ModelMemory
    from megatron_dmc.methods import Method
    from megatron_dmc.ops.kv_quantization import KVFormat


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and what says how it is run."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Megatron checkpoint, or Hugging Face directory (exported or plain model)",
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
        "--kv-dtype",
        default="auto",
        metavar="NAME",
        help="store the cache as the model computes (auto, the default), or in 8 bits: fp8 or int8",
    )
    parser.add_argument(
        "--policy", metavar="NAME", help="keep the cache of any model by a policy that needs no training; with --budget"
    )
    parser.add_argument("--budget", type=int, help="entries per head that the policy keeps")
    parser.add_argument("--json", action="store_true", help="print JSON")


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights were not read yet.

    Attributes:
        source: of its weights and settings.
        device: where it will compute.
        dtype: in which type.
        method: how its cache is kept.
        block_size: entries per block of the cache.
        kv_format: of its closed entries.
        parallel: the ranks that hold it together.
    """

    source: Source
    device: torch.device
    dtype: torch.dtype
    method: Method
    block_size: int
    kv_format: KVFormat
    parallel: TensorParallel

    @property
    def memory(self) -> ModelMemory:
        """What this rank's share of it takes."""
        from megatron_dmc.inference.memory_need import ModelMemory

        share = self.parallel.share(self.source.config)
        return ModelMemory(share, self.dtype, self.method, self.block_size, self.kv_format)

    @property
    def device_memory(self) -> DeviceMemory:
        """What there is; ranks without a GPU share the memory of their machine."""
        from megatron_dmc.inference.memory_need import DeviceMemory

        memory = DeviceMemory.of(self.device)
        sharing = num_ranks_here() if self.device.type == "cpu" else 1
        return DeviceMemory(memory.available // sharing, memory.total // sharing)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text that it reads."""
        return self.source.config.max_position_embeddings

    def load(self) -> Decoder:
        """Read the weights. Raises ``ValueError`` where they do not fit the configuration."""
        from megatron_dmc.inference.decoder.decoder import Decoder

        dtype = str(self.dtype).removeprefix("torch.")
        return Decoder(self.source, dtype=dtype, device=self.device, method=self.method, parallel=self.parallel)


def open_model(args: argparse.Namespace, parallel: TensorParallel | None = None) -> OpenedModel:
    """The model that ``args`` name.

    Args:
        parallel: the ranks that hold it together; None: the command runs on one process alone.

    Raises:
        ValueError: no readable model, no such device, a size out of range, or ranks that cannot be used.
    """
    import torch

    from megatron_dmc.checkpoint.source import open_source
    from megatron_dmc.inference.decoder.parallel import ALONE
    from megatron_dmc.methods import method_of, policy
    from megatron_dmc.ops.kv_quantization import find_kv_format

    if parallel is None and num_ranks() > 1:
        raise ValueError("this command runs on one process: start it without torchrun (generate runs on several)")
    parallel = parallel or ALONE
    if (args.policy is None) != (args.budget is None):
        raise ValueError("--policy and --budget belong together: give both, or neither for the model's own method")
    if args.block_size < 1:
        raise ValueError(f"block_size={args.block_size}: must be at least 1 entry (32 by default)")
    method = None if args.policy is None else policy(args.policy, args.budget)
    device = device_of(args.device, parallel)
    source = open_source(args.model)
    parallel.check(source.config)
    return OpenedModel(
        source=source,
        device=device,
        dtype=getattr(torch, args.dtype or source.config.dtype),
        method=method or method_of(source.dmc),
        block_size=args.block_size,
        kv_format=find_kv_format(args.kv_dtype),
        parallel=parallel,
    )


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
    if parallel.size > 1 and device.type == "cuda":
        # Where NCCL takes its memory; every other call names the device.
        torch.cuda.set_device(device)
    return device


def open_tokenizer(args: argparse.Namespace, opened: OpenedModel) -> Tokenizer:
    """The tokenizer that ``args`` name, or that stands beside the model.

    Raises:
        ValueError: there is none, or its ids exceed the model's vocabulary. Tokens that were added without a row in the
            model (``<pad>``) are named on stderr only: a text that holds one is refused later.
    """
    from megatron_dmc.data.tokenizer import load_tokenizer

    companions, vocab_size = opened.source.companions, opened.source.config.vocab_size
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
