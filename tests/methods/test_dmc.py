"""The whole operation of DMC: fast against plain, training against decoding, heads against layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_dmc.config import DMCConfig
from megatron_dmc.methods import DMC, Dense, dmc
from megatron_dmc.ops.cache_update.reference import decode
from megatron_dmc.ops.compressed_attention import Weights, compressed_attention
from megatron_dmc.ops.compressed_attention.reference import compressed_attention as plain_attention
from megatron_dmc.ops.decisions import hard_decisions, importance
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import masked_attention
from megatron_dmc.ops.rope import inverse_frequencies
from tests.ops.comparison import assert_same


@dataclass
class Case:
    """Inputs of the operation and its geometry."""

    inputs: list[Tensor]
    noise: Tensor | None
    config: DMCConfig
    query_starts: list[int] | None = None
    documents: list[list[int]] | None = None
    first_position: int = 0

    def fast(self, q: Tensor, k: Tensor, v: Tensor, decision: Tensor, importance: Tensor) -> Tensor:
        return self.attend(compressed_attention, q, k, v, decision, importance)

    def plain(self, q: Tensor, k: Tensor, v: Tensor, decision: Tensor, importance: Tensor) -> Tensor:
        return self.attend(plain_attention, q, k, v, decision, importance)

    def attend(self, form: Any, q: Tensor, k: Tensor, v: Tensor, decision: Tensor, importance: Tensor) -> Tensor:
        geometry = self.geometry(q, k)
        noise = None if self.noise is None else self.noise.to(decision.dtype)
        decided = dmc.decide(decision, importance, geometry.first_SB, self.config, noise)
        weights = Weights(decided.alpha, decided.omega, decided.key_bias)
        return form(q, k, v, weights, geometry, window_size=self.config.window_size)

    def geometry(self, q: Tensor, k: Tensor) -> Geometry:
        frequencies = inverse_frequencies(k.shape[-1], 10000.0)
        position_S = torch.arange(len(k)) + self.first_position
        return Geometry(
            len(k), k.shape[1], frequencies, self.query_starts, len(q), documents=self.documents, position_S=position_S
        )

    def check(self) -> None:
        assert_same(self.fast, self.plain, self.inputs)


def make_case(
    length: int = 63,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    *,
    window_size: int = 0,
    decisions: str = "mixed",
    hard: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random inputs; decision logits straddle 0, or lie far on one side."""
    generator = torch.Generator().manual_seed(length * 7 + head_dim)
    num_heads, num_kv_heads = heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    offset, spread = {"mixed": (0.0, 1.0), "append": (-40.0, 1.0), "accumulate": (40.0, 1.0), "far": (0.0, 30.0)}[
        decisions
    ]
    scalars = (length, 2, num_kv_heads)
    inputs = [
        normal(length, 2, num_heads, head_dim),
        normal(*scalars, head_dim),
        normal(*scalars, head_dim),
        spread * normal(*scalars) + offset,
        normal(*scalars) + 2,
    ]
    inputs = [x.to(dtype) for x in inputs[:3]] + [x.to(torch.promote_types(dtype, torch.float32)) for x in inputs[3:]]
    noise = None if hard else normal(*scalars).to(inputs[3].dtype)
    return Case(inputs, noise, DMCConfig(window_size=window_size, temperature=0.3))


@pytest.mark.parametrize("decisions", ["mixed", "append", "accumulate", "far"])
@pytest.mark.parametrize("window_size", [0, 1, 12, 16])
@pytest.mark.parametrize("length", [1, 63, 111])
def test_equals_plain_form(length: int, window_size: int, decisions: str) -> None:
    make_case(length, window_size=window_size, decisions=decisions).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("head_dim", [16, 64, 100, 128])
