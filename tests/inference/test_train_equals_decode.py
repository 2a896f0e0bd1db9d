"""The contract of the package: a whole forward pass with hard decisions equals decoding with the compressed cache.

1. The reference path reads whole sequences at once (``Decoder.forward``).
2. The tested paths read some prompts in one pass, each of its own length, then token by token from the paged cache.
"""

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.layer_attention import DecisionTrace
from megatron_dmc.methods import dmc
from megatron_dmc.ops.cache_update import reference
from megatron_dmc.ops.decisions import hard_decisions, importance
from megatron_dmc.ops.rope import cos_sin, inverse_frequencies
from tests.inference.paged_decode import paged_decode
from tests.inference.tiny_model import QWEN2, QWEN3, tiny_model

LENGTH = 60
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (3, 1)}
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def random_tokens(batch, seed=0):
    return torch.randint(0, 50, (LENGTH, batch), generator=torch.Generator().manual_seed(seed))


def whole_log_probs(model, token_SB):
    """Log-probabilities [S, B, V] of a full forward pass, and its decisions."""
    trace = DecisionTrace()
    return model.logits(model.forward(token_SB, trace)).log_softmax(-1), trace


def decoded_log_probs(model, token_SB, prompt_lengths, chunk=None, **cache_options):
    """Log-probabilities [S, B, V] of prompts and then steps; rows start to decode when their own prompt ends.

    ``chunk``: prompts are read in parts of at most so many tokens.
    """
    batch = token_SB.shape[1]
    cache = model.new_cache(batch, block_size=4, **cache_options)
    rows = cache.add_sequences(batch)[::-1]
    log_probs = torch.full((*token_SB.shape, 50), torch.nan)
    done = [0] * batch
    while any(count < LENGTH for count in done):
        counts = [
            min(limit - start, chunk or LENGTH) if start < limit else min(1, LENGTH - start)
            for start, limit in zip(done, prompt_lengths, strict=True)
        ]
        active = [index for index in range(batch) if counts[index]]
        parts = [token_SB[done[index] : done[index] + counts[index], index] for index in active]
        hidden_TH = model.read(torch.cat(parts), [counts[i] for i in active], cache, [rows[i] for i in active])
        for index, hidden in zip(active, hidden_TH.split([counts[i] for i in active]), strict=True):
            log_probs[done[index] : done[index] + counts[index], index] = model.logits(hidden).log_softmax(-1)
            done[index] += counts[index]
        cache.check_integrity()
    return log_probs, cache, rows


@pytest.mark.parametrize("decisions_per", ["head", "layer"])
@pytest.mark.parametrize("window_size", [0, 12])
@pytest.mark.parametrize("heads", HEADS)
def test_whole_model(heads, window_size, decisions_per):
    settings = DMCConfig(window_size=window_size, decisions_per=decisions_per, decision_bias=-1.0)
    model = tiny_model(settings, num_attention_heads=HEADS[heads][0], num_kv_heads=HEADS[heads][1])
    token_SB = random_tokens(3)
    expected, trace = whole_log_probs(model, token_SB)
    accumulated = torch.stack(trace.alpha).float().mean()
    assert 0.2 < accumulated < 0.8
    decoded, cache, rows = decoded_log_probs(model, token_SB, [23, 1, 60])
    torch.testing.assert_close(decoded, expected, **TOLERANCE)
    appended_LBG = (~torch.stack(trace.alpha)).sum(dim=1)
    assert torch.equal(cache.cache_seqlens[:, rows].long(), appended_LBG)


@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_decisions_behind_biases_and_norms(family):
    model = tiny_model(DMCConfig(window_size=12, decision_bias=-1.0), **family)
    token_SB = random_tokens(3)
    expected, trace = whole_log_probs(model, token_SB)
    assert 0.2 < torch.stack(trace.alpha).float().mean() < 0.8
    decoded, _, _ = decoded_log_probs(model, token_SB, [23, 1, 60])
    torch.testing.assert_close(decoded, expected, **TOLERANCE)


@pytest.mark.parametrize("window_size", [1, 12])
def test_long_segments_outgrow_the_window(window_size):
    model = tiny_model(DMCConfig(window_size=window_size, decision_bias=-8.0))
    token_SB = random_tokens(2)
    expected, trace = whole_log_probs(model, token_SB)
    assert torch.stack(trace.alpha).float().mean() > 0.9
    decoded, _, _ = decoded_log_probs(model, token_SB, [30, 5])
    torch.testing.assert_close(decoded, expected, **TOLERANCE)


@pytest.mark.parametrize("cut", [1, 2, 17, 59, 60])
def test_any_border_between_prompt_and_steps(cut):
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    token_SB = random_tokens(1)
    expected, _ = whole_log_probs(model, token_SB)
    decoded, _, _ = decoded_log_probs(model, token_SB, [cut])
    torch.testing.assert_close(decoded, expected, **TOLERANCE)


