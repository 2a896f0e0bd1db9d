"""The attention layer of training on one process: what it asks of a method, and what it reports.

Legend: S sequence, B batch, N query heads, G KV heads, D head dim.
"""

from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.methods import DMC, DMS, Dense
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.rope import inverse_frequencies
from megatron_dmc.training.model.attention import MethodCoreAttention
from megatron_dmc.training.model.microbatch import GradientScale, Microbatch

S, B, N, G, D, LAYERS = 24, 2, 4, 2, 16, 3
FREQUENCIES = inverse_frequencies(D, 10000.0)
GEOMETRY = Geometry(S, B, FREQUENCIES)


class OneRank:
    """A process group of this process, or what one rank of several sees of it."""

    def __init__(self, size=1, rank=0):
        self._size, self._rank = size, rank

    def size(self):
        return self._size

    def rank(self):
        return self._rank


ALONE = OneRank()


def layer(settings, tp=ALONE, per_token=False, layer_number=2):
    config = SimpleNamespace(
        dmc=settings, num_layers=LAYERS, num_query_groups=G * tp.size(), calculate_per_token_loss=per_token
    )
    return MethodCoreAttention(config, layer_number, SimpleNamespace(tp=tp, cp=ALONE))


def projections():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(S, B, N, D, generator=generator)
    k, v = torch.randn(2, S, B, G, D, generator=generator)
    k[..., -1] = 4 * k[..., -1] + 5
    return [x.requires_grad_() for x in (q, k, v)]


def microbatch(**given):
    return Microbatch(GEOMETRY, step=7, sequence_B=torch.tensor([10, 11]), **given)


@pytest.mark.parametrize("decisions_per", ["head", "layer"])
def test_it_is_the_method_and_counts_its_decisions(decisions_per):
    settings = DMCConfig(decisions_per=decisions_per)
    evaluated = Microbatch(GEOMETRY)
    q, k, v = projections()
    output = layer(settings)(q, k, v, None, attention_bias=evaluated)
    expected, decisions = DMC(settings).whole(q, k, v, GEOMETRY)
    assert torch.equal(output, expected.flatten(2))
    # Every head counts, and the first position with the decision that its logit takes.
    taken_B = decisions.of_heads(G).taken.sum(dim=(0, 2))
    assert torch.equal(evaluated.statistics.decided_B[2], taken_B)
    assert 0 < taken_B.min() < taken_B.max() < S * G


def test_zero_out_fades_and_decides_nothing():
    faded = microbatch(neuron_scale=0.3)
    q, k, v = projections()
    output = layer(DMCConfig(stage="zero_out"))(q, k, v, None, attention_bias=faded)
    assert torch.equal(output, Dense(0.3).whole(q, k, v, GEOMETRY).output.flatten(2))
    assert not faded.statistics.decided_B


@pytest.mark.parametrize("decided_by", ["own", "next"])
def test_the_output_of_an_adapter_comes_in_the_keys(decided_by):
    settings = DMCConfig("dms", decision_source="adapter", decided_by=decided_by, window_size=4)
    adapter_SBG = 0.05 + 0.1 * torch.randn(S, B, G, generator=torch.Generator().manual_seed(1))
    evaluated = Microbatch(GEOMETRY)
    q, k, v = projections()
    keys = torch.cat([k, adapter_SBG.unsqueeze(-1)], dim=-1)
    output = layer(settings)(q, keys, v, None, attention_bias=evaluated)
    expected, decisions = DMS(settings).whole(q, k, v, GEOMETRY, adapter_SBG=adapter_SBG)
    assert torch.equal(output, expected.flatten(2))
    assert torch.equal(evaluated.statistics.decided_B[2], decisions.taken.sum(dim=(0, 2)))
    assert evaluated.statistics.decided_B[2].min() > 0


@pytest.mark.parametrize("settings", [DMCConfig(), DMCConfig("dms", window_size=4), DMCConfig(stage="zero_out")])
def test_the_teacher_decides_nothing_and_lends_no_channel(settings):
    students = microbatch(neuron_scale=0.3, observer=pytest.fail)
    q, k, v = projections()
    output = layer(settings)(q, k, v, None, attention_bias=students.for_teacher())
    assert torch.equal(output, Dense().whole(q, k, v, GEOMETRY).output.flatten(2))
    assert not students.statistics.decided_B


def test_ranks_of_tensor_parallelism_draw_the_noise_of_their_own_heads():
    noise = {}
    for rank in range(2):
        seen = microbatch(observer=lambda *args: noise.update({args[2]: args[3].noise}))
        layer(DMCConfig(), OneRank(2, rank))(*projections(), None, attention_bias=seen)
    assert sorted(noise) == [0, G]
    assert not torch.equal(noise[0], noise[G])
    whole = layer(DMCConfig())._noise(microbatch(), 2 * G)
    assert torch.equal(torch.cat([noise[0], noise[G]], dim=-1), whole)


def test_a_recomputed_pass_overwrites_what_it_reported():
    seen, calls = microbatch(), []
    module = layer(DMCConfig())
    for _ in range(2):
        module(*projections(), None, attention_bias=seen)
        calls.append(seen.statistics.total_B())
    assert torch.equal(calls[0], calls[1])
    assert list(seen.statistics.decided_B) == [2]


@pytest.mark.parametrize("per_token", [False, True])
def test_the_compression_loss_enters_through_the_output(per_token):
    """Its gradient is that of the share of decisions, by the part that this layer has in the model."""
    settings = DMCConfig(loss_weight=0.5)
    open_gate = microbatch(gradient_scale=GradientScale(torch.tensor(3.0)))
    inputs = projections()
    output = layer(settings, per_token=per_token)(*inputs, None, attention_bias=open_gate)
    open_gate.statistics.gate_B = torch.tensor([1.0, 0.0])
    (found,) = torch.autograd.grad(output, inputs[1], torch.zeros_like(output))
    _, decisions = DMC(settings).whole(*inputs, GEOMETRY, noise=lambda heads: layer(settings)._noise(open_gate, heads))
    share = 0.5 / LAYERS * (S * B if per_token else 1)
    loss = -3.0 * share * decisions.fraction().mean(dim=1)[0] / B
    (expected,) = torch.autograd.grad(loss, inputs[1])
    torch.testing.assert_close(found, expected)
    assert expected.any()
