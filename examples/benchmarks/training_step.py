"""A whole training step of a stack of Llama layers in Megatron, with and without DMC.

Both sides are the same Megatron model with the same weights: embedding, layers, loss, backward, optimizer. Without DMC
its attention is stock causal flash attention with RoPE (stage ``zero_out`` before the channel fades: nothing else runs
there); with DMC it is stage ``retrofit``.

    python -m examples.benchmarks.training_step [--layers 2] [--sequence-length 4096]

prints one JSON object; ``examples.benchmarks.training`` runs it in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from megatron_dmc.config import DMCConfig
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.rope import inverse_frequencies
from megatron_dmc.training.pretrain import prepare

STEPS = 5
HEAD_DIM = 64


def main() -> None:
    """Measure and print the median seconds of each side and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=4096)
    given = parser.parse_args()
    shape = _shape_flags(given.layers, given.hidden_size, given.sequence_length)
    args = _initialize(shape)
    steps = {stage: _Step(args, stage) for stage in ("zero_out", "retrofit")}
    seconds: dict[str, list[float]] = {stage: [] for stage in steps}
    for _ in range(STEPS + 1):
        for stage, step in steps.items():
            seconds[stage].append(step.timed())
    medians = {stage: statistics.median(values[1:]) for stage, values in seconds.items()}
    ratios = [with_dmc / without for with_dmc, without in zip(seconds["retrofit"], seconds["zero_out"], strict=True)]
    print(json.dumps({"seconds": medians, "ratio": statistics.median(ratios[1:]), **vars(given)}))


def _shape_flags(layers: int, hidden_size: int, sequence_length: int) -> list[str]:
    heads = hidden_size // HEAD_DIM
    flags: dict[str, Any] = {
        "--num-layers": layers,
        "--hidden-size": hidden_size,
        "--ffn-hidden-size": hidden_size * 11 // 4,
        "--num-attention-heads": heads,
        "--num-query-groups": heads // 2,
        "--kv-channels": HEAD_DIM,
        "--seq-length": sequence_length,
        "--max-position-embeddings": sequence_length,
        "--micro-batch-size": 1,
        "--train-iters": 1,
        "--lr": 1e-4,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": 1024,
        "--eval-iters": 0,
    }
    switches = ["--group-query-attention", "--untie-embeddings-and-output-weights", "--mock-data"]
    return [str(part) for pair in flags.items() for part in pair] + switches


def _initialize(flags: list[str]) -> Any:
    run = prepare(["--dmc-stage", "off", *flags])
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    from megatron_dmc.seam import host
    from megatron_dmc.training.arguments import add_dmc_arguments

    sys.argv = [sys.argv[0], *run.argv]
    args = parse_and_validate_args(extra_args_provider=add_dmc_arguments)
    initialize_megatron(allow_no_cuda=host.needs_cpu())
    return args


class _Step:
    """A model in one stage and its optimizer."""

    def __init__(self, args: Any, stage: str) -> None:
        import torch
        from megatron.core.process_groups_config import ProcessGroupCollection

        from megatron_dmc.training.model_config import dmc_model_config
        from megatron_dmc.training.start import Start

        args.dmc_stage = stage
        config = dmc_model_config(args, start=Start(config=None, resumes=True))
        torch.manual_seed(1)
        self.model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(
            0, args.vocab_size, (1, args.seq_length), device=next(self.model.parameters()).device
        )
        self.settings: DMCConfig = config.transformer.dmc
        frequencies = inverse_frequencies(HEAD_DIM, args.rotary_base)
        self.geometry = Geometry(args.seq_length, 1, frequencies.to(self.tokens.device))

    def timed(self) -> float:
        """Seconds of one forward and backward pass with the optimizer's step."""
        import torch

        from megatron_dmc.training.model.microbatch import Microbatch

        microbatch = Microbatch(
            self.geometry,
            sequence_B=torch.zeros(1, dtype=torch.int64) if self.settings.compresses else None,
            target_fraction=0.75,
        )
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(self.tokens, None, None, labels=self.tokens, microbatch=microbatch).mean()
        loss.backward()
        self.optimizer.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
