"""Archives of ``torch.save`` put together by hand, byte by byte, honest or with a chosen deviation.

The writer here follows the format's description and shares nothing with the reader.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Record:
    """One record: what its local header, the directory and the descriptor say; None: the truth."""

    name: str
    data: bytes
    local_name: str | None = None
    local: dict[int, tuple[str, int]] = field(default_factory=dict)
    entry: dict[int, tuple[str, int]] = field(default_factory=dict)
    extra: bytes | None = None
    entry_extra: bytes = b""
    comment: bytes = b""
    descriptor: bytes | None = None
    before: bytes = b""
    listed: bool = True


def records_of(archive: bytes) -> list[Record]:
    """The records of an honest archive, read by Python's zipfile."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return [Record(entry.filename, opened.read(entry)) for entry in opened.infolist()]


def saved(value: Any) -> bytes:
    """What torch.save writes for a value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def patched(data: bytes, changes: dict[int, tuple[str, int]]) -> bytes:
    """``data`` with numbers (format, value) written over it at offsets."""
    changed = bytearray(data)
    for offset, (kind, value) in changes.items():
        struct.pack_into("<" + kind, changed, offset, value)
    return bytes(changed)


def archive_of(
    records: list[Record],
    *,
    end64: dict[int, tuple[str, int]] | None = None,
    locator: dict[int, tuple[str, int]] | None = None,
    end: dict[int, tuple[str, int]] | None = None,
    between: bytes = b"",
    comment: bytes = b"",
    directory_tail: bytes = b"",
    shift: int = 0,
) -> bytes:
    """The archive; ``between`` lies in front of the directory, ``shift`` is added to its stated place."""
    body, directory, count = b"", b"", 0
    for record in records:
        body += record.before
        place = len(body)
        flags = 0x0808 if record.data else 0x0800
        local_name = (record.local_name or record.name).encode()
        padding = -(place + 30 + len(local_name) + 4) % 64
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding if record.extra is None else record.extra
        header = struct.pack("<4s5H3L2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(local_name), len(extra))
        checksum = zlib.crc32(record.data)
        descriptor = struct.pack("<4s3L", b"PK\7\x08", checksum, len(record.data), len(record.data))
        if record.descriptor is not None or not record.data:
            descriptor = record.descriptor or b""
        body += patched(header, record.local) + local_name + extra + record.data + descriptor
        if record.listed:
            size, name = len(record.data), record.name.encode()
            entry = struct.pack(
                "<4s6H3L5H2L",
                *(b"PK\1\2", 0, 0, flags, 0, 0, 0, checksum, size, size),
                *(len(name), len(record.entry_extra), len(record.comment), 0, 0, 0, place),
            )
            directory += patched(entry, record.entry) + name + record.entry_extra + record.comment
            count += 1
    body += between
    directory += directory_tail
    place, size = len(body) + shift, len(directory)
    tail = patched(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, size, place), end64 or {})
    tail += patched(struct.pack("<4sLQL", b"PK\6\7", 0, place + size, 1), locator or {})
    tail += patched(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, place, len(comment)), end or {})
    return body + directory + tail + comment
