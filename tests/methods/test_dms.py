"""DMS against its definition, written pair by pair: at once, token by token, and in parts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.methods import DMS, Dense, dms
from megatron_dmc.methods.step import Ranks
from megatron_dmc.ops.borrowed import FIRST_QUERY
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.rope import apply_rope, inverse_frequencies
from tests.inference.paged_decode import paged_decode
from tests.ops.comparison import assert_same
from tests.tolerances import OUTPUT

BIAS = 0.3
ROPE_THETA = 10000.0


@dataclass
class Case:
    """Projections of two sequences before RoPE, and what the adapter makes of them."""

    q_SBND: Tensor
    k_SBGD: Tensor
    v_SBGD: Tensor
    adapter_SBG: Tensor
    settings: DMCConfig
    noise_SBG: Tensor | None = None
    documents: list[list[int]] | None = None

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q_SBND, self.k_SBGD, self.v_SBGD, self.adapter_SBG]

    @property
    def geometry(self) -> Geometry:
        length, batch, _, head_dim = self.k_SBGD.shape
        return Geometry(length, batch, inverse_frequencies(head_dim, ROPE_THETA), documents=self.documents)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, adapter: Tensor) -> Tensor:
        noise = None if self.noise_SBG is None else lambda heads: self.noise_SBG.to(adapter.dtype)
        return DMS(self.settings).whole(q, k, v, self.geometry, adapter_SBG=adapter, noise=noise).output

    def plain(self, q: Tensor, k: Tensor, v: Tensor, adapter: Tensor) -> Tensor:
        """softmax over all pairs of one document, each key with the weight that the definition leaves it."""
        length, batch, num_heads, head_dim = q.shape
        group = num_heads // k.shape[2]
        if self.settings.decision_source == "adapter":
            logit_SBG = 100 * adapter - BIAS
        else:
            logit_SBG = q[:, :, ::group, -1] - BIAS
            lent = torch.zeros(num_heads, head_dim, dtype=torch.bool)
            lent[::group, -1] = True
            q = q.masked_fill(lent, 0)
        if self.noise_SBG is not None:
            logit_SBG = (logit_SBG + self.noise_SBG) / self.settings.temperature
        cos, sin = (x.to(q.dtype)[:, None, None] for x in self.geometry.cos_sin_S)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if self.settings.decision_source == "neuron":
            q = q.masked_fill(lent, 0)
        rows = []
        for b, i in itertools.product(range(batch), range(length)):
            start = max(x for x in (self.documents or [[0], [0]])[b] if x <= i)
            for n in range(num_heads):
                g = n // group
                scores = k[start : i + 1, b, g] @ q[i, b, n] / head_dim**0.5
                bias = torch.stack([self._log_kept(logit_SBG[:, b, g], j, i) for j in range(start, i + 1)])
                rows.append((scores + bias).softmax(0) @ v[start : i + 1, b, g])
        return torch.stack(rows).view(batch, length, num_heads, head_dim).transpose(0, 1)

    def _log_kept(self, logit_S: Tensor, j: int, i: int) -> Tensor:
        """log of the share of key j that query i still sees."""
        by = j + 1 if self.settings.decided_by == "next" else j
        if i - j <= self.settings.window_size:
            return logit_S.new_zeros(())
        if self.noise_SBG is None:
            return logit_S.new_full((), -torch.inf if logit_S[by] > 0 else 0.0)
        return torch.log1p(-torch.sigmoid(logit_S[by]))


def make_case(
    length: int = 40,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    *,
    window_size: int = 5,
    decided_by: str = "own",
    decision_source: str = "neuron",
    hard: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Random inputs, of whose tokens about half are marked."""
    generator = torch.Generator().manual_seed(length * 7 + head_dim)
    num_heads, num_kv_heads = heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    scalars = (length, 2, num_kv_heads)
    config = DMCConfig(
        "dms",
        window_size=window_size,
        decided_by=decided_by,
        decision_source=decision_source,
        decision_bias=BIAS,
        temperature=0.5,
    )
    q, k, v = normal(length, 2, num_heads, head_dim), normal(*scalars, head_dim), normal(*scalars, head_dim)
    adapter = (normal(*scalars) + BIAS) / 100
    return Case(q, k, v, adapter, config, None if hard else normal(*scalars))


