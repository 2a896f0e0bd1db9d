"""What a student learns from: the model before its retrofit, run over the same micro-batch on the same ranks.

Its hidden states ride with the student's. Every pipeline stage runs its layers twice, first the teacher's without a
graph, then the student's; what it sends on holds the rows of both. So whatever spreads the student over ranks spreads
the teacher, and only logits of the same ranks are compared.

Where adapters alone learn, the teacher is the student with eviction off, and nothing is kept twice. Otherwise it is a
frozen copy of the model that the retrofit began with, outside of the student's modules: nobody trains, wraps or saves
it.

Legend: S sequence (local), B batch, H hidden, V vocabulary of this rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.stages import OFF
from megatron_dmc.training.model.microbatch import Microbatch


def logits_of(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **unused: Any) -> Tensor:
    """Megatron's ``output_processor`` that leaves logits as they are, [S, B, V]."""
    return output_layer(hidden_states, weight=output_weight)[0]


@torch.no_grad()
def run_teacher(
    teacher: GPTModel, received_SBH: Tensor | None, microbatch: Microbatch, *args: Any, **kwargs: Any
) -> Tensor:
    """One stage of the teacher.

    Args:
        teacher: this stage's part of it.
        received_SBH: from the stage before; None on the first.
        microbatch: of the student.
        *args, **kwargs: of ``GPTModel.forward``.

    Returns:
        logits [S, B, V] on the last stage, hidden states on the others.
    """
    teacher.decoder.set_input_tensor(received_SBH)
    extra = {"attention_bias": microbatch.for_teacher()}
    return GPTModel.forward(teacher, *args, extra_block_kwargs=extra, output_processor=logits_of, **kwargs)


def with_teacher(student_SBH: Tensor, teacher_SBH: Tensor) -> Tensor:
    """What a stage sends on: the student's rows, with one more where they carry statistics, then the teacher's."""
    return torch.cat([student_SBH, teacher_SBH.detach()])


def without_teacher(received_SBH: Tensor) -> tuple[Tensor, Tensor]:
    """The student's rows and the teacher's, into which no gradient flows."""
    teachers = len(received_SBH) // 2
    return received_SBH[:-teachers], received_SBH[-teachers:].detach()


def build_teacher(model_config: Any, *args: Any, **kwargs: Any) -> GPTModel:
    """This stage's part of the frozen copy, without its weights yet.

    Args:
        model_config: of the student; its layer spec builds the teacher's layers too.
        *args, **kwargs: of ``build_model``.
    """
    transformer = copy.copy(model_config.transformer)
    transformer.dmc = DMCConfig(stage=OFF.name)
    transformer.perform_initialization = False
    config = copy.copy(model_config)
    config.transformer = transformer
    teacher = GPTModelBuilder(config).build_model(*args, **kwargs)
    teacher.requires_grad_(False)
    return teacher.to(device=torch.cuda.current_device(), dtype=transformer.params_dtype).eval()


def load_teachers(teachers: list[GPTModel], directory: str) -> None:
    """Fill all chunks of this rank; every rank must call it.

    Args:
        teachers: the chunks.
        directory: one iteration of a ``torch_dist`` checkpoint, which was checked.
    """
    metadata = dist_checkpointing.load_content_metadata(directory) or {}
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = {f"model{place}": teacher.sharded_state_dict(metadata=metadata) for place, teacher in enumerate(teachers)}
    loaded = dist_checkpointing.load(wanted, directory)
    for place, teacher in enumerate(teachers):
        teacher.load_state_dict(loaded[f"model{place}"])
