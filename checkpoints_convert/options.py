"""What every conversion can be told, whatever it converts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.sizes import conversion_bytes, megatron_bytes
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.support.files import free_space
from megatron_dmc.support.units import amount


@dataclass(frozen=True)
class Options:
    """Settings of a conversion.

    Attributes:
        overwrite: replace the destination if it exists.
        verify: compare the result with the source, tensors and logits, before it takes its place.
        max_memory: bytes of memory that conversion and comparison may take.
        ignored_settings: unknown settings of a source's ``config.json`` that change nothing.
    """

    overwrite: bool = False
    verify: bool = True
    max_memory: int | None = None
    ignored_settings: tuple[str, ...] = ()

    def check_resources(self, shape: MegatronShape, destination: Path) -> None:
        """Raises ``ValueError`` before any work where memory or disk cannot suffice."""
        needed = conversion_bytes(shape)
        if self.max_memory is not None and needed > self.max_memory:
            raise ValueError(
                f"--max-memory {amount(self.max_memory, 'B')}: this conversion takes about {amount(needed, 'B')}"
            )
        existing, free = free_space(destination)
        if free < megatron_bytes(shape):
            raise ValueError(
                f"{existing} has {amount(free, 'B')} free, {destination} takes {amount(megatron_bytes(shape), 'B')}: "
                "choose another disk"
            )


DEFAULTS = Options()
