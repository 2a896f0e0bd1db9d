"""What a Hugging Face directory may look like: which weights count, what is passed over, and that it is told."""

import json
import os
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dmc.checkpoint.hf_directory import HuggingFaceDirectory
from megatron_dmc.checkpoint.source import open_source
from tests.checkpoints_convert.models import TINY, VARIANTS, random_tensors, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_shards(directory, tensors, listed=(), pickled=False, link_to=None):
    """Two shards with their index; ``link_to``: they lie there, and links stand in the directory."""
    names = list(tensors)
    weight_map = {}
    suffix, base = (".bin", "pytorch_model") if pickled else (".safetensors", "model")
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file_name = f"{base}-{number:05d}-of-00002{suffix}"
        target = (link_to or directory) / (file_name if link_to is None else f"blob{number}")
        content = {name: tensors[name] for name in part}
        torch.save(content, target) if pickled else save_file(content, target)
        if link_to is not None:
            (directory / file_name).symlink_to(target)
        weight_map |= dict.fromkeys(part, file_name)
    weight_map |= dict.fromkeys(listed, file_name)
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    (directory / index).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def directory(tmp_path):
    """A model without its weights."""
    path = write_model(tmp_path / "hf")
    (path / "model.safetensors").unlink()
    return path


def holds(directory, tensors):
    source = open_source(directory)
    return all(torch.equal(source.tensor(name), tensors[name].to(torch.float32)) for name in source.names())


TENSORS = random_tensors(TINY)


def test_one_file_counts_before_an_index_as_in_transformers(directory, capsys):
    write_shards(directory, random_tensors(TINY, seed=1))
    save_file(TENSORS, directory / "model.safetensors")
    assert holds(directory, TENSORS)
    told = capsys.readouterr().err
    assert "the weights of model.safetensors are read, as transformers does, not those of model.safetensors.ind" in told


def test_safetensors_count_before_pickles(directory):
    write_shards(directory, TENSORS)
    torch.save(random_tensors(TINY, seed=1), directory / "pytorch_model.bin")
    (note,) = HuggingFaceDirectory(directory).notes
    assert "not those of pytorch_model.bin" in note
    assert holds(directory, TENSORS)


def test_transformers_takes_the_same_set(directory):
    transformers = pytest.importorskip("transformers")
    write_shards(directory, random_tensors(TINY, seed=1))
    save_file(TENSORS, directory / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory)
    assert torch.equal(theirs.state_dict()[EMBEDDING], open_source(directory).tensor(EMBEDDING))


def test_an_adapter_is_no_model(directory):
    save_file(TENSORS, directory / "model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge the adapter"):
        HuggingFaceDirectory(directory)


def test_no_weights_at_all_names_what_is_read(directory):
    with pytest.raises(ValueError, match=r"model\.safetensors, .*pytorch_model\.bin"):
        HuggingFaceDirectory(directory)


DERIVED = [
    f"model.layers.{layer}.self_attn.rotary_emb.{name}" for layer in (0, 1) for name in ("inv_freq", "cos_cached")
]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_derivable_buffers_may_be_listed_or_stored(directory, stored, listed):
    extra = {name: torch.ones(4) for name in [*DERIVED, "model.rotary_emb.inv_freq"]}
    write_shards(directory, TENSORS | extra if stored else TENSORS, listed=extra if listed else ())
    assert holds(directory, TENSORS)
    assert any("5 stored buffers" in note for note in HuggingFaceDirectory(directory).notes) == stored


def test_stored_buffers_that_no_index_lists(directory):
    write_shards(directory, TENSORS | {name: torch.ones(4) for name in DERIVED})
    path = directory / "model.safetensors.index.json"
    listed = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": {name: listed[name] for name in TENSORS}}))
    assert holds(directory, TENSORS)


@pytest.mark.parametrize("cache", ["models--org--name/blobs", "anywhere"])
def test_links_that_the_owner_of_a_folder_made(directory, tmp_path, cache):
    (tmp_path / cache).mkdir(parents=True)
    write_shards(directory, TENSORS, link_to=tmp_path / cache)
    assert holds(directory, TENSORS)
    assert [note for note in HuggingFaceDirectory(directory).notes if "is a link to" in note]


