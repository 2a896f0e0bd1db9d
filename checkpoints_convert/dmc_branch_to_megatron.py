"""``import-dmc-release``: NVIDIA's published DMC checkpoints become ours, for Megatron and for Hugging Face.

They are one pickled ``mp_rank_00/model_optim_rng.pt``, beside ``latest_checkpointed_iteration.txt`` or under
``iter_*``, without settings that could be read from them: those are published constants.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from checkpoints_convert.hf_writer import write_hugging_face
from checkpoints_convert.megatron_to_hf import state_vocabulary
from checkpoints_convert.megatron_writer import ANY_LAYOUT, write_megatron
from checkpoints_convert.model_card import CardFacts
from checkpoints_convert.options import DEFAULTS, Options
from checkpoints_convert.verify import check_conversion
from megatron_dmc.checkpoint.guard import examine_location
from megatron_dmc.checkpoint.locate import LEGACY, locate
from megatron_dmc.checkpoint.source import MegatronSource
from megatron_dmc.config import BF16_DECISION_THRESHOLD, BF16_IMPORTANCE_EPSILON, DMCConfig
from megatron_dmc.stages import CONSOLIDATE
from megatron_dmc.support.files import new_directory

MEGATRON_FOLDER, HUGGING_FACE_FOLDER = "megatron", "hugging_face"
RELEASE_WINDOW_SIZE = 12
LLAMA2_VOCAB_SIZE = 32000


def release_settings(target_cr: float) -> DMCConfig:
    """The settings of the published models: the authors compute sigmoid(logit) > 0.5 in bfloat16."""
    return DMCConfig(
        stage=CONSOLIDATE.name,
        target_cr=target_cr,
        window_size=RELEASE_WINDOW_SIZE,
        decision_bias=5.0,
        decision_threshold=BF16_DECISION_THRESHOLD,
        importance_epsilon=BF16_IMPORTANCE_EPSILON,
    )


def import_dmc_release(
    source: Path | str,
    destination: Path | str,
    *,
    target_cr: float,
    tokenizer: Path | str | None = None,
    vocab_size: int | None = None,
    options: Options = DEFAULTS,
) -> Path:
    """Convert a published DMC checkpoint to ``DST/megatron`` (``torch_dist``) and ``DST/hugging_face``.

    Args:
        source: the downloaded repository.
        destination: a new directory.
        target_cr: compression ratio in the name of the model (8 for Llama-2-7B-DMC-8x).
        tokenizer: Llama 2's, which the release does not hold: sentencepiece file or Hugging Face directory.
        vocab_size: for a model with another vocabulary than Llama 2.

    Raises:
        ValueError: not a checkpoint of that layout, damaged or hostile, or a destination that exists.
        CheckFailed: the comparison failed or could not be made.
    """
    location = locate(source)
    if location.format != LEGACY:
        raise ValueError(f"{source} holds no mp_rank_00/model_optim_rng.pt: not the layout of NVIDIA's DMC releases")
    model = MegatronSource(examine_location(location))
    if not model.states_vocab_size and vocab_size is None:
        vocab_size = LLAMA2_VOCAB_SIZE
    state_vocabulary(model, vocab_size)
    model.dmc = release_settings(target_cr)
    facts = CardFacts(model.dmc, model.saved.iteration)
    check = partial(check_conversion, model, max_memory=options.max_memory)
    with new_directory(Path(destination), overwrite=options.overwrite) as partial_directory:
        megatron, hugging_face = partial_directory / MEGATRON_FOLDER, partial_directory / HUGGING_FACE_FOLDER
        write_megatron(model, megatron, "megatron", layout=ANY_LAYOUT, options=options, check=check)
        tokenizer_path = None if tokenizer is None else Path(tokenizer)
        write_hugging_face(
            model, hugging_face, "hugging face", facts=facts, tokenizer=tokenizer_path, options=options, check=check
        )
    return Path(destination)
