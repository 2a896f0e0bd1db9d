"""``verify``: two checkpoints hold the same model, or the command fails.

Every tensor is compared bit for bit after undoing the layout, then the logits of fixed prompts, computed by other
people's layers (``forward``). A comparison that cannot be made is a failure.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.forward import LOGITS, ForwardJob, run_forward
from checkpoints_convert.sizes import forward_bytes, weight_bytes
from megatron_dmc.checkpoint.guard import examine_location
from megatron_dmc.checkpoint.locate import locate
from megatron_dmc.checkpoint.manifest import manifest_problems
from megatron_dmc.checkpoint.source import Source, open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.models.borrowed_channel import borrowed_by, parts_without_borrowed_channels
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.tensors import Entry, entries
from megatron_dmc.support.errors import CheckFailed, Refused
from megatron_dmc.support.progress import progress

PROMPTS, PROMPT_TOKENS = 4, 16
FIRST_LAYERS = 2
"""Layers that are walked where memory does not allow all of the model."""

# Two implementations of one layer in float32 differ by rounding (about 1e-6 of the norm); a wrong layout, base or
# epsilon changes the first layer by more than 1e-2.
RELATIVE_TOLERANCE = 1e-3
# Predictions may differ where the two best logits are closer than the rounding.
TIE = 1e-3

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Verification:
    """What was compared and how close it was; it exists only if everything agreed.

    Attributes:
        tensors, bytes: number and size of the tensors that are equal bit for bit.
        clears_borrowed: for each of the two, whether it was compared after zeroing the rows of borrowed channels.
        layers: layers whose outputs were compared; 0: only tensors.
        equal_predictions: share of positions with the same most likely token; None: no logits were compared.
        max_difference, mean_difference: of the logits.
        logits_sha256: of the logits of the two checkpoints.
    """

    tensors: int
    bytes: int
    clears_borrowed: tuple[bool, bool]
    layers: int = 0
    num_layers: int = 0
    equal_predictions: float | None = None
    max_difference: float = 0.0
    mean_difference: float = 0.0
    logits_sha256: tuple[str, str] = ("", "")

    def lines(self) -> list[str]:
        """For people."""
        told = [f"{self.tensors} tensors ({self.bytes} bytes) are equal bit for bit"]
        if any(self.clears_borrowed):
            told.append("compared without borrowed channels and adapters, as an export to plain Llama leaves them out")
        if self.equal_predictions is not None:
            told.append(
                f"logits of {PROMPTS * PROMPT_TOKENS} positions: {self.equal_predictions:.1%} equal predictions, "
                f"difference at most {self.max_difference:.3g}, {self.mean_difference:.3g} on average"
            )
            told.append(f"SHA-256 of the logits: {self.logits_sha256[0]} and {self.logits_sha256[1]}")
        elif self.layers:
            told.append(
                f"outputs of the first {self.layers} of {self.num_layers} layers agree; --max-memory allows no more"
            )
        else:
            told.append("logits were not compared")
        return told


def verify(
    first: Path | str,
    second: Path | str,
    *,
    logits: bool = True,
    max_memory: int | None = None,
    ignored_settings: Sequence[str] = (),
) -> Verification:
    """Compare two checkpoints of any of the supported formats, and each with its manifest if it has one.

    Args:
        logits: compare a forward pass as well (needs transformers for Hugging Face, megatron-core for Megatron).
        max_memory: bytes the comparison may take; too few for the output layer: only the first layers are walked.
        ignored_settings: unknown settings of a ``config.json`` that change nothing.

    Raises:
        ValueError: a path is no checkpoint, or one that was made to harm.
        CheckFailed: they differ, one is damaged, or the comparison could not be made.
    """
    places = [locate(path) for path in (first, second)]
    try:
        for place in places:
            examine_location(place)
        for place in places:
            _check_manifest(place.directory)
        one, other = (open_source(path, ignored_settings) for path in (first, second))
        return compare(one, other, logits=logits, max_memory=max_memory)
    except Refused:
        raise
    except ValueError as error:
        raise CheckFailed(f"the comparison could not be made: {error}") from error


def compare(first: Source, second: Source, *, logits: bool = True, max_memory: int | None = None) -> Verification:
    """As :func:`verify`, for models that are open."""
    clears = _check_settings(first, second)
    compared = _compare_tensors((first, second), clears)
    return _compare_outputs((first, second), compared, max_memory) if logits else compared


def check_conversion(source: Source, destination: Path, *, logits: bool = True, max_memory: int | None = None) -> None:
    """The comparison that ends a conversion; it prints what was compared."""
    print("\n".join(compare(source, open_source(destination), logits=logits, max_memory=max_memory).lines()))


def _check_manifest(directory: Path) -> None:
    problems = manifest_problems(directory)
    if problems:
        raise CheckFailed(f"{directory} does not match its manifest: {'; '.join(problems[:5])}")


def _check_settings(first: Source, second: Source) -> tuple[bool, bool]:
    """Whether the borrowed rows of one must be cleared, as its export did; fails where the models differ."""
    different = [
        f"{name}: {getattr(first.config, name)!r} and {getattr(second.config, name)!r}"
        for name in ModelConfig.__dataclass_fields__.keys() - {"adapter"}  # which follows from the settings
        if getattr(first.config, name) != getattr(second.config, name)
    ]
    if different:
        raise CheckFailed(f"the two checkpoints are of different models: {'; '.join(different)}")
    settings = [_with_effect(source.dmc) for source in (first, second)]
    if settings[0] is not None and settings[1] is not None and settings[0] != settings[1]:
        raise CheckFailed(f"the two checkpoints have different DMC settings: {settings[0]} and {settings[1]}")
    return settings[1] is None and settings[0] is not None, settings[0] is None and settings[1] is not None


def _with_effect(dmc: DMCConfig | None) -> DMCConfig | None:
    """Settings of a stage of the retrofit."""
    return None if dmc is None or not dmc.retrofits else dmc


def _compare_tensors(pair: tuple[Source, Source], clears: tuple[bool, bool]) -> Verification:
    # An export to a plain Llama leaves out the adapter.
    config = dataclasses.replace(pair[0].config, adapter=all(source.config.adapter for source in pair))
    count = total = 0
    with progress("verify", 2 * weight_bytes(config), "B") as advance:
        for entry in entries(config):
            first, second = (_parts(source, entry, clear) for source, clear in zip(pair, clears, strict=True))
            for name, one, other in zip(entry.hf_names, first, second, strict=True):
                unequal = _unequal(one, other)
                if unequal:
                    raise CheckFailed(f"{name} differs in {unequal} of {one.numel()} elements")
                count += 1
                total += one.nbytes
                advance(2 * one.nbytes)
    return Verification(count, total, clears)


def _parts(source: Source, entry: Entry, clear: bool) -> list[Tensor]:
    parts = source.parts(entry)
    return parts_without_borrowed_channels(entry, parts, source.config, borrowed_by(source.dmc)) if clear else parts


def _unequal(one: Tensor, other: Tensor) -> int:
    """Elements that differ in any bit."""
    integer = _INTEGERS[one.itemsize]
    one, other = one.contiguous().view(integer), other.contiguous().view(integer)
    return 0 if torch.equal(one, other) else int((one != other).sum())


def _compare_outputs(pair: tuple[Source, Source], compared: Verification, max_memory: int | None) -> Verification:
    config = pair[0].config
    needs = forward_bytes(config)
    layers = config.num_layers
    if max_memory is not None and max_memory < needs.whole:
        layers = min(FIRST_LAYERS, config.num_layers - 1)
        if max_memory < needs.layers or layers == 0:
            raise CheckFailed(
                f"the outputs cannot be compared within --max-memory {max_memory} bytes: {needs.layers} are needed for "
                f"the first layers, {needs.whole} for the logits"
            )
    tokens = _prompts(config.vocab_size)
    one, other = (
        run_forward(
            ForwardJob(
                str(source.directory),
                tokens,
                layers,
                clear,
                config.vocab_size,
                ignored_settings=list(source.ignored_settings),
            )
        )
        for source, clear in zip(pair, compared.clears_borrowed, strict=True)
    )
    for name in one:
        difference = float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-30))
        if not difference <= RELATIVE_TOLERANCE:
            raise CheckFailed(
                f"the outputs diverge at {name}: relative difference {difference:.3g}, allowed {RELATIVE_TOLERANCE:g}; "
                "the tensors are equal, so the two configurations do not describe the same computation"
            )
    if LOGITS not in one:
        return dataclasses.replace(compared, layers=layers, num_layers=config.num_layers)
    return _compare_logits(one[LOGITS], other[LOGITS], compared, config.num_layers)


def _compare_logits(one: Tensor, other: Tensor, compared: Verification, num_layers: int) -> Verification:
    same = one.argmax(-1) == other.argmax(-1)
    best = one.topk(2, dim=-1).values
    is_tie = best[..., 0] - best[..., 1] < TIE * one.abs().amax()
    if not bool((same | is_tie).all()):
        raise CheckFailed(f"the predictions differ at {int((~same).sum())} of {same.numel()} positions")
    difference = (one - other).abs()
    return dataclasses.replace(
        compared,
        layers=num_layers,
        num_layers=num_layers,
        equal_predictions=float(same.float().mean()),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        logits_sha256=(_sha256(one), _sha256(other)),
    )


def _prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
