"""The refusal of a model names everything that must change."""

from types import SimpleNamespace

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.megatron import ALL_SETTINGS
from megatron_dmc.training.model.requirements import OFF, check_model_config

NOT_WITH_A_TEACHER = ("defer_embedding_wgrad_compute", "fine_grained_activation_offloading")


def model_config(**changes):
    """What Megatron's configuration of a Llama says."""
    fixed = {setting.attribute: setting.default for setting in ALL_SETTINGS if setting.remedy}
    others = {
        "attention_backend": SimpleNamespace(name="auto"),
        "cuda_graph_impl": "none",
        "num_query_groups": 8,
        "tensor_model_parallel_size": 4,
        "kv_channels": 128,
        "dmc": DMCConfig(),
        **dict.fromkeys(NOT_WITH_A_TEACHER, False),
    }
    return SimpleNamespace(**dict.fromkeys(OFF), **fixed | others | changes)


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


def test_a_setting_that_this_megatron_does_not_have_is_no_setting_that_is_off():
    config = model_config()
    del config.qk_clip
    with pytest.raises(ValueError, match="no qk_clip: install"):
        check_model_config(config)


@pytest.mark.parametrize("head_dim", [14, 17])
def test_head_dimension(head_dim):
    with pytest.raises(ValueError, match=f"kv_channels={head_dim}: the head dimension must be even and at least 16"):
        check_model_config(model_config(kv_channels=head_dim))


@pytest.mark.parametrize("field", NOT_WITH_A_TEACHER)
def test_what_cannot_run_twice_is_refused_beside_a_teacher(field):
    check_model_config(model_config(**{field: True}))
    with pytest.raises(ValueError, match=f"{field}=True with dmc_distill='reverse'"):
        check_model_config(model_config(dmc=DMCConfig(distill="reverse"), **{field: True}))
