"""Segments of the compressed cache: steps and prompts against pooling as a loop over time.

Legend: S sequence, B batch, G KV heads, D head dim, T entries.
"""

import pytest
import torch

from megatron_dmc.ops.cache_update import open_segment_state, segment_ends, state_shape, update_segments
from megatron_dmc.ops.kv_pooling.reference import pool_kv

B, G, D = 2, 3, 8
WINDOWS = (0, 1, 12, 16)


def random_tokens(sequence_length, accumulate_share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k_SBGD = torch.randn(sequence_length, B, G, D, generator=generator)
    v_SBGD = torch.randn(sequence_length, B, G, D, generator=generator)
    alpha_SBG = torch.rand(sequence_length, B, G, generator=generator) < accumulate_share
    alpha_SBG[0] = False
    omega_SBG = torch.rand(sequence_length, B, G, generator=generator) + 1e-3
    return k_SBGD, v_SBGD, alpha_SBG, omega_SBG


def run_steps(k_SBGD, v_SBGD, alpha_SBG, omega_SBG, window_size, state=None, start=0):
    """Every position by ``update_segments``: the means of each step, and the last state."""
    if state is None:
        # Stale memory of a former sequence must not matter.
        state = torch.full((B, G, *state_shape(D, window_size)), 1e6)
    means = []
    for t in range(start, len(k_SBGD)):
        position_B = torch.full((B,), t)
        state, k_BGD, v_BGD = update_segments(state, k_SBGD[t], v_SBGD[t], alpha_SBG[t], omega_SBG[t], position_B)
        means.append((k_BGD, v_BGD))
    return state, torch.stack([k for k, _ in means]), torch.stack([v for _, v in means])


@pytest.mark.parametrize("accumulate_share", [0.0, 0.5, 0.9, 1.1])
@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("sequence_length", [1, 63])
def test_steps_equal_pooling(sequence_length, window_size, accumulate_share):
    tokens = random_tokens(sequence_length, accumulate_share)
    _, k_means, v_means = run_steps(*tokens, window_size)
    k_SBGD, v_SBGD, alpha_SBG, omega_SBG = tokens
    expected = pool_kv(k_SBGD, v_SBGD, alpha_SBG.float(), omega_SBG, window_size)
    torch.testing.assert_close(k_means, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v_means, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("accumulate_share", [0.0, 0.5, 0.9, 1.1])
@pytest.mark.parametrize("window_size", WINDOWS)
def test_a_prompt_leaves_the_state_of_its_steps(window_size, accumulate_share):
    """1. The state after a prompt of each length, 2. one more token from there: both equal to steps alone."""
    tokens = random_tokens(40, accumulate_share, seed=1)
    length_B = torch.tensor([17, 39])
    state = open_segment_state(*tokens, length_B, window_size)
    for row, length in enumerate(length_B.tolist()):
        expected, _, _ = run_steps(*(x[:length] for x in tokens), window_size)
        after, _, _ = run_steps(*(x[: length + 1] for x in tokens), window_size, expected, start=length)
        continued, _, _ = run_steps(*(x[: length + 1] for x in tokens), window_size, state, start=length)
        torch.testing.assert_close(continued[row], after[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("accumulate_share", [0.0, 0.6, 1.1])
def test_segment_ends_are_where_the_next_token_appends(accumulate_share):
    _, _, alpha_SBG, _ = random_tokens(31, accumulate_share, seed=2)
    length_B = torch.tensor([31, 9])
    position_BGT, cache_seqlens_BG = segment_ends(alpha_SBG, length_B)
    for row, length in enumerate(length_B.tolist()):
        for head in range(G):
            appends = [t for t in range(length) if not alpha_SBG[t, row, head]]
            expected = [t - 1 for t in appends[1:]] + [length - 1]
            assert cache_seqlens_BG[row, head] == len(expected)
            assert position_BGT[row, head, : len(expected)].tolist() == expected


def test_segment_ends_of_a_single_token():
    alpha_SBG, length_B = torch.zeros(1, B, G, dtype=torch.bool), torch.ones(B, dtype=torch.int64)
    position_BGT, cache_seqlens_BG = segment_ends(alpha_SBG, length_B)
    assert position_BGT.tolist() == [[[0]] * G] * B
    assert cache_seqlens_BG.tolist() == [[1] * G] * B
