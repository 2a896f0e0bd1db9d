"""The GQA baseline: K and V heads averaged in groups."""

import dataclasses

import pytest
import torch

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.merge_kv_heads import merge_kv_heads
from checkpoints_convert.options import Options
from megatron_dmc.checkpoint.source import HuggingFaceSource, MegatronSource, open_source
from megatron_dmc.config import DMCConfig
from tests.checkpoints_convert.models import TINY, VARIANTS, write_model

UNVERIFIED = Options(verify=False)
FOUR_HEADS = VARIANTS["mha"]
WITH_BIASES = dataclasses.replace(VARIANTS["qwen2"], num_kv_heads=4, head_dim=8)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", ["hugging_face", "megatron"])
@pytest.mark.parametrize("config", [FOUR_HEADS, WITH_BIASES], ids=["llama", "qwen2"])
def test_heads_are_averages_of_their_neighbours(tmp_path, groups, kind, config):
    source = write_model(tmp_path / "hf", config)
    if kind == "megatron":
        import_checkpoint(source, tmp_path / "m", options=UNVERIFIED)
    merge_kv_heads(source if kind == "hugging_face" else tmp_path / "m", tmp_path / "out", num_kv_heads=groups)
    before, after = open_source(source), open_source(tmp_path / "out")
    assert isinstance(after, HuggingFaceSource if kind == "hugging_face" else MegatronSource)
    assert after.config == dataclasses.replace(config, num_kv_heads=groups)
    for name in before.names():
        expected = before.tensor(name)
        if "k_proj" in name or "v_proj" in name:
            expected = expected.view(groups, 4 // groups, 8, *expected.shape[1:]).mean(1).flatten(0, 1)
        assert torch.allclose(after.tensor(name), expected, atol=1e-6), name


def test_merging_into_as_many_heads_changes_nothing(tmp_path):
    source = write_model(tmp_path / "hf", dataclasses.replace(FOUR_HEADS, dtype="bfloat16"))
    merge_kv_heads(source, tmp_path / "out", num_kv_heads=4)
    before, after = open_source(source), open_source(tmp_path / "out")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.names())


@pytest.mark.parametrize("groups", [0, 3, 8])
def test_numbers_that_do_not_divide(tmp_path, groups):
    source = write_model(tmp_path / "hf", FOUR_HEADS)
    with pytest.raises(ValueError, match="must divide the 4 KV heads"):
        merge_kv_heads(source, tmp_path / "out", num_kv_heads=groups)


def test_a_retrofitted_model_is_refused(tmp_path):
    source = write_model(tmp_path / "hf", TINY, DMCConfig())
    with pytest.raises(ValueError, match="stage retrofit"):
        merge_kv_heads(source, tmp_path / "out", num_kv_heads=1)
