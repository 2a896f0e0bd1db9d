"""Files that are hashed and handed to the disk while they are written."""

from __future__ import annotations

import hashlib
import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoints_convert.progress import Progress

_FLUSH_BYTES = 1 << 28
_SMALL_BYTES = 1 << 16


class HashedFile(io.RawIOBase):
    """A new file whose SHA-256 is known when it is closed, and whose pages do not pile up in memory.

    Large blocks are hashed by a thread of its own while the caller goes on; their memory must stay as it is until
    the next ``write``, :meth:`wait` or ``close``.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._progress = progress
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
        self.wait()
        if len(view) < _SMALL_BYTES:
            self._digest.update(view)
        else:
            self._pending = self._hasher.submit(self._digest.update, view)
        done = 0
        while done < len(view):
            done += os.write(self._descriptor, view[done : done + _FLUSH_BYTES])
            if self._position + done - self._flushed >= _FLUSH_BYTES:
                self._drop_pages(self._position + done)
        self._position += done
        if self._progress is not None:
            self._progress.add(done)
        return done

    def wait(self) -> None:
        """Until every block written so far is hashed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        if not self.closed:
            self.wait()
            self._hasher.shutdown()
            self._drop_pages(self._position)
            os.close(self._descriptor)
        super().close()

    def sha256(self) -> str:
        """Of a file that is closed."""
        return self._digest.hexdigest()

    def _drop_pages(self, end: int) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, self._flushed, end - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = end
