"""Compare our operations with numbers that the authors' code computed: ``python -m tests.golden_check DIR``.

Every tensor of every file is computed through the plain references and through the fast operations; ``README.md``
beside the files describes the format. Exit code 0: all within tolerance; 1: bad usage; 2: a tensor falls short or
is unknown, a file cannot be read, or nothing was checked.

Shapes: S sequence, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dmc.config import BF16_IMPORTANCE_EPSILON, DMCConfig
from megatron_dmc.methods import dmc, dms
from megatron_dmc.ops import decisions, kv_pooling, masked_attention
from megatron_dmc.ops.borrowed import ADAPTER_SCALE
from megatron_dmc.ops.cache_update.reference import decode
from megatron_dmc.ops.compressed_attention import Weights
from megatron_dmc.ops.compressed_attention.reference import compressed_attention as plain_attention
from megatron_dmc.ops.compressed_attention.reference import rotated
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.kv_pooling import reference as plain_pooling
from megatron_dmc.ops.masked_attention import reference as plain_masked_attention
from megatron_dmc.ops.rope import inverse_frequencies, rotate
from megatron_dmc.support.errors import EXIT_CHECK_FAILED, EXIT_DONE, EXIT_USER_ERROR
from tests.inference.paged_decode import paged_decode
from tests.tolerances import GOLDEN_GRADIENT, GOLDEN_OUTPUT, gradient_error, output_error

FLOAT32_IMPORTANCE_EPSILON = 1.1920929e-07
"""Epsilon of the full-sequence files: that of the query's dtype. The decode files use bfloat16's."""

INPUTS = {"query", "key", "value", "logistic_noise", "decision_logits", "grad_output"}
EXACT = {"cache_length"}
BORROWED_CHANNEL = {"rotated_pooled_key"}
"""Tensors whose last channel is not compared: the authors keep the bias there."""

Tensors = Mapping[str, Tensor]
Paths = dict[str, dict[str, Tensor]]
"""What each path (reference, fast) computes, by the file's tensor names."""


def full_sequence(tensors: Tensors, settings: Mapping[str, str]) -> Paths:
    """``train_*`` with stored noise, ``eval_*`` with hard decisions."""
    config = _config(settings, FLOAT32_IMPORTANCE_EPSILON)
    noise_SBG = tensors["logistic_noise"] if settings["training"] == "1" else None
    paths: Paths = {}
    for path in ("reference", "fast"):
        inputs = _differentiable(tensors, ("query", "key", "value"))
        q, k, v = inputs.values()
        geometry = _geometry(settings, q.shape[1])
        decided = dmc.decide(*dmc.read_logits(q, k, config), geometry.first_SB, config, noise_SBG)
        weights = Weights(decided.alpha, decided.omega, decided.key_bias)
        if path == "reference":
            pooled = plain_pooling.pool_kv(k, v, weights.alpha, weights.omega, config.window_size)
            key = rotated(pooled[0], *geometry.cos_sin_S)
            output = plain_attention(q, k, v, weights, geometry, window_size=config.window_size)
        else:
            pooled = kv_pooling.pool_kv(k, v, weights.alpha, weights.omega, config.window_size)
            key = rotate(pooled[0].detach(), geometry.rotations(0.0, torch.float32)[1], torch.float32)
            noise = None if noise_SBG is None else lambda heads: noise_SBG
            output, decided = dmc.DMC(config).whole(q, k, v, geometry, noise=noise)
        output = output.permute(1, 2, 0, 3)
        paths[path] = {
            "pooled_value": pooled[1],
            "rotated_pooled_key": key,
            "output": output,
            "decision_mean_per_sequence": decided.fraction().mean(-1),
            **_gradients(output, inputs, tensors["grad_output"]),
        }
    return paths


