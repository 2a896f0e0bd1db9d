"""Hostile checkpoints by kind, each made from an honest one; every command inside creates a marker file.

A kind is a function of an honest iteration directory and the path of the marker.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.archives import Record, archive_of, records_of, saved
from tests.checkpoint.five_ways import COMMON_STATE, TRACKER, Touch, replace_object, two_archives
from tests.checkpoint.hostile_streams import bombs, call_of, commands, text_of

Plant = Callable[[Path, Path], None]
EXTRA_STATE = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4"
WEIGHT = "decoder.final_layernorm.weight"


def _objects(stream: bytes) -> bytes:
    """An archive whose pickle is [common state with the stream inside]."""
    records = records_of(saved([{"args": Namespace(x=None)}]))
    records[0].data = b"\x80\x04]}" + text_of("x") + stream + b"sa."
    return archive_of(records)


def _in_common_state(stream: Callable[[Path], bytes]) -> Plant:
    return lambda directory, marker: replace_object(directory, COMMON_STATE, _objects(stream(marker)))


def _metadata_with(directory: Path, stream: bytes) -> None:
    path = directory / ".metadata"
    path.write_bytes(path.read_bytes()[:-1] + stream + b"0.")


def _in_metadata(directory: Path, marker: Path) -> None:
    _metadata_with(directory, commands(marker)["os.system"])


def _object(key: str, value: Callable[[Path], Any]) -> Plant:
    return lambda directory, marker: replace_object(directory, key, saved(value(marker)))


def _bytes_tensor(marker: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(Touch(marker))), dtype=torch.uint8)


def _stream_of(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)


def _added_object(key: str) -> Plant:
    """An object under a name that Megatron gives to what it keeps beside the weights."""

    def plant(directory: Path, marker: Path) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

        metadata = pickle.loads((directory / ".metadata").read_bytes())
        stored = saved([{"x": Touch(marker)}])
        (directory / "__8_0.distcp").write_bytes(stored)
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__8_0.distcp", 0, len(stored))
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return plant


def file_of(name: str, data: Callable[[Path], bytes] = lambda marker: pickle.dumps(Touch(marker))) -> Plant:
    def plant(directory: Path, marker: Path) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data(marker))

    return plant


def evil_archive(marker: Path) -> bytes:
    return saved({"args": Namespace(), "x": Touch(marker)})


def _honest(directory: Path) -> bytes:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == COMMON_STATE)
    return (directory / info.relative_path).read_bytes()[info.offset :][: info.length]


def _archive(change: Callable[[list[Record], Path], dict[str, Any] | None]) -> Plant:
    """The common state as an archive that deviates."""

    def plant(directory: Path, marker: Path) -> None:
        records = records_of(_honest(directory))
        replace_object(directory, COMMON_STATE, archive_of(records, **(change(records, marker) or {})))

    return plant


def _evil_record(marker: Path, name: str = "archive/data.pkl") -> Record:
    return Record(name, b"\x80\x02]" + commands(marker)["os.system"] + b"a.")


def _unlisted(marker: Path) -> Record:
    record = _evil_record(marker, "archive/data/9")
    record.listed = False
    return record


def _set(record: Record, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(record, name, value)


def _two_in_one(directory: Path, marker: Path) -> None:
    replace_object(directory, COMMON_STATE, two_archives(_honest(directory), saved([Touch(marker)])))


def _in_front(directory: Path, marker: Path) -> None:
    replace_object(directory, COMMON_STATE, saved([Touch(marker)]) + _honest(directory))


def _behind(directory: Path, marker: Path) -> None:
    replace_object(directory, COMMON_STATE, _honest(directory) + saved([Touch(marker)]))


def _old_format(directory: Path, marker: Path) -> None:
    stream = io.BytesIO()
    torch.save([Touch(marker)], stream, _use_new_zipfile_serialization=False)
    replace_object(directory, COMMON_STATE, stream.getvalue())


ARCHIVES: dict[str, Plant] = {
    "two directories": _two_in_one,
    "archive in front": _in_front,
    "archive behind": _behind,
    "old format of torch": _old_format,
    "second data.pkl": _archive(lambda records, marker: records.append(_evil_record(marker))),
    "first data.pkl": _archive(lambda records, marker: records.insert(0, _evil_record(marker))),
    "data.pkl in capitals": _archive(lambda records, marker: records.append(_evil_record(marker, "archive/DATA.pkl"))),
    "other root": _archive(lambda records, marker: records.insert(0, _evil_record(marker, "other/data.pkl"))),
    "unlisted record": _archive(lambda records, marker: records.insert(1, _unlisted(marker))),
    "hidden between": _archive(lambda records, marker: {"between": saved([Touch(marker)])}),
    "comment": _archive(lambda records, marker: {"comment": saved([Touch(marker)])}),
    "shifted": _archive(lambda records, marker: {"shift": -8}),
    "compressed": _archive(lambda records, marker: _set(records[0], entry={10: ("H", 8)}, local={8: ("H", 8)})),
    "other name in header": _archive(lambda records, marker: _set(records[0], local_name="archive/data.pkX")),
    "other place": _archive(lambda records, marker: _set(records[1], entry={42: ("L", 0)})),
    "zip64 field": _archive(lambda records, marker: _set(records[0], entry_extra=b"\1\0\x08\0" + bytes(8))),
    "TorchScript": _archive(lambda records, marker: records.append(Record("archive/constants.pkl", b"\x80\x02)."))),
}


def _link_out(name: str) -> Plant:
    def plant(directory: Path, marker: Path) -> None:
        outside = marker.parent / "outside"
        shutil.copyfile(directory / name, outside)
        (directory / name).unlink()
        (directory / name).symlink_to(outside)

    return plant


def _linked_folder(directory: Path, marker: Path) -> None:
    outside = marker.parent / "outside_folder"
    directory.rename(outside)
    directory.symlink_to(outside)


def _pipe(name: str) -> Plant:
    def plant(directory: Path, marker: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return plant


def _device(directory: Path, marker: Path) -> None:
    (directory / ".metadata").unlink()
    (directory / ".metadata").symlink_to("/dev/zero")


def _tracker_pipe(directory: Path, marker: Path) -> None:
    _pipe(TRACKER)(directory.parent, marker)


def _tracker_link(directory: Path, marker: Path) -> None:
    (directory.parent / TRACKER).unlink()
    (directory.parent / TRACKER).symlink_to("/dev/zero")


def _large_metadata(directory: Path, marker: Path) -> None:
    with open(directory / ".metadata", "r+b") as stream:
        stream.truncate(1 << 42)


def _large_json(directory: Path, marker: Path) -> None:
    with open(directory / "metadata.json", "r+b") as stream:
        stream.truncate(1 << 40)


def _loose(directory: Path, marker: Path) -> None:
    for path in directory.iterdir():
        if path.is_file():
            shutil.copyfile(path, directory.parent / path.name)
    _in_metadata(directory, marker)


def _loose_ranks(directory: Path, marker: Path) -> None:
    file_of("mp_rank_00/model_optim_rng.pt", evil_archive)(directory.parent, marker)


def _fallback(directory: Path, marker: Path) -> None:
    (directory / "__0.metadata").write_bytes(pickle.dumps(Touch(marker)))
    _metadata_with(directory, call_of("torch.distributed.checkpoint.planner", "WriteItemType", b"K\x63"))


def _escape(directory: Path, marker: Path) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../../outside"
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _huge_tensor(directory: Path, marker: Path) -> None:
    """A tensor of a terabyte over a storage of four bytes: stride 0."""
    replace_object(directory, COMMON_STATE, saved([{"x": torch.zeros(1).expand(1 << 40)}]))


FILES: dict[str, Plant] = {
    "fallback metadata": _fallback,
    "metadata of another rank": file_of("__3.metadata"),
    "unknown .pt": file_of("more.pt", evil_archive),
    "unknown .pkl": file_of("more.pkl"),
    "unknown .bin": file_of("pytorch_model.bin", evil_archive),
    "a library": file_of("helpers.so"),
    "a program": file_of("modeling.py"),
    "a state of modelopt": file_of("modelopt_state/state.pt", evil_archive),
    "ranks beside torch_dist": file_of("mp_rank_00/model_optim_rng.pt", evil_archive),
    "a hidden pickle": file_of("hugging_face/.more/x.pkl"),
    "loose files beside the tracker": _loose,
    "loose ranks beside the tracker": _loose_ranks,
    "link of .metadata": _link_out(".metadata"),
    "link of metadata.json": _link_out("metadata.json"),
    "link of data": _link_out("__0_0.distcp"),
    "link of the folder": _linked_folder,
    "pipe as .metadata": _pipe(".metadata"),
    "pipe as metadata.json": _pipe("metadata.json"),
    "pipe as data": _pipe("__0_0.distcp"),
    "pipe as common.pt": _pipe("common.pt"),
    "pipe as the manifest": _pipe("manifest.json"),
    "pipe as the tracker": _tracker_pipe,
    "a device as .metadata": _device,
    "a device as the tracker": _tracker_link,
    "a tebibyte of .metadata": _large_metadata,
    "a tebibyte of metadata.json": _large_json,
    "a path out of the folder": _escape,
    "a tensor of a terabyte": _huge_tensor,
}

PLACES: dict[str, Plant] = {
    "in .metadata": _in_metadata,
    "in common.pt": file_of("common.pt", evil_archive),
    "in saved arguments": _object(COMMON_STATE, lambda marker: [{"args": Namespace(x=Touch(marker))}]),
    "in an extra state": _object(EXTRA_STATE, lambda marker: [Touch(marker)]),
    "in the bytes of an extra state": _object(EXTRA_STATE, lambda marker: [_bytes_tensor(marker)]),
    "in a file in an extra state": _object(EXTRA_STATE, lambda marker: [_stream_of(saved(Touch(marker)))]),
    "in a pickle in an extra state": _object(EXTRA_STATE, lambda marker: [_stream_of(pickle.dumps(Touch(marker)))]),
    "in a weight": _object(WEIGHT, Touch),
    "beside a weight": _object(WEIGHT, lambda marker: [torch.zeros(32), Touch(marker)]),
    "in the random state": _added_object("rng_state/shard_0.0_1.1"),
    "in the rerun state": _added_object("rerun_state_machine_state/shard_0_1"),
    "in the optimizer": _added_object("optimizer.state.exp_avg/shard_0_1"),
}


def kinds() -> dict[str, Plant]:
    """Every kind for ``torch_dist``, by name."""
    nowhere = Path("nowhere")
    found = {f"command: {name}": _in_common_state(_stream(commands, name)) for name in commands(nowhere)}
    found |= {f"bomb: {name}": _in_common_state(lambda _, stream=stream: stream) for name, stream in bombs().items()}
    parts = (("place", PLACES), ("archive", ARCHIVES), ("file", FILES))
    return found | {f"{part}: {name}": plant for part, plants in parts for name, plant in plants.items()}


def _stream(streams: Callable[[Path], dict[str, bytes]], name: str) -> Callable[[Path], bytes]:
    return lambda marker: streams(marker)[name]
