"""What cannot fit is refused before anything is written."""

import json

import pytest

from megatron_dmc.cli import main
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.recipes.estimate import Estimate, estimate, refuse_what_cannot_fit
from megatron_dmc.recipes.recipe import SMALL_LLAMA, user_model_recipe

LLAMA_2_7B = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_hidden_size=11008,
    vocab_size=32000,
    max_position_embeddings=4096,
)


def test_needs_grow_with_the_model():
    small, large = (estimate(config, user_model_recipe(), 1e11) for config in (SMALL_LLAMA, LLAMA_2_7B))
    assert small.memory_bytes < 4e9
    assert 100e9 < large.memory_bytes < 200e9
    assert large.seconds > 1000 * small.seconds


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        (Estimate(1e15, 1, 1), "1000.0 TB of memory, free are"),
        (Estimate(1, 1e15, 1), "1000.0 TB of disk, free are"),
        (Estimate(1, 1, 8000), "about 2 h 13 min, --max-hours allows 2"),
    ],
)
def test_refusals_name_need_and_limit(tmp_path, needed, message):
    with pytest.raises(ValueError, match=message):
        refuse_what_cannot_fit(needed, tmp_path / "run", max_hours=2)


def test_a_model_that_fits(tmp_path):
    refuse_what_cannot_fit(Estimate(1e6, 1e6, 10), tmp_path / "run", max_hours=2)


def test_a_70b_model_is_refused_by_the_command(tmp_path, capsys):
    huge = {**to_hf_config(LLAMA_2_7B, None), "num_hidden_layers": 800}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(huge))
    code = main(["quickstart", "--hf-model", str(tmp_path / "model"), "--output", str(tmp_path / "run")])
    assert code == 1
    assert "launch/README.md" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
