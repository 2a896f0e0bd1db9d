"""Megatron's attention on a rank, as its engine was adapted and as it was.

Legend: S sequence, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

S, B, N, G, D = 37, 2, 6, 2, 16


def answers(dtype: str, settings: dict[str, Any], kind: str = "causal", with_mask: bool = False) -> dict[str, Any]:
    """Output and gradients of q, k, v: ``adapted`` and ``original``, and whether torch's kernel was ``called``.

    Args:
        dtype: of the inputs.
        settings: of Megatron's configuration.
        kind: of the mask that the layer is made for.
        with_mask: a mask is given, which hides the diagonal.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    parallel_state._set_global_memory_buffer()
    layer, called = _layer(settings, kind), _count_calls()
    mask = torch.eye(S, dtype=torch.bool)[None, None] if with_mask else None
    adapted = DotProductAttention.forward
    found = {"adapted": _run(layer, adapted, mask, dtype), "called": bool(called)}
    return found | {"original": _run(layer, adapted._megatron_dmc_original, mask, dtype)}


def _layer(settings: dict[str, Any], kind: str) -> Any:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 2, "hidden_size": N * D, "num_attention_heads": N, "num_query_groups": G}
    config = TransformerConfig(**{**sizes, "kv_channels": D, "attention_dropout": 0.0, **settings})
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    return DotProductAttention(config, 2, AttnMaskType[kind], "self", pg_collection=groups)


def _count_calls() -> list[None]:
    """A list that grows when torch's kernel is called."""
    called, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        called.append(None)
        return kernel(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = counted
    return called


def _run(layer: Any, forward: Any, mask: torch.Tensor | None, dtype: str) -> list[np.ndarray]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 7)
    generator = torch.Generator().manual_seed(5)
    q, k, v, grad = (torch.randn(S, B, heads, D, generator=generator) for heads in (N, G, G, N))
    inputs = [x.to(getattr(torch, dtype)).requires_grad_() for x in (q, k, v)]
    out = forward(layer, *inputs, mask)
    out.backward(grad.flatten(2).to(out.dtype))
    return [x.detach().float().numpy() for x in (out, *(x.grad for x in inputs))]
