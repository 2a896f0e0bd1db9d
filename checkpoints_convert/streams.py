"""Files that are hashed and handed to the disk while they are written."""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_dmc.support.progress import Advance

WRITER_THREADS = 2
"""Files written at one time: SHA-256 keeps a core busy, and each file in work holds its tensors in memory."""

_BLOCK_BYTES = 1 << 24
_FLUSH_BYTES = 1 << 28


class HashedFile(io.RawIOBase):
    """A new file whose SHA-256 is known when it is closed, and whose pages do not pile up in memory."""

    def __init__(self, path: Path, advance: Advance | None = None) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._digest = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(1)
        self._advance = advance
        self._position = 0
        self._flushed = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        # A core hashes while the disk takes the same bytes; both are done when this returns.
        hashed = self._hashing.submit(self._digest.update, view)
        done = 0
        while done < len(view):
            count = os.write(self._descriptor, view[done : done + _BLOCK_BYTES])
            done += count
            self._position += count
            if self._advance is not None:
                self._advance(count)
            if self._position - self._flushed >= _FLUSH_BYTES:
                self._drop_pages()
        hashed.result()
        return done

    def close(self) -> None:
        if not self.closed:
            self._drop_pages()
            os.close(self._descriptor)
            self._hashing.shutdown()
        super().close()

    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()

    def _drop_pages(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, self._flushed, self._position - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = self._position
