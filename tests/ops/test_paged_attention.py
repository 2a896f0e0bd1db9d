"""Decode attention over block tables that differ per KV head: PyTorch form against the plain one."""

import pytest
import torch

from megatron_dmc.ops.paged_attention import paged_attention, reference


def random_cache(batch, num_kv_heads, head_dim, block_size, longest, dtype=torch.float32):
    """Blocks dealt at random, unwritten slots NaN, lengths from 1 to ``longest``."""
    generator = torch.Generator().manual_seed(3)
    width = -(-longest // block_size)
    num_blocks = batch * num_kv_heads * width
    table = torch.randperm(num_blocks, generator=generator).view(batch, num_kv_heads, width).to(torch.int32)
    lengths = torch.randint(1, longest + 1, (batch, num_kv_heads), generator=generator, dtype=torch.int32)
    lengths[0, 0], lengths[-1, -1] = longest, 1
    k_blocks = torch.full((num_blocks, block_size, head_dim), torch.nan, dtype=dtype)
    v_blocks = k_blocks.clone()
    for sequence in range(batch):
        for head in range(num_kv_heads):
            for entry in range(int(lengths[sequence, head])):
                block = table[sequence, head, entry // block_size]
                k_blocks[block, entry % block_size] = torch.randn(head_dim, generator=generator)
                v_blocks[block, entry % block_size] = torch.randn(head_dim, generator=generator)
    return k_blocks, v_blocks, table, lengths


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("block_size", "longest"), [(1, 5), (4, 1), (16, 63)])
@pytest.mark.parametrize("head_dim", [16, 100])
def test_equals_reference(num_query_heads, num_kv_heads, block_size, longest, head_dim):
    cache = random_cache(3, num_kv_heads, head_dim, block_size, longest)
    q_BND = torch.randn(3, num_query_heads, head_dim, generator=torch.Generator().manual_seed(4))
    output = paged_attention(q_BND, *cache)
    torch.testing.assert_close(output, reference.paged_attention(q_BND, *cache), atol=1e-5, rtol=1e-5)


def test_bfloat16_rounds_only_at_the_end():
    cache = random_cache(3, 2, 64, 16, 40, dtype=torch.bfloat16)
    q_BND = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    output = paged_attention(q_BND, *cache)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, reference.paged_attention(q_BND, *cache), atol=2e-2, rtol=2e-2)
