"""One micro-batch through the model, as Megatron's schedules call it.

Legend: B batch, S sequence (local under context parallelism).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from torch import Tensor

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.rope import inverse_frequencies
from megatron_dmc.stages import accumulate_fraction, find_stage
from megatron_dmc.training.losses import compression_loss, sum_over_tokens
from megatron_dmc.training.model.microbatch import Microbatch

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens", "max_seqlen")


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
    """Run one micro-batch.

    Args:
        data_iterator: of this data-parallel rank; unused on tensor-parallel ranks other than 0.
        model: one (wrapped) model chunk.
        return_schedule_plan: must be False; the plan belongs to mixtures of experts.

    Returns:
        the output of the chunk and the loss function of its last stage.
    """
    assert not return_schedule_plan
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = _next_batch(data_iterator, vp_stage, model.training)
    tokens, labels, mask = batch["tokens"], batch["labels"], batch["loss_mask"]
    config = get_attr_wrapped_model(model, "config")
    if not config.dmc.retrofits:
        output = model(tokens, batch["position_ids"], None, labels=labels, loss_mask=mask)
        return output, functools.partial(_loss, mask, None, config)
    microbatch = _microbatch(model, config, batch)
    output = model(tokens, batch["position_ids"], None, labels=labels, loss_mask=mask, microbatch=microbatch)
    return output, functools.partial(_loss, mask, microbatch, config)


def _next_batch(data_iterator: Any, vp_stage: int | None, training: bool) -> dict[str, Any]:
    """The batch of this rank: read on one rank, broadcast over tensor parallelism, cut over context parallelism."""
    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    with_documents = args.dataloader_inter_document_masking
    if not (is_first or is_last or with_documents):
        return dict.fromkeys(_BATCH_KEYS)
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        read = next(data_iterator)
        batch = {key: read[key].cuda(non_blocking=True) if key in read else None for key in _BATCH_KEYS}
        # Documents are cut by position, not padded to a multiple of the ranks.
        batch["cu_seqlens_padded"] = batch["cu_seqlens"]
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        has_cu_seqlens=with_documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=is_first,
        is_pipeline_last_stage=is_last,
    )
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
        use_per_sequence_balancing=True,
    )


def _microbatch(model: Any, config: Any, batch: dict[str, Any]) -> Microbatch:
    """Coordinates, targets and documents of this micro-batch; known on every stage without its tokens."""
    args = get_args()
    settings = config.dmc
    step, steps = args.curr_iteration, args.train_iters
    stage = find_stage(settings.stage)
    ratio = stage.target_cr(step, settings.ramp_steps(steps), settings.target_cr)
    return Microbatch(
        geometry=_geometry(model, config, batch),
        step=step,
        sequence_B=_sequence_ordinals(model) if model.training and settings.compresses else None,
        target_fraction=accumulate_fraction(ratio),
        neuron_scale=stage.neuron_scale(step, steps, settings.zero_out_fraction),
        gradient_scale=config.dmc_gradient_scale,
        observer=config.dmc_observer,
    )


def _geometry(model: Any, config: Any, batch: dict[str, Any]) -> Geometry:
    """Positions of this micro-batch: under context parallelism rank r of cp has the chunks r and 2 cp - 1 - r."""
    args = get_args()
    device = torch.device(torch.cuda.current_device())
    frequencies = inverse_frequencies(config.kv_channels, config.rope_theta, config.rope_stretch).to(device)
    length, size = args.seq_length, parallel_state.get_context_parallel_world_size()
    chunk, rank = length // (2 * size), parallel_state.get_context_parallel_rank()
    return Geometry(
        length,
        args.micro_batch_size if model.training else args.eval_micro_batch_size,
        frequencies,
        query_starts=None if size == 1 else (rank * chunk, (2 * size - 1 - rank) * chunk),
        num_queries=length // size,
        documents=_documents(batch["cu_seqlens"], length),
    )


def _sequence_ordinals(model: Any) -> Tensor:
    """Positions of this micro-batch's sequences in the order of the training data, int64 [B].

    Computed from counters, since middle pipeline stages receive no batch. Every step, also one that is repeated to
    validate a result, runs each chunk once per micro-batch, in order.
    """
    args = get_args()
    chunk = get_attr_wrapped_model(model, "count_microbatch", return_model_obj=True)
    index = chunk.count_microbatch(args.curr_iteration) % get_num_microbatches()
    ranks = parallel_state.get_data_parallel_world_size()
    first = args.consumed_train_samples + args.micro_batch_size * (
        index * ranks + parallel_state.get_data_parallel_rank()
    )
    return torch.arange(first, first + args.micro_batch_size, dtype=torch.int64, device=torch.cuda.current_device())


def _documents(cu_seqlens: Tensor | None, sequence_length: int) -> list[list[int]] | None:
    """Start positions of the documents in each row, from Megatron's padded cumulative lengths [B, S + 1]."""
    if cu_seqlens is None:
        return None
    rows = cu_seqlens.tolist()
    return [sorted({start for start in row if start < sequence_length}) for row in rows]


def _loss(mask_BS: Tensor, microbatch: Microbatch | None, config: Any, loss_BS: Tensor) -> Any:
    """Megatron's loss function: sum of the loss of tokens, their number, and what is logged.

    ``loss_BS`` is the LM loss, or with a teacher the divergence from it; then the LM loss is only reported. The
    compression loss is only reported here; its gradient comes from the layers
    (``model.decision_statistics``), or it would count twice.
    """
    loss_sum, num_tokens = sum_over_tokens(loss_BS, mask_BS)
    mean = torch.stack([loss_sum.detach(), num_tokens.float()])
    logged = {"lm loss": mean}
    if microbatch is not None and microbatch.statistics.cross_entropy_BS is not None:
        lm_sum, _ = sum_over_tokens(microbatch.statistics.cross_entropy_BS, mask_BS)
        logged = {"lm loss": torch.stack([lm_sum, num_tokens.float()]), "distillation loss": mean}
    if microbatch is not None and microbatch.statistics.fraction_B is not None:
        fraction_B = microbatch.statistics.fraction_B
        hinge_B = config.dmc.loss_weight * compression_loss(fraction_B, microbatch.target_fraction)
        count = torch.tensor(float(len(fraction_B)), device=fraction_B.device)
        logged |= {
            "compression loss": torch.stack([hinge_B.sum().float(), count]),
            # Tokens over cache entries: pairs are summed over all micro-batches before they are divided.
            "compression ratio": torch.stack([count, (1 - fraction_B).sum().float()]),
            "target ratio": torch.stack([count / (1 - microbatch.target_fraction), count]),
        }
    return loss_sum, num_tokens, logged
