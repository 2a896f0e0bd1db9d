"""``--dry-run``: what a conversion would write and take."""

from __future__ import annotations

import math
from pathlib import Path

from checkpoints_convert.hf_writer import plan_shards
from checkpoints_convert.sizes import (
    conversion_bytes,
    forward_bytes,
    itemsize,
    largest_layer_bytes,
    megatron_bytes,
    weight_bytes,
)
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.models.tensors import entries, hf_name
from megatron_dmc.support.files import free_space
from megatron_dmc.support.units import amount


def plan_lines(shape: MegatronShape, destination: Path, *, to_hugging_face: bool) -> list[str]:
    """Tensors with shapes and bytes, peak memory and free disk needed, for people."""
    config = shape.config
    rows = []
    for entry in entries(config):
        if entry.layer not in (None, 0):
            continue
        times = 1 if entry.layer is None else config.num_layers
        names = [hf_name(config, part.role) for part in entry.row.parts]
        shapes = list(entry.hf_shapes(config)) if to_hugging_face else [entry.megatron_shape(shape)]
        size = sum(math.prod(one) for one in shapes) * itemsize(config)
        left, right = entry.row.megatron, " + ".join(names)
        arrow = f"{left} -> {right}" if to_hugging_face else f"{right} -> {left}"
        told = " + ".join("x".join(map(str, one)) for one in shapes)
        rows.append(f"{times:>4} x {told:<24} {amount(size * times, 'B'):>8}  {arrow}")
    total = weight_bytes(config) if to_hugging_face else megatron_bytes(shape)
    existing, free = free_space(destination)
    forward = forward_bytes(config)
    rows += [
        f"writes {amount(total, 'B')} of {config.dtype} tensors"
        + (f" in {len(plan_shards(config))} safetensors files" if to_hugging_face else ""),
        f"free disk needed: {amount(total, 'B')}; free at {existing}: {amount(free, 'B')}",
        f"largest layer: {amount(largest_layer_bytes(config), 'B')}; peak memory of the conversion: about "
        f"{amount(conversion_bytes(shape), 'B')}, of the comparison: about {amount(forward.whole, 'B')}",
    ]
    return rows