EVERY_FORM = pytest.mark.parametrize(
    ("decided_by", "decision_source"), list(itertools.product(("own", "next"), ("neuron", "adapter")))
)


@EVERY_FORM
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("window_size", [0, 1, 5, 16])
def test_whole_sequences_equal_the_definition(
    window_size: int, hard: bool, decided_by: str, decision_source: str
) -> None:
    case = make_case(
        23, (3, 1), window_size=window_size, decided_by=decided_by, decision_source=decision_source, hard=hard
    )
    assert_same(case.whole, case.plain, case.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_heads_and_dtypes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    case = make_case(17, heads, 64, window_size=3, hard=False, dtype=dtype)
    assert_same(case.whole, case.plain, case.inputs)


@EVERY_FORM
def test_documents_are_computed_as_if_alone(decided_by: str, decision_source: str) -> None:
    case = make_case(30, window_size=3, decided_by=decided_by, decision_source=decision_source, hard=False)
    case.documents = [[0, 7, 8, 19], [0, 25]]
    assert_same(case.whole, case.plain, case.inputs)


@EVERY_FORM
def test_ranks_may_hold_chunks_of_the_queries(decided_by: str, decision_source: str) -> None:
    """Context parallelism: logits are read where the queries are, decisions are those of the whole sequence."""
    case = make_case(32, window_size=3, decided_by=decided_by, decision_source=decision_source)
    local = torch.cat([torch.arange(0, 8), torch.arange(24, 32)])
    frequencies = inverse_frequencies(16, ROPE_THETA)
    geometry = Geometry(32, 2, frequencies, query_starts=[0, 24], num_queries=16)
    logits = dms.read_logits(case.q_SBND, 2, case.adapter_SBG, case.settings)
    whole = (case.k_SBGD, case.v_SBGD, logits)
    ranks = Ranks(whole_sequence=lambda x: next(tensor for tensor in whole if tensor[local].equal(x)))
    here = (tensor[local] for tensor in case.inputs[:3])
    found = DMS(case.settings).whole(*here, geometry, adapter_SBG=case.adapter_SBG[local], ranks=ranks)
    expected = case.whole(*case.inputs)[local]
    torch.testing.assert_close(found.output, expected, rtol=0, atol=OUTPUT[torch.float64])
    assert len(found.decisions.logits) == 32


def test_nothing_is_borrowed_where_an_adapter_decides() -> None:
    case = make_case(decision_source="adapter", window_size=40)
    found = DMS(case.settings).whole(*case.inputs[:3], case.geometry, adapter_SBG=case.adapter_SBG).output
    expected = Dense().whole(*case.inputs[:3], case.geometry).output
    torch.testing.assert_close(found, expected, rtol=0, atol=OUTPUT[torch.float64])


@pytest.mark.parametrize("neuron_scale", [1.0, 0.4, 0.0])
def test_zero_out_fades_the_first_query_head_of_each_kv_head_alone(neuron_scale: float) -> None:
    case = make_case()
    q, k, v = case.inputs[:3]
    scale = torch.ones(4, 16, dtype=q.dtype)
    scale[[0, 2], -1] = neuron_scale
    cos, sin = (x.to(q.dtype)[:, None, None] for x in case.geometry.cos_sin_S)
    scores = torch.einsum(
        "tbnd,sbnd->bnts", apply_rope(q * scale, cos, sin) * scale, apply_rope(k, cos, sin).repeat_interleave(2, 2)
    )
    weights = (scores / 4).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = torch.einsum("bnts,sbnd->tbnd", weights, v.repeat_interleave(2, 2))
    found = Dense(neuron_scale, FIRST_QUERY).whole(q, k, v, case.geometry).output
    torch.testing.assert_close(found, expected, rtol=0, atol=OUTPUT[torch.float64])
    if neuron_scale == 0:
        never = DMS(DMCConfig("dms", window_size=0, decision_bias=50.0)).whole(q, k, v, case.geometry).output
        torch.testing.assert_close(never, found, rtol=0, atol=OUTPUT[torch.float64])


def test_every_decision_counts_once() -> None:
    """In the statistic of the loss the first token's as well, in the cache only where it is about a token."""
    logits = torch.tensor([1.0, -1.0, 1.0, 1.0]).view(4, 1, 1)
    first = torch.tensor([True, False, False, True]).view(4, 1)
    own, following = (
        dms.decide(logits, first, DMCConfig("dms", decided_by=decided_by)) for decided_by in ("own", "next")
    )
    assert own.fraction().item() == following.fraction().item() == 0.75
    assert own.hard.flatten().tolist() == [True, False, True, True]
    assert following.hard.flatten().tolist() == [False, False, True, False]


def test_shapes_that_differ_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"noise \(3,\): must be that of the decision logits"):
        DMS(case.settings).whole(*case.inputs[:3], case.geometry, noise=lambda heads: torch.zeros(3))
    with pytest.raises(ValueError, match="the geometry was made for"):
        DMS(case.settings).whole(*case.inputs[:3], Geometry(21, 2, inverse_frequencies(16, ROPE_THETA)))


