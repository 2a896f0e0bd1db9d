"""The compressed cache: steps against pooling as a loop over time, chunks of tokens against steps.

Legend: S sequence, B batch, G KV heads, D head dim, T packed tokens.
"""

import pytest
import torch

from megatron_dmc.ops.cache_update import entry_places, pool_chunks, state_shape, update_segments
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


def packed(tokens_SB, borders):
    """Part of each sequence, ``borders`` [(start, stop)], one after the other."""
    return [torch.cat([x[start:stop, row] for row, (start, stop) in enumerate(borders)]) for x in tokens_SB]


@pytest.mark.parametrize("accumulate_share", [0.0, 0.5, 0.9, 1.1])
@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("cuts", [(), (1, 4), (17, 39), (25, 2)])
def test_chunks_equal_steps(window_size, accumulate_share, cuts):
    """1. Every token by itself; 2. two chunks of each sequence, cut at another place in each."""
    tokens = random_tokens(40, accumulate_share, seed=1)
    expected_state, k_means, v_means = run_steps(*tokens, window_size)
    cuts = cuts or (40, 40)
    state, found = None, []
    for borders in ([(0, cut) for cut in cuts], [(cut, 40) for cut in cuts]):
        counts = [stop - start for start, stop in borders]
        if any(counts):
            k, v, state = pool_chunks(
                state, *packed(tokens, borders), counts, [start for start, _ in borders], window_size
            )
            found.append([(k_row, v_row) for k_row, v_row in zip(k.split(counts), v.split(counts), strict=True)])
    for row in range(B):
        k, v = (torch.cat([part[row][index] for part in found]) for index in (0, 1))
        torch.testing.assert_close(k, k_means[:, row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, v_means[:, row], atol=1e-5, rtol=1e-5)
    # Slots of the ring outside the open segment are 0 in both.
    torch.testing.assert_close(state, expected_state, atol=1e-4, rtol=1e-5)


def test_a_sequence_that_begins_needs_no_state_beside_one_that_goes_on():
    tokens = random_tokens(12, 0.6, seed=3)
    state = torch.full((B, G, *state_shape(D, 0)), 1e6)
    state[1] = run_steps(*(x[:5] for x in tokens), 0)[0][1]
    k, _, after = pool_chunks(state, *packed(tokens, [(0, 8), (5, 12)]), [8, 7], [0, 5], 0)
    expected_state, k_means, _ = run_steps(*tokens, 0)
    torch.testing.assert_close(k[:8], k_means[:8, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(k[8:], k_means[5:, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after[1], expected_state[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("accumulate_share", [0.0, 0.6, 1.1])
def test_entries_are_written_where_the_next_token_appends(accumulate_share):
    _, _, alpha_SBG, _ = random_tokens(31, accumulate_share, seed=2)
    counts, length_BG = [31, 9], torch.tensor([[0, 0, 0], [4, 1, 7]], dtype=torch.int32)
    alpha_SBG[0, 1] = accumulate_share > 0.5  # goes on: its first token may accumulate into what is there
    (alpha_TG,) = packed([alpha_SBG], [(0, 31), (0, 9)])
    entry_TG = entry_places(alpha_TG, counts, length_BG)
    for row, entries in enumerate(entry_TG.split(counts)):
        for head in range(G):
            length, expected = int(length_BG[row, head]), []
            for t in range(counts[row]):
                length += not alpha_SBG[t, row, head]
                is_last = t == counts[row] - 1 or not alpha_SBG[t + 1, row, head]
                expected.append(length - 1 if is_last else -1)
            assert entries[:, head].tolist() == expected