def decode_steps(tensors: Tensors, settings: Mapping[str, str]) -> Paths:
    """``decode_*``: the recurrence of the cache; the full sequence with hard decisions, and the paged cache."""
    config = _config(settings, BF16_IMPORTANCE_EPSILON)
    q, k, v = (tensors[name] for name in ("query", "key", "value"))
    geometry = _geometry(settings, q.shape[1])
    logits = dmc.read_logits(q, k, config)
    accumulate = decisions.hard_decisions(logits[0], config.decision_threshold)
    omega = decisions.importance(logits[1], config.importance_epsilon)
    angles = geometry.cos_sin_S
    output, lengths = decode(q, k, v, accumulate, omega, cos_sin_S=angles, window_size=config.window_size)
    whole, decided = dmc.DMC(config).whole(q, k, v, geometry)
    paged, paged_lengths = paged_decode(q, k, v, dmc.DMC(config), float(settings["rope_base"]))
    return {
        "reference": {"output": output, "cache_length": lengths},
        "fast": {"output": whole, "cache_length": (~decided.hard).cumsum(0)},
        "paged": {"output": paged, "cache_length": paged_lengths},
    }


def evicting_attention(tensors: Tensors, settings: Mapping[str, str]) -> Paths:
    """``dms_*``: attention whose far keys are biased, soft with gradients and hard, and DMS as a whole."""
    paths: Paths = {}
    attend_by = {"reference": plain_masked_attention.masked_attention, "fast": masked_attention.masked_attention}
    for path, attend in attend_by.items():
        inputs = _differentiable(tensors, ("query", "key", "value", "decision_logits"))
        q, k, v = (inputs[name].permute(2, 0, 1, 3) for name in ("query", "key", "value"))
        logits = inputs["decision_logits"].permute(2, 0, 1)
        outputs = []
        for own_bias in (F.logsigmoid(-logits), masked_attention.HIDDEN * (logits > 0)):
            # Token j + 1 decides about token j.
            bias = F.pad(own_bias[1:], (0, 0, 0, 0, 0, 1))
            geometry = Geometry(len(k), k.shape[1])
            outputs.append(attend(q, k, v, bias, geometry, free_window=int(settings["window"])).permute(1, 2, 0, 3))
        soft, hard = outputs
        found = _gradients(soft, inputs, tensors["grad_output"])
        paths[path] = {"soft_output": soft, "hard_output": hard, **found}
    return paths | {"method": _whole_dms(tensors, int(settings["window"]))}


