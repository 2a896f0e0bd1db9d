"""``merge-kv-heads``: the baseline of grouped-query up-training. K and V heads are averaged in groups.

Source: Ainslie et al., GQA (arXiv 2305.13245), section 2.1: mean-pooled projections, then further training.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.hf_writer import write_hugging_face
from checkpoints_convert.megatron_to_hf import state_vocabulary
from checkpoints_convert.megatron_writer import ANY_LAYOUT, write_megatron
from checkpoints_convert.options import DEFAULTS, Options
from checkpoints_convert.verify import check_conversion
from megatron_dmc.checkpoint.source import MegatronSource, Source, open_source
from megatron_dmc.models import fusion
from megatron_dmc.models.tensors import Entry, by_hf_name


def merge_kv_heads(
    source: Path | str, destination: Path | str, *, num_kv_heads: int, options: Options = DEFAULTS
) -> Path:
    """Average the K and V heads of a plain Llama in groups; the result has the format of the source.

    Neighbouring heads are merged, so that every query head keeps the group its head was in.

    Raises:
        ValueError: ``num_kv_heads`` does not divide the heads of the model, or the model has DMC's channels.
        CheckFailed: what was written is not what was computed.
    """
    model = open_source(source, options.ignored_settings)
    if isinstance(model, MegatronSource):
        state_vocabulary(model, None)
    merged = MergedHeads(model, num_kv_heads)
    check = partial(check_conversion, merged, logits=False)
    if isinstance(model, MegatronSource):
        write_megatron(merged, Path(destination), "merge", layout=ANY_LAYOUT, options=options, check=check)
    else:
        write_hugging_face(merged, Path(destination), "merge", options=options, check=check)
    return Path(destination)


class MergedHeads(Source):
    """A Llama whose K and V heads are averages of those of another one."""

    def __init__(self, model: Source, num_kv_heads: int) -> None:
        old = model.config.num_kv_heads
        if num_kv_heads < 1 or old % num_kv_heads:
            raise ValueError(f"--num-kv-heads {num_kv_heads}: must divide the {old} KV heads of {model.directory}")
        if model.dmc is not None and model.dmc.retrofits:
            raise ValueError(
                f"{model.directory} is at DMC stage {model.dmc.stage}: merge the heads of the plain Llama, then "
                "retrofit that"
            )
        self.directory, self.companions, self.dmc = model.directory, model.companions, None
        self.config = dataclasses.replace(model.config, num_kv_heads=num_kv_heads)
        self._model = model

    def parts(self, entry: Entry) -> list[Tensor]:
        original, _ = by_hf_name(self._model.config)[entry.hf_names[0]]
        parts = self._model.parts(original)
        if entry.row.layout is not fusion.QKV:
            return parts
        q, k, v = parts
        return [q, self._averaged(k), self._averaged(v)]

    def _averaged(self, weight: Tensor) -> Tensor:
        """Of a projection or its bias."""
        by_head = weight.unflatten(0, (self.config.num_kv_heads, -1, self.config.head_dim))
        return by_head.mean(dim=1, dtype=torch.float32).to(weight.dtype).flatten(0, 1)
