"""Exactly the rows of the channels become zero that the method borrows."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.training.model.borrowed_rows import clear_borrowed_rows

GROUPS, QUERIES, HEAD_DIM, HIDDEN = 2, 3, 4, 5
NORMS = ("q_layernorm", "k_layernorm")
DMC = DMCConfig()


def fused_linear(bias):
    rows = GROUPS * (QUERIES + 2) * HEAD_DIM
    linear = SimpleNamespace(weight=torch.nn.Parameter(torch.ones(rows, HIDDEN)))
    linear.bias = torch.nn.Parameter(torch.ones(rows)) if bias else None
    return linear


def model_of(*linears, norm=False, settings=DMC):
    config = SimpleNamespace(
        num_attention_heads=GROUPS * QUERIES,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        qk_layernorm=norm,
        dmc=settings,
    )
    norms = {name: SimpleNamespace(weight=torch.nn.Parameter(torch.full((HEAD_DIM,), 0.5))) for name in NORMS if norm}
    layers = [SimpleNamespace(self_attention=SimpleNamespace(linear_qkv=linear, **norms)) for linear in linears]
    return SimpleNamespace(config=config, decoder=SimpleNamespace(layers=layers))


def test_last_channels_of_queries_and_keys_are_cleared():
    linears = [fused_linear(bias=True), fused_linear(bias=False)]
    clear_borrowed_rows(model_of(*linears))
    # Per group: three query heads and the key head end with a cleared row, the value head keeps all of its own.
    kept = ([1.0] * 3 + [0.0]) * (QUERIES + 1) + [1.0] * 4
    for linear in linears:
        assert linear.weight[:, 0].tolist() == kept * GROUPS
        assert (linear.weight == linear.weight[:, :1]).all()
    assert linears[0].bias.tolist() == kept * GROUPS


@pytest.mark.parametrize("norm", [False, True])
def test_eviction_borrows_of_the_first_query_head_of_each_group(norm):
    """A norm that its heads share stays as it is."""
    model = model_of(fused_linear(bias=False), norm=norm, settings=DMCConfig("dms"))
    clear_borrowed_rows(model)
    attention = model.decoder.layers[0].self_attention
    kept = [1.0] * 3 + [0.0] + [1.0] * 4 * (QUERIES + 1)
    assert attention.linear_qkv.weight[:, 0].tolist() == kept * GROUPS
    assert all((getattr(attention, name).weight == 0.5).all() for name in NORMS if norm)


def test_nothing_is_cleared_where_an_adapter_decides():
    model = model_of(fused_linear(bias=False), settings=DMCConfig("dms", decision_source="adapter"))
    clear_borrowed_rows(model)
    assert (model.decoder.layers[0].self_attention.linear_qkv.weight == 1).all()


def test_a_norm_behind_the_rows_lets_the_channel_learn():
    """With the row at zero its gradient is a multiple of the norm's weight, which must therefore not be zero."""
    model = model_of(fused_linear(bias=False), norm=True)
    clear_borrowed_rows(model)
    attention = model.decoder.layers[0].self_attention
    for name in NORMS:
        assert getattr(attention, name).weight.tolist() == [0.5] * (HEAD_DIM - 1) + [1.0]
    row = attention.linear_qkv.weight[:HEAD_DIM] @ torch.ones(HIDDEN)
    normed = torch.nn.functional.rms_norm(row, (HEAD_DIM,), attention.q_layernorm.weight)
    assert normed[-1] == 0
    normed[-1].backward()
    assert (attention.linear_qkv.weight.grad[HEAD_DIM - 1] != 0).all()
