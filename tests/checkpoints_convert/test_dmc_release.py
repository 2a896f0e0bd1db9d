"""NVIDIA's published DMC checkpoints: files of exactly that layout become ours."""

import io
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from checkpoints_convert.dmc_branch_to_megatron import import_dmc_release, release_settings
from checkpoints_convert.options import Options
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.models.hugging_face import parse_hf_config
from megatron_dmc.models.tensors import EXTRA_STATE_MODULES, entries
from tests.checkpoint.test_guard import Shell
from tests.checkpoints_convert.models import random_tensors

UNVERIFIED = Options(verify=False)
SMALL_LLAMA2 = ModelConfig(32, 2, 4, 4, 8, 48, 32000, 4096, 1e-5, dtype="bfloat16")


def _write_release(directory: Path, config: ModelConfig = SMALL_LLAMA2) -> Path:
    """One rank, bfloat16, names of Transformer Engine with its states as file objects, arguments of early 2024."""
    tensors = random_tensors(config)
    shape = MegatronShape(config, config.vocab_size)
    model = {}
    for entry in entries(config):
        model[entry.megatron_name] = entry.row.layout.fuse([tensors[name] for name in entry.hf_names], shape)
    for layer in range(config.num_layers):
        for module in (*EXTRA_STATE_MODULES, "decoder.layers.*.self_attention.core_attention"):
            model[f"{module.replace('*', str(layer))}._extra_state"] = io.BytesIO()
    arguments = Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        kv_channels=config.head_dim,
        group_query_attention=False,
        num_query_groups=1,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        position_embedding_type="rope",
        rotary_percent=1.0,
        add_bias_linear=False,
        swiglu=True,
        normalization="RMSNorm",
        untie_embeddings_and_output_weights=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        padded_vocab_size=config.vocab_size,
    )
    state = {"args": arguments, "checkpoint_version": 3.0, "iteration": 2000, "model": model}
    (directory / "mp_rank_00").mkdir(parents=True)
    torch.save(state, directory / "mp_rank_00" / "model_optim_rng.pt")
    return directory


@pytest.mark.parametrize("place", ["root", "iteration"])
def test_a_release_becomes_both_formats(tmp_path, place):
    root = tmp_path / "Llama-2-7B-DMC-8x"
    _write_release(root if place == "root" else root / "iter_0002000")
    (root / "latest_checkpointed_iteration.txt").write_text("2000")
    import_dmc_release(root, tmp_path / "out", target_cr=8, options=UNVERIFIED)
    expected = random_tensors(SMALL_LLAMA2)
    for folder in ("megatron", "hugging_face"):
        source = open_source(tmp_path / "out" / folder)
        assert source.config == SMALL_LLAMA2
        assert source.dmc == release_settings(8.0)
        for name in source.names():
            assert torch.equal(source.tensor(name), expected[name]), name
    _, dmc = parse_hf_config(tmp_path / "out" / "hugging_face")
    published = (dmc.window_size, dmc.decision_bias, dmc.decision_threshold, dmc.importance_epsilon)
    assert published == (12, 5.0, 0.0078125, 0.0078125)


def test_another_layout_is_refused(tmp_path):
    (tmp_path / "release").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        import_dmc_release(tmp_path / "release", tmp_path / "out", target_cr=8, options=UNVERIFIED)


def test_a_call_in_a_release_is_refused_and_not_made(tmp_path):
    root = _write_release(tmp_path / "release")
    path, marker = root / "mp_rank_00" / "model_optim_rng.pt", tmp_path / "marker"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "rng_state": Shell(marker)}, path)
    with pytest.raises(ValueError, match="system"):
        import_dmc_release(root, tmp_path / "out", target_cr=8, options=UNVERIFIED)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_release_that_is_another_model_is_refused(tmp_path):
    root = _write_release(tmp_path / "release")
    path = root / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["args"].normalization = "LayerNorm"
    torch.save(state, path)
    with pytest.raises(ValueError, match=re.escape("normalization='LayerNorm'")):
        import_dmc_release(root, tmp_path / "out", target_cr=8, options=UNVERIFIED)
