"""The refusal of a model names everything that must change."""

from types import SimpleNamespace

import pytest

from megatron_dmc.training.model.requirements import check_model_config


def model_config(**changes):
    """What Megatron's configuration of a Llama says; any other setting is off."""
    settings = {
        "attention_backend": SimpleNamespace(name="auto"),
        "cuda_graph_impl": "none",
        "softmax_type": "vanilla",
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "attention_dropout": 0.0,
        "normalization": "RMSNorm",
        "num_query_groups": 8,
        "tensor_model_parallel_size": 4,
        "kv_channels": 128,
    }
    return SimpleNamespace(**settings | changes)


def test_a_llama_is_accepted():
    check_model_config(model_config())


def test_every_unmet_requirement_is_named_with_its_remedy():
    with pytest.raises(ValueError, match="cannot be compressed") as refusal:
        check_model_config(model_config(window_size=(128, 0), tensor_model_parallel_size=16, attention_dropout=0.1))
    lines = str(refusal.value).splitlines()
    assert len(lines) == 4
    assert "window_size=(128, 0)" in lines[1]
    assert "remove --window-size" in lines[1]
    assert "attention_dropout=0.1: use --attention-dropout 0" in lines[2]
    assert "tensor_model_parallel_size=16 with 8 KV heads" in lines[3]


@pytest.mark.parametrize("head_dim", [14, 17])
def test_head_dimension(head_dim):
    with pytest.raises(ValueError, match=f"kv_channels={head_dim}: the head dimension must be even and at least 16"):
        check_model_config(model_config(kv_channels=head_dim))
