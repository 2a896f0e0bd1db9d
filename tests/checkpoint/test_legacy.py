"""The legacy layout: ranks, model chunks and names become those of the whole model."""

import shutil

import pytest
import torch

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_writer import MegatronLayout
from checkpoints_convert.options import Options
from megatron_dmc.checkpoint.legacy import LegacyCheckpoint
from tests.checkpoints_convert.models import TINY, VARIANTS, write_model


def test_every_layer_once_under_its_own_number(legacy):
    tensors = LegacyCheckpoint(legacy).tensors()
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers.")}
    assert layers == set(range(TINY.num_layers))
    assert {len(shards) for shards in tensors.values()} == {2}


def test_virtual_stages_are_dealt_in_turn(tmp_path):
    """Two pipeline ranks with two chunks each: rank 0 holds layers 0 and 2, rank 1 layers 1 and 3."""
    layout = MegatronLayout("torch", 1, 2, 1)
    import_checkpoint(write_model(tmp_path / "hf"), tmp_path / "m", layout=layout, options=Options(verify=False))
    state = torch.load(tmp_path / "m" / "release" / "mp_rank_00_000" / "model_optim_rng.pt", weights_only=False)
    assert {"model0", "model1"} <= state.keys()
    assert state["args"].virtual_pipeline_model_parallel_size == 2
    whole = LegacyCheckpoint(tmp_path / "m" / "release")
    assert whole.virtual_size == 2
    name = "self_attention.linear_proj.weight"
    second_chunk = state["model1"][f"decoder.layers.0.{name}"]
    assert torch.equal(second_chunk, whole.tensors()[f"decoder.layers.2.{name}"][0].read())


def test_a_tied_embedding_is_kept_once(tmp_path):
    layout = MegatronLayout("torch", 1, 2)
    source = write_model(tmp_path / "hf", VARIANTS["tied"])
    import_checkpoint(source, tmp_path / "m", layout=layout, options=Options(verify=False))
    last = torch.load(tmp_path / "m" / "release" / "mp_rank_00_001" / "model_optim_rng.pt", weights_only=False)
    assert "output_layer.weight" in last["model"]
    assert "output_layer.weight" not in LegacyCheckpoint(tmp_path / "m" / "release").tensors()


def test_a_missing_rank_is_named(legacy):
    shutil.rmtree(legacy / "mp_rank_01_000")
    with pytest.raises(ValueError, match="mp_rank_01_000"):
        LegacyCheckpoint(legacy)


def test_ranks_that_differ_in_names(legacy):
    path = legacy / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    del state["model"]["decoder.final_layernorm.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match="differ in names"):
        LegacyCheckpoint(legacy).tensors()


def test_entries_that_are_no_tensors(legacy):
    path = legacy / "mp_rank_00_000" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "model": {"embedding.word_embeddings.weight": [1]}}, path)
    with pytest.raises(ValueError, match="is a list"):
        LegacyCheckpoint(legacy).tensors()
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds no model"):
        LegacyCheckpoint(legacy).tensors()


def test_no_ranks_at_all(tmp_path):
    with pytest.raises(ValueError, match="mp_rank"):
        LegacyCheckpoint(tmp_path)
