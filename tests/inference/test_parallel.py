"""Tensor parallelism: ranks that share a model write what one process writes, whatever their heads keep."""

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.decoder.layer_attention import DecisionTrace
from megatron_dmc.inference.decoder.parallel import ALONE
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.methods import policy
from tests.inference.threads import on_ranks
from tests.inference.tiny_model import QWEN2, QWEN3, RandomSource, tiny_llama

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], list(range(40))]
TOLERANCE = {"atol": 1e-4, "rtol": 0}
SETTINGS = {
    "dense": None,
    "dmc": DMCConfig(decision_bias=-1.0),
    "dmc window": DMCConfig(decision_bias=-1.0, window_size=12),
    "dmc-c": DMCConfig(decision_bias=-1.0, decisions_per="layer"),
    "dms": DMCConfig("dms", decision_bias=0.0, window_size=5, decided_by="next"),
    "dms adapter": DMCConfig("dms", decision_bias=0.0, window_size=5, decision_source="adapter"),
    "h2o": None,
    "tova": None,
}


def decoder(name, parallel, **changes):
    """A model of 4 KV heads whose cache is kept as ``name`` says."""
    source = RandomSource(tiny_llama(**({"num_kv_heads": 4, "num_attention_heads": 8} | changes)), SETTINGS[name])
    return Decoder(source, method=policy(name, 8) if name in ("h2o", "tova") else None, parallel=parallel)


def test_parts_of_an_axis_cover_it():
    for length in (1, 2, 7, 50, 64):
        for size in (1, 2, 3, 4):
            cuts = on_ranks(size, lambda parallel, length=length: parallel.cut(1, length))
            assert [cut.first for cut in cuts] == [0, *(cut.last for cut in cuts[:-1])]
            assert cuts[-1].last == length
            assert max(cut.last - cut.first for cut in cuts) == -(-length // size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_ranks_do_together(size):
    whole_BV = torch.randn(2, 50)
    weight_VH = torch.randn(50, 8)
    token_T = torch.tensor([0, 49, 17, 17, 25])

    def run(parallel):
        mine = parallel.cut(1, 50)
        embedded_TH = parallel.embedding(token_T, weight_VH[mine.first : mine.last], 50)
        assert torch.equal(embedded_TH, weight_VH[token_T])
        assert torch.equal(parallel.gather(mine.of(whole_BV), 50), whole_BV)
        assert torch.equal(parallel.sum(torch.full((3,), parallel.rank + 1.0)), torch.full((3,), size * (size + 1) / 2))
        assert parallel.ranks.mean_over_heads(torch.tensor([2.0 * parallel.rank])).item() == size - 1
        assert (parallel.least(parallel.rank), parallel.most(parallel.rank)) == (0, size - 1)
        assert parallel.all_objects(parallel.rank) == list(range(size))

    on_ranks(size, run)


def test_an_error_on_one_rank_is_one_on_all():
    def run(parallel):
        with pytest.raises(OutOfBlocks, match="^the cache of rank 1 is full$"), parallel.together(OutOfBlocks):
            if parallel.rank == 1:
                raise OutOfBlocks("the cache of rank 1 is full")
        with parallel.together(OutOfBlocks, same=5):
            pass

    on_ranks(3, run)
    with pytest.raises(OutOfBlocks), ALONE.together(OutOfBlocks):
        raise OutOfBlocks


def test_ranks_that_have_diverged_stop():
    def run(parallel):
        with parallel.together(OutOfBlocks, same=parallel.rank):
            pass

    with pytest.raises(AssertionError, match="ranks have diverged: . here, 0 to 1"):
        on_ranks(2, run)


@pytest.mark.parametrize("size", [3, 8])
def test_heads_that_cannot_be_shared_are_refused(size):
    message = f"^{size} ranks cannot share 4 KV heads equally: start 1, 2 or 4 with torchrun --nproc-per-node$"
    with pytest.raises(ValueError, match=message):
        on_ranks(size, lambda parallel: decoder("dense", parallel))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 8},
        {"num_attention_heads": 4},
        {"ffn_hidden_size": 49, "vocab_size": 53, "tie_word_embeddings": True},
        QWEN2,
        QWEN3,
    ],
    ids=["gqa", "mha", "one query head per rank", "uneven", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("size", [2, 4])
def test_whole_forward_passes(size, changes):
    """Logits of all tokens, and the decisions of every head."""
    token_SB = torch.randint(0, 50, (30, 2), generator=torch.Generator().manual_seed(0))

    def run(parallel):
        model, trace = decoder("dmc", parallel, **changes), DecisionTrace()
        return model.logits(model.forward(token_SB, trace)), torch.stack(trace.alpha)

    expected, alpha_LSBG = run(ALONE)
    assert 0.2 < alpha_LSBG.float().mean() < 0.8
    found = on_ranks(size, run)
    for logits, _ in found:
        torch.testing.assert_close(logits, expected, **TOLERANCE)
        assert torch.equal(logits, found[0][0]), "ranks that sample from other logits diverge"
    assert torch.equal(torch.cat([alpha for _, alpha in found], dim=-1), alpha_LSBG)


def generate(parallel, name, temperature=0.0, **options):
    """Texts of :data:`PROMPTS` (None where a request failed), entries by head, and how often memory was given back."""
    engine = Engine(decoder(name, parallel), block_size=4, **options)
    engine.expectation.observe_held(0, 10_000)  # all are admitted at once
    given_back, give_back = [], engine.scheduler.give_back
    engine.scheduler.give_back = lambda requests: (given_back.append(1), give_back(requests))
    requests = engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, temperature=temperature, seed=3))
    engine.runner.cache.check_integrity()
    assert engine.runner.cache.blocks.num_in_use == 0
    usages = [CacheUsage.of_ranks(parallel.all_objects(request.usage)) for request in requests if request.usage]
    texts = [None if request.error else request.output for request in requests]
    return texts, [usage.entries for usage in usages], len(given_back)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in SETTINGS), ("dmc-c", 4)])
