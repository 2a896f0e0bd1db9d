"""Pickles changed at random: refused, or what was described is what Python's unpickler builds from the same bytes."""

import argparse
import collections
import enum
import io
import pickle
import random
from pathlib import Path

import torch

from megatron_dmc.checkpoint.allowed import ALLOWED
from megatron_dmc.checkpoint.pickles import Name, Record, describe
from megatron_dmc.checkpoint.unpickling import unpickle

TRIES = 6_000
STORED = Path(__file__).parent / "written_by_torch" / "2.15.0" / "distributed" / ".metadata"


def _honest() -> list[bytes]:
    values = [1, 2.5, None, True, b"x", "text"]
    state = collections.OrderedDict(a=values, b=({1, 2}, torch.Size([2, 3])), c={"k": (1, 2)})
    saved = argparse.Namespace(a=state, kind=torch.bfloat16, path=Path("/x/y"), file=io.BytesIO(b""))
    return [STORED.read_bytes(), *(pickle.dumps(saved, protocol) for protocol in (2, 3, 4, 5))]


def _changed(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    at = generator.randrange(len(changed))
    kind = generator.randrange(5)
    if kind == 0:
        changed[at] ^= 1 << generator.randrange(8)
    elif kind == 1:
        changed[at] = generator.choice(b"().0NRQabcdehjlpqrstu}]\x81\x85\x86\x87\x88\x89\x8c\x90\x91\x93\x94")
    elif kind == 2:
        start = generator.randrange(len(changed))
        changed[at:at] = changed[start : start + generator.randint(1, 12)]
    elif kind == 3:
        del changed[at : at + generator.randint(1, 4)]
    else:
        other = generator.randrange(len(changed))
        changed[at], changed[other] = changed[other], changed[at]
    return bytes(changed)


def _same(described, built) -> bool:
    if isinstance(described, Name):
        return described.name.rpartition(".")[2] in str(built)
    if isinstance(described, Record):
        return _same_object(described, built)
    if isinstance(described, dict):
        keys = len(described) >= len(built) and all(map(_same, described.keys(), built.keys()))
        return keys and all(map(_same, described.values(), built.values()))
    if isinstance(described, (list, tuple)):
        return len(described) == len(built) and all(map(_same, described, built))
    if isinstance(described, (set, frozenset)):
        return len(described) == len(built)
    if isinstance(described, float):
        return repr(described) == repr(built)
    return described == built or isinstance(built, torch.layout)


def _same_object(described: Record, built) -> bool:
    name = described.kind.rpartition(".")[2]
    if isinstance(built, enum.Enum):
        return type(built).__name__ == name and built.value == described.args[0]
    if isinstance(described.state, dict):
        return type(built).__name__ == name and _same(described.state, vars(built))
    return name.removeprefix("Posix") in type(built).__name__


def test_what_was_described_is_what_is_built(capsys):
    generator = random.Random(0)
    honest = _honest()
    refused = unfit = same = 0
    for _ in range(TRIES):
        data = _changed(generator.choice(honest), generator)
        try:
            described = describe(data, "it", ALLOWED)
        except ValueError:
            refused += 1
            continue
        try:
            built = unpickle(data, "it")
        except ValueError:
            unfit += 1
            continue
        assert _same(described, built), data
        same += 1
    with capsys.disabled():
        print(f"\n{TRIES} pickles tried, {refused} refused, {unfit} of no class here, {same} built as described")
    assert same > TRIES // 20
    assert refused > TRIES // 4


def test_honest_ones_are_the_same():
    for data in _honest():
        assert _same(describe(data, "it", ALLOWED), unpickle(data, "it"))
