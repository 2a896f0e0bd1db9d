"""The zip that torch's writer makes, and no other.

Records lie back to back from the first byte: a local header without sizes, the name, an extra field that aligns the
data, the data, and a descriptor with checksum and size (none behind empty data). The directory follows, then three end
records that cover the rest of the file. torch 2.1 to 2.15 write exactly this; entries at or above 4 GiB carry their
numbers in a zip64 field.

A zip can be read in more than one way: from its directory or from its headers, with this end record or with that. So
nothing is searched for here. The directory gives name, checksum, size and place of each record, from these the bytes of
every structure follow, and they are compared with the file: what differs is refused by the name of the field.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

from megatron_dmc.support.errors import Refused

Read = Callable[[int, int], bytes]
"""Reads ``length`` bytes at ``offset`` of the archive; ``ValueError`` where it ends before."""

DIRECTORY_BYTES_LIMIT = 1 << 28
"""About two million records, far above any file of ``torch.save``."""

_NARROW = 0xFFFFFFFF
_ENTRIES_NARROW = 0xFFFF
_UTF8, _DESCRIPTOR_FOLLOWS = 0x0800, 0x0008

_SHARED_FIELDS = (
    "version flags compression_method time date checksum compressed_size size name_length extra_length".split()  # noqa: SIM905
)
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_FIELDS = ("signature", *_SHARED_FIELDS)
_ENTRY = struct.Struct("<4s6H3L5H2L")
_ENTRY_FIELDS = (
    *("signature", "origin", *_SHARED_FIELDS),
    *("comment_length", "disk", "internal_attributes", "external_attributes", "place"),
)
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_END_BYTES = _END64.size + _LOCATOR.size + _END.size

_NAME = re.compile(
    rb"(?P<root>[^/\0]+)/(?P<name>data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    rb"|\.data/serialization_id|data/[0-9]+)"
)

_CONTENTS = {
    "version": re.compile(rb"[0-9]{1,2}\n"),
    "byteorder": re.compile(rb"little|big"),
    ".format_version": re.compile(rb"[0-9]{1,4}"),
    ".storage_alignment": re.compile(rb"[0-9]{1,8}"),
    ".data/serialization_id": re.compile(rb"[0-9]{1,64}"),
}
"""What the small records hold; torch cannot open an archive without a version."""
_CONTENT_BYTES_LIMIT = 64


class Extent(NamedTuple):
    """Where the data of a record is."""

    offset: int
    size: int


class _Entry(NamedTuple):
    """What the directory says of a record."""

    name: bytes
    checksum: int
    size: int
    place: int

    @property
    def flags(self) -> int:
        return _UTF8 | (_DESCRIPTOR_FOLLOWS if self.size else 0)

    def wide(self, stored: int) -> bytes:
        """The zip64 field with the numbers that exceed 32 bits; ``stored``: bytes stored, still 0 in a header."""
        numbers = [self.size, stored] if self.size >= _NARROW else []
        numbers += [self.place] if self.place >= _NARROW else []
        return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""

    def directory_bytes(self) -> bytes:
        size, wide = min(self.size, _NARROW), self.wide(self.size)
        rest = (self.checksum, size, size, len(self.name), len(wide), 0, 0, 0, 0, min(self.place, _NARROW))
        return _ENTRY.pack(b"PK\1\2", 0, 0, self.flags, 0, 0, 0, *rest) + self.name + wide

    def header_bytes(self, extra_length: int) -> bytes:
        wide = self.wide(0)
        padding = max(extra_length - len(wide) - 4, 0)
        fixed = _LOCAL.pack(b"PK\3\4", 0, self.flags, 0, 0, 0, 0, 0, 0, len(self.name), extra_length)
        return fixed + self.name + wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding

    def descriptor_bytes(self) -> bytes:
        if not self.size:
            return b""
        return struct.pack("<4sL2Q" if self.wide(0) else "<4s3L", b"PK\7\x08", self.checksum, self.size, self.size)


def read_archive(read: Read, length: int, what: str) -> dict[str, Extent]:
    """Where each record of an archive of ``length`` bytes is, by its name without the root folder.

    Raises:
        Refused: not an archive of torch's writer, or truncated; the message names what differs.
    """
    directory, directory_place, count = _end(read, length, what)
    records = _records(read, directory, directory_place, count, what)
    if not records.keys() >= {"data.pkl", "version"}:
        raise Refused(f"{what} lacks data.pkl or version: torch.save writes a pickle and the version of its format")
    for name, content in _CONTENTS.items():
        offset, size = records.get(name, (0, -1))
        if size > _CONTENT_BYTES_LIMIT or (size >= 0 and not content.fullmatch(read(offset, size))):
            raise Refused(f"{what}: {name} does not hold what torch.save writes there")
    return records


def _records(read: Read, directory: bytes, directory_place: int, count: int, what: str) -> dict[str, Extent]:
    records: dict[str, Extent] = {}
    roots, position = set(), 0
    for entry in _entries(directory, count, what):
        match = _NAME.fullmatch(entry.name)
        if match is None:
            raise Refused(f"{what} holds {entry.name!r:.100}, which torch.save does not write")
        name = match["name"].decode()
        if name in records:
            raise Refused(f"{what} holds {name} twice")
        if entry.place != position:
            kind = "lies over another record" if entry.place < position else "does not follow the record before it"
            raise Refused(f"{what}: {name} starts at {entry.place}, {position} is expected: it {kind}")
        records[name], position = _record(read, entry, f"{what}: {name}", directory_place)
        roots.add(match["root"])
    if position != directory_place or len(roots) > 1:
        raise Refused(
            f"{what}: the records end at {position}, the zip directory starts at {directory_place}"
            if position != directory_place
            else f"{what} has {len(roots)} root folders, torch.save writes one"
        )
    return records


def _end(read: Read, length: int, what: str) -> tuple[bytes, int, int]:
    """The directory, its place, and the number of its entries."""
    found = read(length - _END_BYTES, _END_BYTES) if length >= _END_BYTES else b""
    if found[-_END.size :][:4] != b"PK\5\6" or found[:4] != b"PK\6\6":
        raise Refused(
            f"{what} is not a file of torch.save (torch >= 1.6), or is truncated: it does not end as torch's zip does"
        )
    count, size, place = _END64.unpack(found[: _END64.size])[7:]
    expected = _END64.pack(b"PK\6\6", _END64.size - 12, 0x031E, 45, 0, 0, count, count, size, place)
    expected += _LOCATOR.pack(b"PK\6\7", 0, place + size & (1 << 64) - 1, 1)
    narrow_count = min(count, _ENTRIES_NARROW)
    expected += _END.pack(b"PK\5\6", 0, 0, narrow_count, narrow_count, min(size, _NARROW), min(place, _NARROW), 0)
    if found != expected or place + size + _END_BYTES != length:
        raise Refused(
            f"{what}: the end records of the zip contradict each other, or do not cover the file (a comment, bytes "
            "in front or behind, a second directory): torch.save does not write them so"
        )
    if size > DIRECTORY_BYTES_LIMIT:
        raise Refused(f"{what}: a zip directory of {size} bytes; {DIRECTORY_BYTES_LIMIT} are read at most")
    return read(place, size), place, count


def _entries(directory: bytes, count: int, what: str) -> Iterator[_Entry]:
    position = 0
    for number in range(count):
        fixed = directory[position : position + _ENTRY.size]
        if len(fixed) < _ENTRY.size:
            raise Refused(f"{what}: the zip directory ends at entry {number} of {count}")
        fields = _ENTRY.unpack(fixed)
        checksum, _, size, name_length, extra_length = fields[7:12]
        place = fields[16]
        start = position + _ENTRY.size
        name, extra = directory[start : start + name_length], directory[start + name_length :][:extra_length]
        size, place = _widened(size, place, extra)
        entry = _Entry(name, checksum, size, place)
        expected = entry.directory_bytes()
        found = directory[position : position + len(expected)]
        if found != expected:
            _refuse(f"{what}: {name!r:.100}", "zip directory", _ENTRY, _ENTRY_FIELDS, found, expected)
        position += len(expected)
        yield entry
    if position != len(directory):
        raise Refused(f"{what}: {len(directory) - position} bytes of the zip directory belong to no entry")


def _widened(size: int, place: int, extra: bytes) -> tuple[int, int]:
    """Size and place from the zip64 field where the entry has no room for them."""
    numbers = struct.unpack_from(f"<{len(extra) // 8}Q", extra, 4) if len(extra) in (12, 20, 28) else (0,)
    if size == _NARROW:
        size = numbers[0]
    if place == _NARROW:
        place = numbers[-1]
    return size, place


def _record(read: Read, entry: _Entry, what: str, end: int) -> tuple[Extent, int]:
    """Where the data of a record is, and where the record ends; ``end``: of all records."""
    fixed = read(entry.place, _LOCAL.size)
    extra_length = _LOCAL.unpack(fixed)[-1]
    expected = entry.header_bytes(extra_length)
    found = read(entry.place, len(expected))
    if found != expected:
        _refuse(what, "local header", _LOCAL, _LOCAL_FIELDS, found, expected)
    offset = entry.place + len(expected)
    descriptor = entry.descriptor_bytes()
    if offset + entry.size + len(descriptor) > end:
        raise Refused(f"{what} has {entry.size} bytes at {offset}, the zip directory starts at {end}")
    if descriptor and read(offset + entry.size, len(descriptor)) != descriptor:
        raise Refused(f"{what}: the descriptor behind the data contradicts the zip directory")
    return Extent(offset, entry.size), offset + entry.size + len(descriptor)


def _refuse(
    what: str, part: str, layout: struct.Struct, fields: tuple[str, ...], found: bytes, expected: bytes
) -> NoReturn:
    """Raise ``ValueError`` with the first field that differs."""
    is_there, should_be = (layout.unpack(part[: layout.size].ljust(layout.size)) for part in (found, expected))
    differing = [number for number in range(len(fields)) if is_there[number] != should_be[number]]
    told = "its name or its extra field"
    if differing:
        first = differing[0]
        told = f"{fields[first]} {is_there[first]!r} instead of {should_be[first]!r}"
        told += ", compressed or encrypted" if fields[first] in ("compression_method", "flags") else ""
    raise Refused(f"{what}: the {part} of the zip differs from what torch.save writes: {told}")
