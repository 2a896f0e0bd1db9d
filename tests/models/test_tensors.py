"""The table against the names that transformers and Megatron really use."""

import dataclasses

import pytest
import torch

from megatron_dmc.models.families import FAMILIES
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.models.tensors import EXTRA_STATE_MODULES, ROWS, by_hf_name, check_names, entries
from tests.checkpoints_convert.models import TINY, VARIANTS


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_transformers_names_and_shapes(variant):
    transformers = pytest.importorskip("transformers")
    config = VARIANTS[variant]
    settings = {name: value for name, value in to_hf_config(config).items() if name != "architectures"}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = {name: entry.hf_shapes(config)[place] for name, (entry, place) in by_hf_name(config).items()}
    assert ours == theirs
    assert config.num_parameters == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_family_names_every_tensor_of_its_block_once(family):
    roles = {part.role for row in ROWS if row.flag is None or getattr(family, row.flag, False) for part in row.parts}
    assert family.tensor_names.keys() == roles
    assert len(set(family.tensor_names.values())) == len(roles)
    assert FAMILIES[family.name].name == family.name


def test_an_adapter_lies_beside_the_queries():
    names = by_hf_name(dataclasses.replace(TINY, adapter=True))
    assert [name for name in names if "dms" in name][:2] == [
        "model.layers.0.self_attn.dms_proj_alpha_norm.weight",
        "model.layers.0.self_attn.dms_proj_alpha.weight",
    ]
    entry, _ = names["model.layers.3.self_attn.dms_proj_alpha.weight"]
    assert entry.megatron_name == "decoder.layers.3.self_attention.decision.weight"
    assert entry.hf_shapes(TINY) == ((TINY.num_kv_heads, TINY.hidden_size),)
    assert len(names) == len(by_hf_name(TINY)) + 2 * TINY.num_layers


def test_every_module_with_an_extra_state_has_tensors():
    assert len({row.megatron for row in ROWS}) == len(ROWS)
    assert all(any(row.megatron.startswith(module) for row in ROWS) for module in EXTRA_STATE_MODULES)


def test_entries_come_in_the_order_of_the_forward_pass():
    names = [entry.megatron_name for entry in entries(TINY)]
    assert names[0] == "embedding.word_embeddings.weight"
    assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]
    layers = [entry.layer for entry in entries(TINY) if entry.layer is not None]
    assert layers == sorted(layers)
    assert len(names) == len(set(names))


def test_differences_are_told_by_name():
    with pytest.raises(ValueError, match="lacks a, b and has unknown d"):
        check_names(["c", "d"], ["a", "b", "c"], "it")
    with pytest.raises(ValueError, match="and 95 more"):
        check_names([], [f"name{number:03d}" for number in range(100)], "it")
    check_names(["a"], ["a"], "it")