def test_head_dims_and_dtypes(head_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    make_case(63, heads, head_dim, dtype=dtype).check()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chunk_length = draw(st.integers(1, 20))
    num_places = draw(st.integers(1, 4))
    length = chunk_length * num_places
    num_kv_heads = draw(st.integers(1, 3))
    case = make_case(
        length,
        (num_kv_heads * draw(st.integers(1, 3)), num_kv_heads),
        2 * draw(st.integers(1, 9)),
        window_size=draw(st.sampled_from([0, 0, 1, 2, 5, 12, 100])),
        decisions=draw(st.sampled_from(["mixed", "append", "accumulate", "far"])),
        hard=draw(st.booleans()),
    )
    if draw(st.booleans()):
        places = draw(st.lists(st.integers(0, num_places - 1), min_size=1, max_size=num_places, unique=True))
        case.query_starts = [place * chunk_length for place in places]
        case.inputs[0] = case.inputs[0][: chunk_length * len(places)]
    if length > 1 and draw(st.booleans()):
        borders = st.sets(st.integers(1, length - 1), max_size=4)
        case.documents = [[0, *sorted(draw(borders))] for _ in range(2)]
    return case


@given(cases())
@settings(max_examples=60, deadline=None)
def test_any_shape_window_decisions_documents_and_chunks(case: Case) -> None:
    case.check()


@pytest.mark.exhaustive
@given(cases())
@settings(max_examples=500, deadline=None)
def test_any_shape_at_length(case: Case) -> None:
    case.check()


@pytest.mark.parametrize("decisions_per", ["head", "layer"])
@pytest.mark.parametrize("window_size", [0, 1, 12])
def test_hard_decisions_equal_decoding_token_by_token(window_size: int, decisions_per: str) -> None:
    """The contract of the package, for one layer."""
    case = make_case(80, dtype=torch.float32, hard=True)
    q, k, v = case.inputs[:3]
    k[..., -1] = 4 * k[..., -1] + 5
    config = DMCConfig(window_size=window_size, decisions_per=decisions_per)
    logits = dmc.read_logits(q, k, config)
    geometry = case.geometry(q, k)
    output, decisions = DMC(config).whole(q, k, v, geometry)
    omega = importance(logits[1], config.importance_epsilon)
    expected, lengths = decode(
        q, k, v, hard_decisions(logits[0], 0.0), omega, cos_sin_S=geometry.cos_sin_S, window_size=window_size
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-6)
    appended = (~decisions.of_heads(k.shape[2]).hard).cumsum(0)
    assert torch.equal(appended, lengths.long())
    assert 0.2 < decisions.hard.float().mean() < 0.8


def test_documents_are_computed_as_if_alone() -> None:
    """No segment and no attention crosses a border, whatever the decision at it says."""
    case = make_case(60, dtype=torch.float32)
    case.inputs[3] += 2
    borders = [0, 13, 14, 40, 60]
    case.documents = [borders[:-1], borders[:-1]]
    together = case.fast(*case.inputs)
    for start, end in itertools.pairwise(borders):
        part = Case([x[start:end] for x in case.inputs], case.noise[start:end], case.config, first_position=start)
        alone = part.fast(*part.inputs)
        torch.testing.assert_close(together[start:end], alone, rtol=0, atol=2e-6)


def test_one_decision_per_layer_is_the_mean_over_its_heads() -> None:
    q, k = torch.randn(7, 2, 6, 8), torch.randn(7, 2, 3, 8)
    decision, importance_logits = dmc.read_logits(q, k, DMCConfig(decisions_per="layer"))
    torch.testing.assert_close(decision[..., 0], k[..., -1].mean(-1) - 5)
    torch.testing.assert_close(importance_logits[..., 0], q[..., -1].mean(-1) + 5)
    assert decision.shape[-1] == 1


def test_tensor_parallel_ranks_average_to_the_layer() -> None:
    q, k = torch.randn(7, 2, 6, 8), torch.randn(7, 2, 2, 8)
    config = DMCConfig(decisions_per="layer")
    whole = dmc.read_logits(q, k, config)
    ranks = [dmc.read_logits(q[:, :, 3 * r : 3 * r + 3], k[:, :, r : r + 1], config) for r in range(2)]
    for logits, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        torch.testing.assert_close(sum(parts) / 2, logits)


def test_gradients_reach_the_borrowed_channels_through_the_logits_alone() -> None:
    case = make_case()
    q, k, v = (x.requires_grad_() for x in case.inputs[:3])
    logits = [x.detach().requires_grad_() for x in dmc.read_logits(q, k, case.config)]
    case.fast(q, k, v, *logits).square().sum().backward()
    assert not q.grad[..., -1].any()
    assert not k.grad[..., -1].any()
    assert all(x.grad.abs().max() > 1e-6 for x in logits)


def test_decision_fraction_is_hard_with_the_gradient_of_the_relaxation() -> None:
    logits = torch.randn(50, 2, 3, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(50, 2, 3, dtype=torch.float64)
    config = DMCConfig(temperature=0.4)
    first = torch.zeros(50, 2, dtype=torch.bool)
    first[0] = True
    fraction = dmc.decide(logits, logits, first, config, noise).fraction()
    torch.testing.assert_close(fraction, (logits + noise > 0).double().mean(0))
    (found,) = torch.autograd.grad(fraction.sum(), logits)
    (expected,) = torch.autograd.grad(torch.sigmoid((logits + noise) / 0.4).mean(0).sum(), logits)
    torch.testing.assert_close(found, expected)
    without_noise = dmc.decide(logits, logits, first, DMCConfig(decision_threshold=0.5)).fraction()
    torch.testing.assert_close(without_noise, (logits > 0.5).double().mean(0))
    some = torch.tensor([3, 4, 40])
    torch.testing.assert_close(
        dmc.decide(logits, logits, first, config, noise).fraction(some), (logits + noise > 0)[some].double().mean(0)
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_changes_nothing(use_reentrant: bool) -> None:
    case = make_case(dtype=torch.float32)
    results = []
    for run in (case.fast, lambda *x: checkpoint(case.fast, *x, use_reentrant=use_reentrant)):
        leaves = [x.clone().requires_grad_() for x in case.inputs]
        output = run(*leaves)
        output.square().sum().backward()
        results.append([output, *(x.grad for x in leaves)])
    for once, twice in zip(*results, strict=True):
        assert torch.equal(once, twice)


def test_only_asked_gradients_are_given() -> None:
    case = make_case(20)
    q, k, v, *logits = case.inputs
    assert not case.fast(q, k, v, *logits).requires_grad
    v.requires_grad_()
    case.fast(q, k, v, *logits).sum().backward()
    assert v.grad is not None
    assert k.grad is None


@pytest.mark.parametrize("neuron_scale", [1.0, 0.4, 0.0])
def test_faded_attention_ends_where_compression_begins(neuron_scale: float) -> None:
    """At scale 1 plain causal attention, at 0 DMC that never accumulates."""
    case = make_case(70)
    q, k, v = case.inputs[:3]
    geometry = case.geometry(q, k)
    angles = geometry.cos_sin_S
    found, _ = Dense(neuron_scale).whole(q, k, v, geometry)
    scale = torch.ones(q.shape[-1], dtype=q.dtype)
    scale[-1] = neuron_scale

    def turned(x: Tensor) -> Tensor:
        cos, sin = (t[:, None, None].repeat(1, 1, 1, 2).double() for t in angles)
        x = x * scale
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin) * scale

    heads_first = [x.permute(1, 2, 0, 3) for x in (turned(q), turned(k), v)]
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if neuron_scale == 0:
        never, decisions = DMC(DMCConfig(decision_bias=50.0)).whole(q, k, v, geometry)
        torch.testing.assert_close(never, found, rtol=0, atol=1e-12)
        assert not decisions.taken.any()


def test_wrong_documents_are_named_before_any_work() -> None:
    case = make_case(20)
    case.documents = [[0, 25], [0]]
    with pytest.raises(ValueError, match="stay below the sequence length 20"):
        case.fast(*case.inputs)


def test_wrong_logits_are_named() -> None:
    case = make_case(20)
    q, k, v, decision, importance_logits = case.inputs
    with pytest.raises(ValueError, match=r"importance logits \(20, 2, 2\): must be that .* \(19, 2, 2\)"):
        dmc.decide(decision[1:], importance_logits, torch.zeros(19, 2, dtype=torch.bool), case.config)
    with pytest.raises(ValueError, match=r"noise \(20, 2, 2\): must be that of the decision logits \(20, 2, 1\)"):
        case.fast(q, k, v, decision[..., :1], importance_logits[..., :1])
    with pytest.raises(
        ValueError, match=r"decision logits \(20, 2, 2\): the geometry was made for positions \(21, 2\)"
    ):
        DMC(case.config).whole(q, k, v, Geometry(21, 2, inverse_frequencies(16, 10000.0)))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("window_size", [0, 12])
def test_no_tensor_grows_with_the_square_of_the_length(window_size: int, hard: bool) -> None:
    """Forward and backward, documents and chunks included, hold nothing larger than the queries."""
    case = make_case(512, (2, 1), 16, window_size=window_size, hard=hard, dtype=torch.float32)
    case.documents = [[0, 100], [0]]
    case.query_starts = [0, 256]
    leaves = [x.requires_grad_() for x in case.inputs]
    with LargestTensor() as largest:
        case.fast(*leaves).sum().backward()
    assert leaves[1].grad is not None
    assert leaves[0].numel() <= largest.elements < 2 * leaves[0].numel() < 512 * 512


@pytest.mark.parametrize("free_window", [None, 16])
def test_attention_alone_is_linear_in_memory_too(free_window: int | None) -> None:
    q, k, v, key_bias, _ = make_case(512, (2, 1), 16, dtype=torch.float32).inputs
    key_bias = -key_bias.abs()
    with LargestTensor() as largest:
        masked_attention(q.requires_grad_(), k, v, key_bias, Geometry(512, 2), free_window=free_window).sum().backward()
    assert q.grad is not None
    assert largest.elements < 2 * q.numel()
