"""Masked attention: pieces through stock kernels against all scores in one matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import HIDDEN, bias, blockwise, flash, masked_attention, merged
from megatron_dmc.ops.masked_attention.reference import masked_attention as plain_attention
from tests.ops.comparison import assert_same

HEADS = {"MHA": (2, 2), "GQA": (4, 2), "MQA": (3, 1)}


def attention_inputs(
    length: int, heads: tuple[int, int] = (4, 2), head_dim: int = 16, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v and a key bias."""
    torch.manual_seed(0)
    num_heads, num_kv_heads = heads
    q = torch.randn(length, 2, num_heads, head_dim)
    k, v = torch.randn(2, length, 2, num_kv_heads, head_dim)
    key_bias = F.logsigmoid(10 * torch.randn(length, 2, num_kv_heads))
    return [x.to(dtype) for x in (q, k, v, key_bias)]


def geometry_of(inputs: list[Tensor], query_starts: object = None, documents: object = None) -> Geometry:
    q, k = inputs[:2]
    return Geometry(len(k), k.shape[1], query_starts=query_starts, num_queries=len(q), documents=documents)


def assert_equals_reference(inputs: list[Tensor], free_window: int | None = 0, **places: object) -> None:
    geometry = geometry_of(inputs, **places)
    forms = (masked_attention, plain_attention)
    assert_same(*(lambda *x, form=form: form(*x, geometry, free_window=free_window) for form in forms), inputs)


@pytest.mark.parametrize("window", [None, 0, 1, 12, 16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", [1, 63, 111])
def test_equals_dense_attention(length: int, heads: str, window: int | None) -> None:
    assert_equals_reference(attention_inputs(length, HEADS[heads]), free_window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 100, 128])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    assert_equals_reference(attention_inputs(63, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("window", [None, 0, 5])
@pytest.mark.parametrize("query_starts", [[0, 45], [15, 30], [30, 0], [7]])
def test_chunks_of_queries(query_starts: list[int], window: int | None) -> None:
    q, *others = attention_inputs(60)
    documents = [[0, 10, 40], [0]]
    for rows in (None, documents):
        inputs = [q[: 15 * len(query_starts)], *others]
        assert_equals_reference(inputs, query_starts=query_starts, free_window=window, documents=rows)


@pytest.mark.parametrize("window", [0, 5])
def test_hidden_keys_have_no_weight(window: int) -> None:
    q, k, v, key_bias = attention_inputs(70, dtype=torch.float32)
    key_bias = torch.where(key_bias < -1, HIDDEN, 0.0)
    geometry = Geometry(70, 2)
    output = masked_attention(q, k, v, key_bias, geometry, free_window=window)
    expected = plain_attention(q, k, v, torch.where(key_bias < 0, -torch.inf, 0.0), geometry, free_window=window)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 0, 4])
def test_blocks_stand_in_for_flash(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "kernel_for", lambda q: blockwise)
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    assert_equals_reference(attention_inputs(75), free_window=window, documents=[[0, 20], [0]])


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "kernel", "reason"),
    [
        ("cpu", torch.float64, 17, flash.CpuFlash, "stock"),
        ("cuda", torch.bfloat16, 128, flash.CudaFlash, "FlashAttention 2"),
        ("cuda", torch.float32, 128, blockwise, "not torch.float32"),
        ("cuda", torch.bfloat16, 100, blockwise, "in eights, not 100"),
        ("cuda", torch.float16, 264, blockwise, "up to 256"),
        ("mps", torch.float16, 64, blockwise, "no flash attention is known"),
    ],
)
def test_choice_of_kernel(device: str, dtype: torch.dtype, head_dim: int, kernel: object, reason: str) -> None:
    chosen, why = flash.choose(device, dtype, head_dim)
    assert chosen is kernel
    assert reason in why


def test_calls_of_the_gpu_kernel_fit_its_signature() -> None:
    """On tensors without data; the numbers need a GPU."""
    with FakeTensorMode():
        q, grad = (torch.empty(2, 8, 63, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.empty(2, 2, 63, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        output, lse = flash.CudaFlash.forward(q, k, v, True, 0.125)
        grads = flash.CudaFlash.backward(grad, q, k, v, output, lse, True, 0.125)
    assert output.shape == q.shape
    assert lse.shape == q.shape[:-1]
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("head_dim", [64, 100, 128])
@pytest.mark.parametrize("value", [-0.01, -1.0, -20.0, HIDDEN])
def test_folded_bias_reaches_the_score(head_dim: int, value: float) -> None:
    """In bfloat16 the relative error of the bias is that of one rounding; float16 holds HIDDEN."""
    for dtype, precision in ((torch.float64, 1e-15), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        q, k = torch.zeros(2, 1, 1, 1, head_dim, dtype=dtype)
        bias.fold(q, k, torch.full((1, 1, 1), value, dtype=torch.float64), head_dim**-0.5)
        score = (q.double() * k.double()).sum() * head_dim**-0.5
        assert score.item() == pytest.approx(value, rel=precision)


@pytest.mark.parametrize(("value", "expected"), [(-1e-39, 0.0), (-1e-21, 0.0), (-39.0, -39.0), (-90.0, HIDDEN)])
def test_folded_bias_makes_no_denormal_numbers(value: float, expected: float) -> None:
    """They would make flash attention on a CPU several times slower."""
    q, k = torch.zeros(2, 1, 1, 1, 64)
    bias.fold(q, k, torch.full((1, 1, 1), value), 0.125)
    assert k[..., -1].item() == expected


def test_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(7, head_dim=2)]
    geometry = geometry_of(inputs, documents=[[0, 3], [0]])
    torch.autograd.gradcheck(lambda *x: masked_attention(*x, geometry, free_window=2), inputs, fast_mode=True)


def test_no_gradient_where_none_is_asked() -> None:
    q, k, v, key_bias = attention_inputs(20)
    assert not masked_attention(q, k, v, key_bias, Geometry(20, 2)).requires_grad
    v.requires_grad_()
    masked_attention(q, k, v, key_bias, Geometry(20, 2)).sum().backward()
    assert v.grad is not None
    assert q.grad is None


def test_wrong_inputs_are_named() -> None:
    inputs = attention_inputs(12)
    q, k, v, key_bias = inputs
    geometry = geometry_of(inputs)
    with pytest.raises(ValueError, match="free_window=-1: must be >= 0"):
        masked_attention(q, k, v, key_bias, geometry, free_window=-1)
    with pytest.raises(ValueError, match="key bias None"):
        masked_attention(q, k, v, None, geometry)
    with pytest.raises(ValueError, match="query heads must be a multiple"):
        masked_attention(q[:, :, :3], k, v, key_bias, geometry)
    with pytest.raises(ValueError, match=r"keys and rows: the geometry was made for \(9, 9, 2\)"):
        masked_attention(q, k, v, key_bias, Geometry(9, 2))