def test_texts_equal_those_of_one_process(name, size, temperature):
    expected = generate(ALONE, name, temperature)
    assert on_ranks(size, lambda parallel: generate(parallel, name, temperature)) == [expected] * size


@pytest.mark.parametrize(("name", "num_blocks"), [("dense", 140), ("dmc", 80), ("dmc-c", 80), ("dms", 120)])
def test_a_full_cache_changes_no_text(name, num_blocks):
    """Heads of different ranks fill their pools at different times; all ranks give back the same requests."""
    expected, entries, _ = generate(ALONE, name)
    found = on_ranks(2, lambda parallel: generate(parallel, name, num_blocks=num_blocks))
    assert found[0] == found[1]
    assert found[0][:2] == (expected, entries)
    assert found[0][2] > 0, "nothing was given back"


def test_samples_and_parts_of_prompts():
    """Samples share the blocks of their prompt on every rank, or read it again where a small cache has no room."""

    def run(parallel, **options):
        engine = Engine(decoder("dmc", parallel), block_size=4, prefill_tokens=7, **options)
        requests = engine.generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=1.0), n=3)
        assert engine.runner.cache.blocks.num_in_use == 0
        return [request.output for request in requests]

    expected = run(ALONE)
    assert len(set(map(tuple, expected))) == len(expected)
    for num_blocks in (None, 150):
        assert on_ranks(2, lambda parallel, n=num_blocks: run(parallel, num_blocks=n)) == [expected] * 2


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_a_request_that_does_not_fit_fails_on_all_ranks(name):
    """The longest prompt, before it is cut; the others go on."""
    (*expected, _), _, _ = generate(ALONE, name)
    found = on_ranks(2, lambda parallel: generate(parallel, name, num_blocks=44))
    assert found[0] == found[1]
    assert found[0][0] == [*expected, None]


def test_each_rank_holds_its_share():
    whole, *parts = decoder("dmc", ALONE), *on_ranks(2, lambda parallel: decoder("dmc", parallel))
    expected = whole.layers[1]
    for rank, part in enumerate(parts):
        found = part.layers[1]
        for role, sizes in (("qkv", [128, 64, 64]), ("gate_up", [48, 48])):
            shares = [matrix.chunk(2)[rank] for matrix in getattr(expected, role).weight.split(sizes)]
            assert torch.equal(getattr(found, role).weight, torch.cat(shares))
        for role in ("attention_output", "down"):
            assert torch.equal(getattr(found, role).weight, getattr(expected, role).weight.chunk(2, dim=1)[rank])
        assert torch.equal(part.embedding, whole.embedding.chunk(2)[rank])
        assert torch.equal(part.output.weight, whole.output.weight.chunk(2)[rank])