def _whole_dms(tensors: Tensors, window: int) -> dict[str, Tensor]:
    """The same by the method, without RoPE (all angles are 0); the adapter's output is what gives the logits."""
    config = DMCConfig(
        "dms", window_size=window, decision_source="adapter", decided_by="next", temperature=1.0, decision_bias=0.0
    )
    inputs = _differentiable(tensors, ("query", "key", "value", "decision_logits"))
    q, k, v = (inputs[name].permute(2, 0, 1, 3) for name in ("query", "key", "value"))
    logits = inputs["decision_logits"].permute(2, 0, 1)
    geometry = Geometry(len(k), k.shape[1], torch.zeros(k.shape[-1] // 2))
    adapter, no_noise = logits / ADAPTER_SCALE, torch.zeros_like(logits)
    soft, hard = (
        dms.DMS(config).whole(q, k, v, geometry, adapter_SBG=adapter, noise=noise).output.permute(1, 2, 0, 3)
        for noise in (lambda heads: no_noise, None)
    )
    return {"soft_output": soft, "hard_output": hard, **_gradients(soft, inputs, tensors["grad_output"])}


FAMILIES: dict[str, Callable[[Tensors, Mapping[str, str]], Paths]] = {
    "train": full_sequence,
    "eval": full_sequence,
    "decode": decode_steps,
    "dms": evicting_attention,
}


def _config(settings: Mapping[str, str], epsilon: float) -> DMCConfig:
    return DMCConfig(
        window_size=int(settings["window"]),
        temperature=float(settings.get("temperature", DMCConfig.temperature)),
        decision_bias=float(settings["init_val"]),
        importance_epsilon=epsilon,
    )


def _geometry(settings: Mapping[str, str], batch: int) -> Geometry:
    frequencies = inverse_frequencies(int(settings["D"]), float(settings["rope_base"]))
    return Geometry(int(settings["S"]), batch, frequencies)


def _differentiable(tensors: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensors[name].clone().requires_grad_() for name in names}


def _gradients(output: Tensor, inputs: Tensors, grad_output: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(output, list(inputs.values()), grad_output)
    return {f"grad_{name}": gradient for name, gradient in zip(inputs, found, strict=True)}


@dataclass(frozen=True)
class Result:
    """One tensor of a file by one path: its error, the tolerance, or what is wrong instead."""

    tensor: str
    path: str
    error: float = float("inf")
    tolerance: float = 0.0
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the tensor was compared and is within tolerance."""
        return not self.problem and self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        detail = self.problem or f"error {self.error:.2e}, allowed {self.tolerance:.0e}"
        return f"{self.tensor:28} {self.path:10} {verdict:7} {detail}"


def check_file(path: Path) -> list[Result]:
    """Compare every tensor of one file."""
    try:
        with safe_open(path, "pt") as stream:
            settings = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
        computed = FAMILIES[family_of(path)](tensors, settings)
    except (SafetensorError, OSError) as error:
        return [Result("-", "-", problem=f"cannot be read: {error}")]
    except KeyError as error:
        return [Result("-", "-", problem=f"tensor or metadata {error} is missing")]
    except (RuntimeError, ValueError) as error:
        return [Result("-", "-", problem=f"tensors do not fit together: {error}")]
    return [
        _compare(name, by, found.get(name), expected)
        for name, expected in sorted(tensors.items())
        if name not in INPUTS
        for by, found in computed.items()
    ] or [Result("-", "-", problem="holds nothing to compare")]


def _compare(name: str, path: str, found: Tensor | None, expected: Tensor) -> Result:
    if found is None:
        return Result(name, path, problem="unknown tensor: nothing computes it")
    if found.shape != expected.shape:
        return Result(name, path, problem=f"shape {tuple(expected.shape)}, computed {tuple(found.shape)}")
    if name in BORROWED_CHANNEL:
        found, expected = found[..., :-1], expected[..., :-1]
    if name.startswith("grad_"):
        return Result(name, path, gradient_error(found, expected), GOLDEN_GRADIENT)
    return Result(name, path, output_error(found, expected), 0.0 if name in EXACT else GOLDEN_OUTPUT)


def family_of(path: Path) -> str:
    """``train`` for ``train_gqa_w12.safetensors``."""
    return path.name.split("_")[0].removesuffix(".safetensors")


def check_directory(directory: Path, families: Sequence[str]) -> bool:
    """Check the files of ``families``, print every result; True if all passed and something was checked."""
    passed, compared = True, 0
    for path in sorted(directory.glob("*.safetensors")):
        if family_of(path) not in FAMILIES:
            print(f"{path.name}\n  FAILED: unknown family; known are {', '.join(FAMILIES)}")
            passed = False
        elif family_of(path) in families:
            print(path.name)
            for result in check_file(path):
                print(f"  {result}")
                passed &= result.passed
                compared += 1
    if not compared:
        print(f"FAILED: nothing to check in {directory} for {', '.join(families)}")
    return passed and compared > 0


def _families(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(FAMILIES)}")
    return names


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check and return its exit code."""
    parser = _Parser(prog="python -m tests.golden_check", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder with the .safetensors files")
    parser.add_argument(
        "--only", type=_families, default=list(FAMILIES), metavar="FAMILIES",
        help=f"comma-separated choice of {', '.join(FAMILIES)} (default: all)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if not arguments.directory.is_dir():
        parser.error(f"{arguments.directory}: no such directory; give the folder with the golden files")
    return EXIT_DONE if check_directory(arguments.directory, arguments.only) else EXIT_CHECK_FAILED


if __name__ == "__main__":
    sys.exit(main())