def one_by_one(case: Case, passes: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """See :func:`paged_decode`."""
    return paged_decode(
        case.q_SBND,
        case.k_SBGD,
        case.v_SBGD,
        DMS(case.settings),
        ROPE_THETA,
        passes,
        case.adapter_SBG,
    )


def entries_by_definition(case: Case) -> Tensor:
    """int32 [S, B, G]: tokens that are not evicted after each position."""
    decided = (
        DMS(case.settings)
        .whole(case.q_SBND, case.k_SBGD, case.v_SBGD, case.geometry, adapter_SBG=case.adapter_SBG)
        .decisions
    )
    marked_SBG = decided.taken
    if case.settings.decided_by == "next":
        marked_SBG = torch.cat((marked_SBG[1:], torch.zeros_like(marked_SBG[:1])))
    length = len(marked_SBG)
    gone_SBG = [marked_SBG[: max(0, t - case.settings.window_size)].sum(0) for t in range(length)]
    return torch.arange(1, length + 1).view(-1, 1, 1) - torch.stack(gone_SBG)


@EVERY_FORM
@pytest.mark.parametrize("passes", [(), (23,), (1, 9, 2, 20), (40,)])
@pytest.mark.parametrize("window_size", [0, 1, 5, 16])
def test_decoding_equals_whole_sequences(
    window_size: int, passes: tuple[int, ...], decided_by: str, decision_source: str
) -> None:
    """The contract of the package, for one layer: outputs and entries, whatever parts a text is read in."""
    case = make_case(
        window_size=window_size, decided_by=decided_by, decision_source=decision_source, dtype=torch.float32
    )
    expected = case.whole(*case.inputs)
    found, lengths = one_by_one(case, passes)
    torch.testing.assert_close(found, expected, rtol=0, atol=OUTPUT[torch.float32])
    known = lengths[:, 0, 0] >= 0
    assert torch.equal(lengths[known].long(), entries_by_definition(case)[known])
    if window_size < 16:
        assert lengths[-1].float().mean() < 36


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_cuts_of_a_text_leave_the_same_cache(data: st.DataObject) -> None:
    """Entries as sets, and what the next tokens do with them; parts come between single tokens, too."""
    length = data.draw(st.integers(2, 40))
    case = make_case(
        length,
        window_size=data.draw(st.sampled_from([0, 1, 5, 16])),
        decided_by=data.draw(st.sampled_from(["own", "next"])),
        dtype=torch.float32,
    )
    passes = []
    while sum(passes) < length:
        passes.append(data.draw(st.integers(1, min(9, length - sum(passes)))))
    found, lengths = one_by_one(case, tuple(passes))
    torch.testing.assert_close(found, case.whole(*case.inputs), rtol=0, atol=OUTPUT[torch.float32])
    assert torch.equal(lengths[-1].long(), entries_by_definition(case)[-1])
