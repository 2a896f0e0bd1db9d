"""What a model will take, beside what it takes, and what is refused."""

import pytest
import torch

from megatron_dmc import methods
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.memory_need import DeviceMemory, ModelMemory, Need
from megatron_dmc.models.config import ModelConfig
from tests.inference.tiny_model import RandomSource, tiny_llama

GIB = 1 << 30
LLAMA_2_7B = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_hidden_size=11008,
    vocab_size=32000,
    max_position_embeddings=4096,
)
H200 = DeviceMemory(available=139 * GIB, total=140 * GIB)


def memory_of(settings=None, method=None, block_size=32):
    return ModelMemory(LLAMA_2_7B, torch.bfloat16, method or methods.method_of(settings), block_size)


def test_a_known_model():
    """Llama 2 7B: 12.55 GiB of weights, 512 KiB of cache per token."""
    memory = memory_of()
    assert memory.weights / GIB == pytest.approx(12.55, abs=0.01)
    assert memory.cache([4096]) == 2 * GIB
    assert memory.cache([4096, 100]) == 2 * GIB + 128 * 512 * 1024
    assert 0.5 * GIB < memory.workspace(4096, 1) < 2 * GIB


def test_a_compressed_cache_is_expected_by_its_method():
    dmc = memory_of(DMCConfig(target_cr=8.0))
    assert dmc.cache([4096]) - dmc.pool(0, 1) == 2 * GIB // 8
    assert 1 << 20 <= dmc.pool(0, 1) < 1.1 * (1 << 20), "float32 sums of the open segments"
    assert memory_of(method=methods.policy("tova", 255)).cache([4096, 20]) == pytest.approx((256 + 32) << 19, rel=1e-2)


def test_weights_are_those_that_are_loaded():
    for tied in (False, True):
        source = RandomSource(tiny_llama(tie_word_embeddings=tied))
        stored = sum(tensor.nbytes for tensor in source.tensors.values())
        # A CPU multiplies by a copy of a tied embedding that is laid out for it.
        copied = source.tensors["model.embed_tokens.weight"].nbytes if tied else 0
        assert ModelMemory(source.config, torch.float32, methods.Dense(), 32).weights == stored + copied


def test_a_pool_fills_the_share_of_the_device():
    memory = memory_of(DMCConfig(target_cr=8.0))
    texts = [4096] * 1000
    blocks = memory.num_blocks(GIB, texts, 4096, H200, 0.9)
    filled = memory.weights + memory.pool(blocks, len(texts)) + GIB
    assert 0 <= 0.9 * 140 * GIB - GIB - filled < memory.shape.block_bytes + 1
    assert memory.num_blocks(GIB, texts, 4096, H200, 0.5) < blocks


def test_a_pool_is_no_larger_than_its_texts():
    memory = memory_of()
    blocks = memory.num_blocks(GIB, [100, 1000], 1000, H200, 0.9)
    assert 32 * 32 * (4 + 32) <= blocks <= 32 * 32 * (4 + 32 + 2 * 2)


def test_what_does_not_fit_is_refused_with_what_to_lower():
    small = DeviceMemory(available=10 * GIB, total=12 * GIB)
    need = r"13.6 GiB \(12.6 GiB of weights, 64.0 MiB of cache, 1.0 GiB of workspace\)"
    told = " are needed for one text of 128 tokens, 8.8 GiB may be used .*: lower --max-new-tokens"
    with pytest.raises(ValueError, match=need + told):
        memory_of().num_blocks(GIB, [4096, 128], 128, small, 0.9)
    with pytest.raises(ValueError, match="--memory-fraction 1.5: must be in"):
        memory_of().num_blocks(GIB, [128], 128, H200, 1.5)


def test_a_need_beyond_the_memory_is_refused():
    need = Need(GIB, 2 * GIB, GIB // 2)
    said = need.require(DeviceMemory(4 * GIB, 8 * GIB), "never")
    assert said.startswith("memory: about 3.5 GiB (1.0 GiB of weights")
    with pytest.raises(ValueError, match=r"about 3.5 GiB .* are needed, 3.0 GiB are free: lower --batch-size"):
        need.require(DeviceMemory(3 * GIB, 8 * GIB), "lower --batch-size")


def test_a_gpu_says_what_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    assert DeviceMemory.of(torch.device("cuda", 1)) == (3 * GIB, 8 * GIB)


def test_this_machine_has_memory():
    here = DeviceMemory.of(torch.device("cpu"))
    assert 0 < here.available <= here.total
