"""Every reader, fed damaged files with a fixed budget: it reads them or says ``ValueError``, nothing else."""

import random
from collections.abc import Callable
from pathlib import Path

from megatron_dmc.checkpoint.allowed import ALLOWED
from megatron_dmc.checkpoint.guard import check_checkpoint
from megatron_dmc.checkpoint.legacy import LegacyCheckpoint
from megatron_dmc.checkpoint.pickles import describe
from megatron_dmc.checkpoint.safetensors_file import read_safetensors_header
from megatron_dmc.checkpoint.saved_arguments import read_saved_arguments
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_dmc.checkpoint.torch_file import read_torch_file
from megatron_dmc.models.hugging_face import parse_hf_config
from megatron_dmc.models.tensors import entries

TRIES = 150


def _damage(data: bytes, generator: random.Random) -> bytes:
    """One of: flipped bits, a cut end, a removed, repeated, zeroed or random range."""
    changed = bytearray(data)
    start = generator.randrange(len(changed))
    length = min(generator.randint(1, 64), len(changed) - start)
    kind = generator.randrange(6)
    if kind == 0:
        for _ in range(generator.randint(1, 8)):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        del changed[start : start + length]
    elif kind == 3:
        changed[start:start] = changed[start : start + length]
    else:
        changed[start : start + length] = bytes(length) if kind == 4 else generator.randbytes(length)
    return bytes(changed)


def _fuzz(path: Path, read: Callable[[], object], within: slice = slice(None)) -> None:
    """Damage ``path`` in many ways; at least one damage must be noticed."""
    generator = random.Random(path.name)
    whole = path.read_bytes()
    part = whole[within]
    start = within.indices(len(whole))[0]
    refused = 0
    for _ in range(TRIES):
        path.write_bytes(whole[:start] + _damage(part, generator) + whole[start + len(part) :])
        try:
            read()
        except ValueError:
            refused += 1
    path.write_bytes(whole)
    read()
    assert refused > TRIES // 10


def test_config_json(tmp_path, torch_dist):
    _fuzz(tmp_path / "hf" / "config.json", lambda: parse_hf_config(tmp_path / "hf"))


def test_safetensors(tmp_path, torch_dist):
    path = tmp_path / "hf" / "model.safetensors"
    _fuzz(path, lambda: read_safetensors_header(path), slice(0, 4096))


def test_the_metadata_of_torch_dist(torch_dist):
    _fuzz(torch_dist / ".metadata", lambda: check_checkpoint(torch_dist))


def test_the_data_of_torch_dist(torch_dist):
    item = TorchDistCheckpoint(torch_dist).objects["common_state/shard_0_1"]
    _fuzz(item.path, lambda: read_saved_arguments(torch_dist), slice(item.offset, item.offset + item.length))


def test_the_tracker(torch_dist):
    _fuzz(torch_dist.parent / "latest_checkpointed_iteration.txt", lambda: read_saved_arguments(torch_dist.parent))


def test_a_legacy_rank(legacy):
    path = legacy / "mp_rank_00_000" / "model_optim_rng.pt"
    pickle_bytes = slice(0, 8192)
    _fuzz(path, lambda: LegacyCheckpoint(legacy).tensors(), pickle_bytes)
    _fuzz(path, lambda: read_torch_file(path), slice(-4096, None))


def test_a_whole_model(torch_dist):
    """Damage may change values in silence (the manifest is there for that), but reading ends well or is told."""

    def read() -> None:
        source = open_source(torch_dist)
        for entry in entries(source.config)[:4]:
            source.parts(entry)

    _fuzz(torch_dist / "__0_0.distcp", read, slice(20_000, 60_000))


def test_random_bytes_as_a_pickle():
    generator = random.Random(0)
    refused = 0
    for _ in range(3000):
        try:
            describe(generator.randbytes(generator.randint(1, 60)) + b".", "bytes", ALLOWED)
        except ValueError:
            refused += 1
    assert refused > 2000