def test_the_hubs_own_cache_is_nothing_to_tell(tmp_path):
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / "abc"
    (home / "blobs").mkdir(parents=True)
    shutil.copytree(write_model(tmp_path / "hf"), snapshot)
    (snapshot / "model.safetensors").unlink()
    save_file(TENSORS, home / "blobs" / "sha")
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha")
    assert holds(snapshot, TENSORS)
    assert HuggingFaceDirectory(snapshot).notes == []


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", "sub/model.safetensors", "..", ""])
def test_an_index_does_not_lead_out_of_the_folder(directory, name):
    write_shards(directory, TENSORS)
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, name)}))
    with pytest.raises(ValueError, match="plain file names"):
        HuggingFaceDirectory(directory)


def test_a_pipe_is_refused_without_being_opened(directory):
    os.mkfifo(directory / "pipe")
    for name in ("model.safetensors", "pytorch_model.bin"):
        (directory / name).symlink_to(directory / "pipe")
        with pytest.raises(ValueError, match="not a regular file"):
            HuggingFaceDirectory(directory)
        (directory / name).unlink()


def _state_dict(tensors):
    state = OrderedDict((name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items())
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


@pytest.mark.parametrize("make", [dict, OrderedDict, _state_dict])
def test_pickled_weights_are_read_without_unpickling(directory, make):
    torch.save(make(TENSORS), directory / "pytorch_model.bin")
    assert holds(directory, TENSORS)


def test_pickled_shards(directory):
    write_shards(directory, TENSORS, listed=DERIVED, pickled=True)
    assert holds(directory, TENSORS)


class Shell:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(directory, tmp_path, place):
    content = TENSORS | {"x": Shell(tmp_path / "marker")} if place == "beside" else Shell(tmp_path / "marker")
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="system"):
        HuggingFaceDirectory(directory)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(("content", "told"), [([1], "mapping"), ({"model": {}}, "mapping"), ({"a": "b"}, "mapping")])
def test_a_pickle_that_is_no_model(directory, content, told):
    torch.save(content, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=told):
        HuggingFaceDirectory(directory)


def test_a_view_is_refused_before_anything_is_converted(directory):
    wide = torch.randn(64, 64)
    tensors = TENSORS | {"model.layers.0.self_attn.q_proj.weight": wide[:, ::2]}
    torch.save(tensors, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="view of another tensor"):
        HuggingFaceDirectory(directory)


@pytest.mark.parametrize("stated", ["bfloat16", "float32"])
def test_mixed_types_are_read_as_the_configuration_says(tmp_path, stated):
    path = write_model(tmp_path / "hf", VARIANTS["bf16"], torch_dtype=stated)
    tensors = {name: t.float() if "norm" in name else t for name, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors")
    source = open_source(path)
    assert source.config.dtype == stated
    for name in source.names():
        assert torch.equal(source.tensor(name), tensors[name].to(getattr(torch, stated)))
    assert any(f"all are read as {stated}" in note for note in source.files.notes)


def test_one_type_counts_more_than_what_the_configuration_states(tmp_path):
    path = write_model(tmp_path / "hf", torch_dtype="float16")
    assert open_source(path).config.dtype == "float32"


def test_a_type_that_is_not_supported(tmp_path):
    path = write_model(tmp_path / "hf")
    save_file({name: tensor.double() for name, tensor in TENSORS.items()}, path / "model.safetensors")
    with pytest.raises(ValueError, match="float64"):
        HuggingFaceDirectory(path)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_a_tied_tensor_may_have_either_name(tmp_path, name):
    path = write_model(tmp_path / "hf", VARIANTS["tied"])
    tensors = load_file(path / "model.safetensors")
    tied = tensors.pop(EMBEDDING)
    save_file(tensors | {name: tied}, path / "model.safetensors")
    source = open_source(path)
    assert torch.equal(source.tensor(EMBEDDING), tied)
    assert HEAD not in source.names()
    assert len(source.files.notes) == (name == HEAD)


def test_a_tied_head_that_differs_is_refused_with_what_to_do(tmp_path):
    path = write_model(tmp_path / "hf", VARIANTS["tied"])
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, path / "model.safetensors")
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        HuggingFaceDirectory(path)


def test_token_ids_are_checked_before_the_weights(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match="eos_token_id"):
        HuggingFaceDirectory(directory)


def test_minus_one_is_no_token(tmp_path):
    path = write_model(tmp_path / "hf", pad_token_id=-1)
    assert HuggingFaceDirectory(path).notes == ["config.json: pad_token_id=-1 stands for none"]


def test_a_byte_order_mark_and_carriage_returns(tmp_path):
    path = write_model(tmp_path / "hf")
    text = (path / "config.json").read_text().replace(", ", ",\r\n")
    (path / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert HuggingFaceDirectory(path).config == TINY