@pytest.mark.parametrize("window_size", [0, 5, 12])
@pytest.mark.parametrize("chunk", [1, 2, 7, 33])
def test_prompts_may_be_read_in_any_parts(chunk, window_size):
    """Open segments, and entries of earlier parts that a later one overwrites, are carried over the borders."""
    model = tiny_model(DMCConfig(window_size=window_size, decision_bias=-2.0))
    token_SB = random_tokens(3)
    expected, trace = whole_log_probs(model, token_SB)
    decoded, cache, rows = decoded_log_probs(model, token_SB, [41, 3, 60], chunk=chunk)
    torch.testing.assert_close(decoded, expected, **TOLERANCE)
    assert torch.equal(cache.cache_seqlens[:, rows].long(), (~torch.stack(trace.alpha)).sum(dim=1))


@pytest.mark.parametrize("settings", [None, DMCConfig(stage="off"), DMCConfig(stage="zero_out")])
def test_models_that_do_not_compress(settings):
    model = tiny_model(settings)
    token_SB = random_tokens(3)
    expected, _ = whole_log_probs(model, token_SB)
    decoded, cache, rows = decoded_log_probs(model, token_SB, [23, 1, 60], chunk=10)
    torch.testing.assert_close(decoded, expected, **TOLERANCE)
    assert (cache.cache_seqlens[:, rows] == LENGTH).all()
    assert not cache.state


def test_a_request_that_lost_its_cache_resumes():
    """Decode half, give the memory back, read everything so far as a prompt, decode the rest."""
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    token_SB = random_tokens(2)
    expected, _ = whole_log_probs(model, token_SB)
    cache = model.new_cache(2, block_size=4)
    rows = cache.add_sequences(2)
    model.read(token_SB[:10].T.flatten(), [10, 10], cache, rows)
    for t in range(10, 30):
        model.read(token_SB[t], [1, 1], cache, rows)
    cache.free_sequences(rows)
    assert cache.blocks.num_in_use == 0
    rows = cache.add_sequences(2)
    model.read(token_SB[:30].T.flatten(), [30, 30], cache, rows)
    for t in range(30, LENGTH):
        log_probs = model.logits(model.read(token_SB[t], [1, 1], cache, rows)).log_softmax(-1)
        torch.testing.assert_close(log_probs, expected[t], **TOLERANCE)


@pytest.mark.parametrize(
    "settings", [None, DMCConfig(decision_bias=-1.0), DMCConfig(decision_bias=-1.0, window_size=5)]
)
def test_copies_of_a_prompt_go_on_as_if_each_had_read_it(settings):
    """One prompt is read once and continued in three ways, of which one ends before the others."""
    model = tiny_model(settings)
    token_SB = random_tokens(3)
    token_SB[:23] = token_SB[:23, :1]
    expected, _ = whole_log_probs(model, token_SB)
    cache = model.new_cache(3, block_size=4)
    rows = cache.add_sequences(1)
    model.read(token_SB[:23, 0], [23], cache, rows)
    rows += cache.fork(rows[0], 2)
    for t in range(23, LENGTH):
        if t == 40:
            cache.free_sequences([rows.pop(0)])
        log_probs = model.logits(model.read(token_SB[t, -len(rows) :], [1] * len(rows), cache, rows)).log_softmax(-1)
        torch.testing.assert_close(log_probs, expected[t, -len(rows) :], **TOLERANCE)
        cache.check_integrity()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window_size", [0, 12])
def test_paged_attention_equals_the_recurrence_of_the_paper(window_size, heads):
    """1. ``cache_update.reference``, token by token and head by head; 2. the paged cache, with and without prefill."""
    num_heads, num_kv_heads = HEADS[heads]
    config = DMCConfig(window_size=window_size, decision_bias=-0.5)
    generator = torch.Generator().manual_seed(1)
    q_SBND = torch.randn(40, 2, num_heads, 16, generator=generator)
    k_SBGD, v_SBGD = torch.randn(2, 40, 2, num_kv_heads, 16, generator=generator)
    decision_SBG, importance_SBG = dmc.read_logits(q_SBND, k_SBGD, config)
    expected, lengths = reference.decode(
        q_SBND,
        k_SBGD,
        v_SBGD,
        hard_decisions(decision_SBG, config.decision_threshold),
        importance(importance_SBG, config.importance_epsilon),
        cos_sin_S=cos_sin(torch.arange(40), inverse_frequencies(16, 10000.0)),
        window_size=window_size,
    )
    for passes in ((), (25,), (1, 9, 20)):
        output, paged_lengths = paged_decode(q_SBND, k_SBGD, v_SBGD, dmc.DMC(config), 10000.0, passes)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(paged_lengths[sum(passes) :], lengths[sum(passes) :])
