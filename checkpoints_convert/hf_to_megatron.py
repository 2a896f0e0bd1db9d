"""``import``: a Hugging Face Llama becomes a Megatron checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from checkpoints_convert.megatron_writer import ANY_LAYOUT, MegatronLayout, write_megatron
from checkpoints_convert.options import DEFAULTS, Options
from checkpoints_convert.plan import plan_lines
from checkpoints_convert.verify import check_conversion
from megatron_dmc.checkpoint.source import HuggingFaceSource, open_source
from megatron_dmc.models.fusion import MegatronShape, padded_vocab_size


def import_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    layout: MegatronLayout = ANY_LAYOUT,
    options: Options = DEFAULTS,
) -> Path:
    """Convert a Hugging Face directory to a Megatron checkpoint.

    Args:
        source: as ``save_pretrained`` writes it: ``config.json``, safetensors (sharded or not), tokenizer or none.
        destination: what Megatron's ``--load`` or ``--pretrained-checkpoint`` gets.
        layout: default ``torch_dist``, which is read under any layout.
        options: overwrite, verify, max_memory, ignored_settings.

    Returns:
        ``destination``.

    Raises:
        ValueError: an unsupported or damaged model, a layout that does not fit it, or a destination that exists.
        CheckFailed: the comparison failed or could not be made.
    """
    model = _open(source, options)
    check = partial(check_conversion, model, max_memory=options.max_memory)
    write_megatron(model, Path(destination), "import", layout=layout, options=options, check=check)
    return Path(destination)


def import_plan(
    source: Path | str,
    destination: Path | str,
    *,
    layout: MegatronLayout = ANY_LAYOUT,
    options: Options = DEFAULTS,
) -> list[str]:
    """What :func:`import_checkpoint` would write and take, for people; raises as it would before any work."""
    model = _open(source, options)
    layout.check(model.config)
    shape = MegatronShape(model.config, padded_vocab_size(model.config.vocab_size, layout.tensor_size))
    return plan_lines(shape, Path(destination), to_hugging_face=False)


def _open(source: Path | str, options: Options) -> HuggingFaceSource:
    model = open_source(source, options.ignored_settings)
    if not isinstance(model, HuggingFaceSource):
        raise ValueError(f"{source} is a Megatron checkpoint already: import takes a Hugging Face directory")
    return model
