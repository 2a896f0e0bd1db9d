"""What every conversion can be told, whatever it converts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.layouts import MegatronShape
from checkpoints_convert.progress import human_bytes
from checkpoints_convert.sizes import conversion_bytes, megatron_bytes


@dataclass(frozen=True)
class Options:
    """Settings of a conversion.

    Attributes:
        overwrite: replace the destination if it exists.
        verify: compare the result with the source, tensors and logits, before it takes its place.
        max_memory: bytes of memory that conversion and comparison may take.
    """

    overwrite: bool = False
    verify: bool = True
    max_memory: int | None = None

    def check_resources(self, shape: MegatronShape, destination: Path) -> None:
        """Raises ``ValueError`` before any work where memory or disk cannot suffice."""
        needed = conversion_bytes(shape)
        if self.max_memory is not None and needed > self.max_memory:
            raise ValueError(
                f"--max-memory {human_bytes(self.max_memory)}: this conversion takes about {human_bytes(needed)}"
            )
        existing = next(folder for folder in Path(destination).absolute().parents if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if free < megatron_bytes(shape):
            raise ValueError(
                f"{existing} has {human_bytes(free)} free, {destination} takes {human_bytes(megatron_bytes(shape))}: "
                "choose another disk"
            )


DEFAULTS = Options()
