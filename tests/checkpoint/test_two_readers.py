"""Honest archives changed at random: refused, or torch's reader sees the same pickle as ours."""

import io
import random
import struct

import torch

from megatron_dmc.checkpoint.torch_zip import read_archive
from tests.checkpoint.archives import archive_of, records_of, saved

TRIES = 10_000
STRUCTURES = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08")


def _honest() -> list[bytes]:
    values = ([1], {"w": torch.arange(3), "e": torch.empty(0)}, {"x": "y" * 40})
    return [saved(value) for value in values]


def _number(generator: random.Random, archive: bytes) -> bytes:
    """A place or a size that could mean something."""
    value = generator.choice(
        [0, 1, 0xFFFFFFFF, len(archive), generator.randrange(len(archive)), archive.find(b"PK\1\2")]
    )
    return struct.pack(generator.choice(["<H", "<L", "<Q"]), value & 0xFFFF)


def _changed(archive: bytes, other: bytes, generator: random.Random) -> bytes:
    """One of: bits, a number in a structure, a range moved, doubled, cut out or taken from another archive."""
    changed = bytearray(archive)
    kind = generator.randrange(7)
    if kind == 0:
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    elif kind == 1:
        found = [at for mark in STRUCTURES for at in _all(archive, mark)]
        at = generator.choice(found) + generator.randrange(4, 60)
        number = _number(generator, archive)
        changed[at : at + len(number)] = number
    elif kind == 2:
        start, end = sorted(generator.randrange(len(changed)) for _ in range(2))
        at = generator.randrange(len(changed))
        changed[at:at] = changed[start:end]
    elif kind == 3:
        start = generator.randrange(len(changed))
        del changed[start : start + generator.randint(1, 100)]
    elif kind == 4:
        at = generator.choice([0, len(changed), generator.randrange(len(changed))])
        changed[at:at] = other
    elif kind == 5:
        start, end = sorted(generator.randrange(len(changed)) for _ in range(2))
        changed[start:end] = other[start:end]
    else:
        return _put_together_again(archive, generator)
    return bytes(changed[: len(archive) + len(other)])


def _put_together_again(archive: bytes, generator: random.Random) -> bytes:
    """Records in another order, with other data or names: some of these are archives of torch again."""
    records = records_of(archive)
    generator.shuffle(records)
    record = generator.choice(records)
    if generator.random() < 0.5:
        record.data = generator.randbytes(generator.randrange(40))
    if generator.random() < 0.2:
        record.name = generator.choice(records).name
    if generator.random() < 0.3:
        record.before = b"x" * generator.randrange(2)
    return archive_of(records)


def _all(data: bytes, mark: bytes) -> list[int]:
    return [at for at in range(len(data)) if data.startswith(mark, at)]


def _ours(archive: bytes) -> bytes | None:
    """The pickle, or None: refused."""

    def read(offset: int, length: int) -> bytes:
        if offset + length > len(archive):
            raise ValueError("the end")
        return archive[offset : offset + length]

    try:
        offset, size = read_archive(read, len(archive), "it")["data.pkl"]
    except (ValueError, KeyError):
        return None
    return archive[offset : offset + size]


def test_both_readers_see_the_same_or_the_archive_is_refused(capsys):
    generator = random.Random(0)
    honest = _honest()
    refused = same = 0
    for _ in range(TRIES):
        archive = _changed(generator.choice(honest), generator.choice(honest), generator)
        ours = _ours(archive)
        if ours is None:
            refused += 1
            continue
        assert torch._C.PyTorchFileReader(io.BytesIO(archive)).get_record("data.pkl") == ours
        same += 1
    with capsys.disabled():
        print(f"\n{TRIES} archives tried, {refused} refused, {same} read alike by both readers")
    assert refused + same == TRIES
    assert same > TRIES // 100
    assert refused > TRIES // 2
