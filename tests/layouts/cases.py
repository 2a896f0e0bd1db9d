"""The layouts, and the models trained in them."""

from __future__ import annotations

from dataclasses import dataclass

from tests.layouts.laboratory import Variant

TENSOR = ("--tensor-model-parallel-size", "2")
SEQUENCE = (*TENSOR, "--sequence-parallel")
PIPELINE = ("--pipeline-model-parallel-size", "2")
INTERLEAVED = (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1")
CONTEXT = ("--context-parallel-size", "2")
DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer",)
OVERLAP = (*DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather")
RECOMPUTE_UNIFORM = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
RECOMPUTE_BLOCK = ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1")
RECOMPUTE_SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp")
PER_TOKEN = ("--calculate-per-token-loss",)


@dataclass(frozen=True)
class Layout:
    """Ranks and the flags that share the work among them."""

    ranks: int
    switches: tuple[str, ...] = ()


LAYOUTS = {
    "tp2": Layout(2, TENSOR),
    "tp2_sp": Layout(2, SEQUENCE),
    "pp2": Layout(2, PIPELINE),
    "pp4": Layout(4, ("--pipeline-model-parallel-size", "4")),
    "pp2_vp2": Layout(2, INTERLEAVED),
    "pp2_vp2_groups": Layout(2, (*INTERLEAVED, "--microbatch-group-size-per-virtual-pipeline-stage", "4")),
    "pp2_uneven": Layout(2, (*PIPELINE, "--decoder-first-pipeline-num-layers", "1")),
    "cp2": Layout(2, CONTEXT),
    "cp4": Layout(4, ("--context-parallel-size", "4")),
    "dp2": Layout(2),
    "dp2_distributed_optimizer": Layout(2, DISTRIBUTED_OPTIMIZER),
    "dp2_distributed_optimizer_overlap": Layout(2, OVERLAP),
    "tp2_pp2": Layout(4, (*TENSOR, *PIPELINE)),
    "tp2_sp_pp2": Layout(4, (*SEQUENCE, *PIPELINE)),
    "tp2_sp_pp2_vp2": Layout(4, (*SEQUENCE, *INTERLEAVED)),
    "cp2_tp2": Layout(4, (*CONTEXT, *TENSOR)),
    "cp2_tp2_sp": Layout(4, (*CONTEXT, *SEQUENCE)),
    "cp2_pp2": Layout(4, (*CONTEXT, *PIPELINE)),
    "dp2_pp2": Layout(4, PIPELINE),
    "dp2_tp2_distributed_optimizer": Layout(4, (*TENSOR, *OVERLAP)),
    "dp2_pp2_vp2_distributed_optimizer": Layout(4, (*INTERLEAVED, *OVERLAP)),
    "dp2_cp2_distributed_optimizer": Layout(4, (*CONTEXT, *DISTRIBUTED_OPTIMIZER)),
    "recompute_uniform": Layout(1, RECOMPUTE_UNIFORM),
    "recompute_block": Layout(1, RECOMPUTE_BLOCK),
    "recompute_selective": Layout(1, RECOMPUTE_SELECTIVE),
    "recompute_uniform_tp2_sp_pp2": Layout(4, (*RECOMPUTE_UNIFORM, *SEQUENCE, *PIPELINE)),
    "recompute_uniform_pp2_vp2": Layout(2, (*RECOMPUTE_UNIFORM, *INTERLEAVED)),
    "recompute_uniform_cp2": Layout(2, (*RECOMPUTE_UNIFORM, *CONTEXT)),
    "recompute_selective_pp2": Layout(2, (*RECOMPUTE_SELECTIVE, *PIPELINE)),
    "one_microbatch": Layout(1, ("--micro-batch-size", "8")),
    "eight_microbatches": Layout(1, ("--micro-batch-size", "1")),
    "per_token_loss": Layout(1, PER_TOKEN),
    "per_token_loss_tp2_sp": Layout(2, (*PER_TOKEN, *SEQUENCE)),
    "per_token_loss_dp2_pp2": Layout(4, (*PER_TOKEN, *PIPELINE)),
    "per_token_loss_cp2_pp2": Layout(4, (*PER_TOKEN, *CONTEXT, *PIPELINE)),
}

WHOLE_SEGMENT = Variant()
WINDOW = Variant(run=("--dmc-window-size", "12"))
PER_LAYER = Variant(run=("--dmc-decisions-per", "layer"))
DOCUMENTS = Variant(run=("--dataloader-inter-document-masking",))
MULTI_HEAD = Variant(model=(("num_query_groups", 8),))
MULTI_QUERY = Variant(model=(("num_query_groups", 1),))
TIED = Variant(tied=True)
ZERO_OUT = Variant(stage="zero_out")
ZERO_OUT_DOCUMENTS = Variant(stage="zero_out", run=("--dataloader-inter-document-masking",))
RETROFIT = Variant(stage="retrofit")
DISTILLED = Variant(run=("--dmc-distill", "forward"), is_taught=True)
DISTILLED_ZERO_OUT = Variant(stage="zero_out", run=("--dmc-distill", "reverse"), is_taught=True)
DISTILLED_TIED = Variant(run=("--dmc-distill", "forward"), is_taught=True, tied=True)
_DMS = ("--dmc-method", "dms", "--dmc-window-size", "6")
_ADAPTER = (*_DMS, "--dmc-decision-source", "adapter")
_ALONE = ("--dmc-train", "decisions", "--dmc-distill", "forward")
DMS = Variant(method=_DMS, run=("--dmc-distill", "reverse"), is_taught=True, target_cr=1.58)
ADAPTER = Variant(method=_ADAPTER, run=_ALONE)
ADAPTER_WITH_ALL = Variant(method=_ADAPTER, run=("--dmc-decided-by", "next"))
ADAPTER_FROM_PLAIN = Variant(stage="retrofit", method=_ADAPTER, run=_ALONE)
BFLOAT16 = Variant(run=("--bf16",))
OFF = Variant(stage="off")
CONTROL = Variant(stage="off", model=(("vocab_size", 256),))
"""At stage ``off``, with a vocabulary that needs no padding in any layout: Megatron's own loss counts the padding."""
