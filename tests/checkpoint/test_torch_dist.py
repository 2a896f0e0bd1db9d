"""``torch_dist`` checkpoints: what torch's writer cut is put together again; lies in the metadata are refused."""

import copy
import dataclasses
import io
import json
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from megatron_dmc.checkpoint.torch_dist import COMMON_STATE_KEY, TorchDistCheckpoint

QKV = "decoder.layers.self_attention.linear_qkv.weight"


def _rewrite(directory, change) -> None:
    """Unpickle the metadata of our own file, change it, write it back."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def _index_of(metadata, name):
    return next(index for index in metadata.storage_data if index.fqn == name)


def test_torch_reads_the_same(torch_dist):
    ours = TorchDistCheckpoint(torch_dist)
    theirs = FileSystemReader(torch_dist).read_metadata()
    assert ours.tensors.keys() | ours.objects.keys() == theirs.state_dict_metadata.keys()
    state = {name: torch.empty(tensor.shape, dtype=tensor.element_type.dtype) for name, tensor in ours.tensors.items()}
    torch.distributed.checkpoint.load(state, storage_reader=FileSystemReader(torch_dist), no_dist=True)
    for name, tensor in state.items():
        assert torch.equal(ours.read(name), tensor)
    assert torch.equal(ours.read(QKV, 3), state[QKV][3])


def _split_first_chunk(metadata, directory, rows: int) -> None:
    """Cut one chunk in two, as another tensor parallel size would."""
    tensor = metadata.state_dict_metadata[QKV]
    chunk = tensor.chunks[0]
    whole = TorchDistCheckpoint(directory).read(QKV, 0)[None]
    stream = io.BytesIO()
    tensor.chunks[0] = ChunkStorageMetadata(chunk.offsets, torch.Size((1, rows, whole.shape[2])))
    tensor.chunks.append(
        ChunkStorageMetadata(torch.Size((0, rows, 0)), torch.Size((1, whole.shape[1] - rows, whole.shape[2])))
    )
    infos = []
    for part in (whole[:, :rows], whole[:, rows:]):
        start = stream.tell()
        torch.save(part.clone(), stream)
        infos.append((start, stream.tell() - start))
    (directory / "__1_0.distcp").write_bytes(stream.getvalue())
    index = next(i for i in metadata.storage_data if i.fqn == QKV and i.offset == chunk.offsets)
    info = metadata.storage_data[index]
    for offset, (start, length) in zip((chunk.offsets, torch.Size((0, rows, 0))), infos, strict=True):
        metadata.storage_data[MetadataIndex(QKV, offset)] = dataclasses.replace(
            info, relative_path="__1_0.distcp", offset=start, length=length
        )


def test_chunks_of_any_cut_are_joined(torch_dist):
    before = TorchDistCheckpoint(torch_dist).read(QKV)
    _rewrite(torch_dist, lambda metadata: _split_first_chunk(metadata, torch_dist, 20))
    assert torch.equal(TorchDistCheckpoint(torch_dist).read(QKV), before)
    assert torch.equal(TorchDistCheckpoint(torch_dist).read(QKV, 0), before[0])


# Changes of the metadata: each gets the metadata, the tensor, a chunk of it and where that chunk is stored.
def _overlap(metadata, tensor, chunk, info):
    metadata.storage_data[MetadataIndex(QKV, torch.Size((1, 1, 0)))] = copy.copy(info)
    tensor.chunks.append(ChunkStorageMetadata(torch.Size((1, 1, 0)), torch.Size((1, *chunk.sizes[1:]))))


def _beyond(metadata, tensor, chunk, info):
    chunk.sizes = torch.Size((1, chunk.sizes[1] + 1, chunk.sizes[2]))


def _hole(metadata, tensor, chunk, info):
    chunk.sizes = torch.Size((1, chunk.sizes[1] - 1, chunk.sizes[2]))


def _another_tensor(metadata, tensor, chunk, info):
    other = metadata.storage_data[_index_of(metadata, "decoder.final_layernorm.weight")]
    info.relative_path, info.offset, info.length = other.relative_path, other.offset, other.length


def _past_the_end(metadata, tensor, chunk, info):
    info.offset += 1 << 40


def _negative_offset(metadata, tensor, chunk, info):
    info.offset = -1


def _escape(metadata, tensor, chunk, info):
    info.relative_path = "../../hf/model.safetensors"


def _absent_file(metadata, tensor, chunk, info):
    info.relative_path = "__9_0.distcp"


def _transformed(metadata, tensor, chunk, info):
    info.transform_descriptors = ["zstd"]


def _no_data(metadata, tensor, chunk, info):
    del metadata.storage_data[_index_of(metadata, QKV)]


def _unlisted(metadata, tensor, chunk, info):
    metadata.storage_data[MetadataIndex("nobody")] = info


def _sizes_that_are_none(metadata, tensor, chunk, info):
    tensor.size = "4"


def _not_a_tensor(metadata, tensor, chunk, info):
    metadata.state_dict_metadata[QKV] = 4


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        (_overlap, "overlap|exceeds"),
        (_beyond, "exceeds"),
        (_hole, "cover|does not hold"),
        (_another_tensor, "does not hold"),
        (_past_the_end, "truncated"),
        (_negative_offset, "_StorageInfo"),
        (_escape, "_StorageInfo"),
        (_absent_file, "missing"),
        (_transformed, "_StorageInfo"),
        (_no_data, "no data"),
        (_unlisted, "nobody"),
        (_sizes_that_are_none, "damaged"),
        (_not_a_tensor, "damaged"),
    ],
)
def test_metadata_that_lies_is_refused(torch_dist, lie, told):
    def change(metadata):
        tensor = metadata.state_dict_metadata[QKV]
        lie(metadata, tensor, tensor.chunks[1], metadata.storage_data[_index_of(metadata, QKV)])

    _rewrite(torch_dist, change)
    with pytest.raises(ValueError, match=told):
        _read_all(torch_dist)


def _read_all(directory) -> None:
    checkpoint = TorchDistCheckpoint(directory)
    for layer in range(4):
        checkpoint.read(QKV, layer)


def test_a_call_in_the_metadata_is_refused_and_not_made(torch_dist):
    marker = torch_dist / "marker"

    class Shell:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    def plant(metadata):
        metadata.planner_data = Shell()

    _rewrite(torch_dist, plant)
    with pytest.raises(ValueError, match="system"):
        TorchDistCheckpoint(torch_dist)
    assert not marker.exists()


def test_the_common_state_of_older_releases(torch_dist):
    state = TorchDistCheckpoint(torch_dist).objects[COMMON_STATE_KEY].open()[0]
    torch.save({"iteration": 7, "args": None}, torch_dist / "common.pt")
    assert TorchDistCheckpoint(torch_dist).common_state()["iteration"] == 7
    assert state["iteration"] == 0


def test_another_backend_is_named(torch_dist):
    (torch_dist / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(ValueError, match="zarr"):
        TorchDistCheckpoint(torch_dist)


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_truncated_data_file_is_told(torch_dist, share):
    path = torch_dist / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="truncated"):
        TorchDistCheckpoint(torch_dist)
