"""One stage through Megatron's ``pretrain()``: the only caller of the engine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.megatron import refuse_for_stock
from megatron_dmc.runs.completeness import Outcome, Status, read_outcome, write_outcome
from megatron_dmc.seam import host
from megatron_dmc.seam.processes import complete_environment
from megatron_dmc.stages import find_stage
from megatron_dmc.support.errors import InfrastructureError
from megatron_dmc.training.arguments import (
    EXTENSION_FREE_FLAGS,
    HOST_FLAGS,
    RUN_DEFAULTS,
    add_dmc_arguments,
    dmc_config_from_args,
    refuse_flags,
    with_defaults,
)
from megatron_dmc.training.data_flags import add_data_arguments, data_flags, data_sources
from megatron_dmc.training.flag_parser import FlagParser
from megatron_dmc.training.lengthening import lengthening
from megatron_dmc.training.loading import Confinement, confine, refuse_loading_flags
from megatron_dmc.training.megatron_words import failure, keep_traceback, refused_flags
from megatron_dmc.training.model_flags import check_flags, fixed_flags, model_flags
from megatron_dmc.training.run_defaults import add_run_arguments, check_window, run_flags, short_stage
from megatron_dmc.training.start import Start, find_start, saved_iteration
from megatron_dmc.training.teacher_choice import with_teacher

if TYPE_CHECKING:
    from megatron_dmc.training.model.config import DMCModelConfig
    from megatron_dmc.training.model.microbatch import Observer


@dataclass(frozen=True)
class Run:
    """A checked run.

    Attributes:
        argv: all flags for Megatron's parser.
        start: where the run starts.
        loading: what this process may load.
        save: directory of its checkpoints, or None.
        train_iters: length of the stage in steps; None where it is given in samples.
        stop_at_cr: ratio that ends the stage early, where one may.
    """

    argv: list[str]
    start: Start
    loading: Confinement
    save: str | None
    train_iters: int | None
    stop_at_cr: float | None


def prepare(argv: list[str]) -> Run:
    """Check a run, complete its flags, and make this process ready for Megatron's engine.

    Call it before anything of Megatron is imported: on a machine without CUDA it redirects CUDA to the CPU.

    Args:
        argv: Megatron's flags and ours; see ``megatron-dmc train --help``.

    Raises:
        ValueError: a flag, a base checkpoint or a data set that does not fit.
    """
    refuse_loading_flags(argv)
    given = _read_own_flags(argv)
    settings = dmc_config_from_args(given)
    stage = find_stage(settings.stage)
    refuse_flags(argv, stage)
    start = with_teacher(find_start(settings, given.save, given.pretrained_checkpoint), settings, given.dmc_teacher)
    _check_tokens(given, start.config)
    check_window(settings, given, start.config)
    complete_environment()
    argv = _complete(argv, given, start, settings)
    if host.needs_cpu():
        host.keep_memory()
        host.use_cpu()
    from megatron_dmc.seam import megatron_compat

    megatron_compat.adapt_engine(cpu=host.needs_cpu())
    stop_at_cr = settings.stop_at_cr if stage.raises_target else None
    return Run(argv, start, confine(start.checkpoint, start.teacher), given.save, given.train_iters, stop_at_cr)


def train(argv: list[str], observer: Observer | None = None) -> Outcome:
    """Run or continue one stage in this process, one rank of a distributed job or all of it.

    Args:
        argv: as in :func:`prepare`.
        observer: told of every layer's decisions.

    Returns:
        how the stage ended, on every rank alike; with ``--save`` it is recorded there.

    Raises:
        ValueError: a flag, a base checkpoint, a data set or a model that cannot be trained.
        InfrastructureError: Megatron left without saving what it had done.
    """
    run = prepare(argv)
    saved = saved_iteration(run.save)
    outcome = None if saved is None else _finished_before(run, saved)
    if outcome is None:
        outcome = _run_engine(run, saved or 0, observer)
    _record(run, outcome)
    return outcome


def _finished_before(run: Run, saved: int) -> Outcome | None:
    """The outcome of an earlier run that leaves this one nothing to do."""
    if run.train_iters is not None and saved >= run.train_iters:
        return Outcome(saved, run.train_iters, Status.COMPLETE)
    recorded = read_outcome(str(run.save))
    if recorded is None or recorded.iteration != saved or recorded.stop_at_cr is None or run.stop_at_cr is None:
        return None
    return recorded if recorded.stop_at_cr >= run.stop_at_cr else None


def _record(run: Run, outcome: Outcome) -> None:
    """Write the outcome, once for all ranks. None leaves before it is written: a launcher may then end the others."""
    import torch

    if run.save is not None and int(os.environ["RANK"]) == 0:
        write_outcome(run.save, outcome)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _read_own_flags(argv: list[str]) -> argparse.Namespace:
    """The flags that decide what is checked before Megatron is imported."""
    parser = add_dmc_arguments(FlagParser())
    for flag in ("--save", "--load", "--pretrained-checkpoint", "--tokenizer-type"):
        parser.add_argument(flag)
    add_run_arguments(parser)
    add_data_arguments(parser)
    given, _ = parser.parse_known_args(argv)
    if given.load and given.load != given.save:
        raise ValueError(
            f"--load {given.load}: a stage continues from its own --save {given.save}; the weights it starts from "
            "belong to --pretrained-checkpoint"
        )
    return given


def _check_tokens(given: argparse.Namespace, config: ModelConfig | None) -> None:
    if config is None:
        return
    from megatron_dmc.data.manifest import read_manifest

    if given.seq_length and given.seq_length > config.max_position_embeddings:
        raise ValueError(
            f"--seq-length {given.seq_length}: the model was built for {config.max_position_embeddings} positions"
        )
    for prefix in [prefix for prefixes in data_sources(given).values() for prefix in prefixes]:
        manifest = read_manifest(prefix)
        if manifest is not None and manifest["vocab_size"] > config.vocab_size:
            raise ValueError(
                f"{prefix} was tokenized with {manifest['vocab_size']} ids, the model has {config.vocab_size}: "
                "prepare the data with the model's own tokenizer"
            )


def _complete(argv: list[str], given: argparse.Namespace, start: Start, settings: DMCConfig) -> list[str]:
    """``argv`` with what the model, this machine and the start of the run require; prints what it added."""
    tables: list[Mapping[str, str | None]] = [fixed_flags(), RUN_DEFAULTS]
    tables += [run_flags(given, start.config, settings, os.environ), data_flags(given)]
    if settings.published.learning_rate is not None:
        tables.append(settings.published.learning_rate.flags())
    if start.config is not None:
        if not settings.retrofits:
            refuse_for_stock(start.config)
        check_flags(argv, start.config)
        tables.append(model_flags(start.config))
    if host.needs_cpu():
        tables.append(HOST_FLAGS)
    elif importlib.util.find_spec("transformer_engine") is None:
        tables.append(EXTENSION_FREE_FLAGS)
    if given.save:
        tables.append({"--load": given.save, "--tensorboard-dir": str(Path(given.save, "tensorboard"))})
    if start.resumes:
        argv = _without(argv, "--pretrained-checkpoint")
    if settings.retrofits and start.origin is not None:
        # Kept in every checkpoint of the retrofit: stages after this one find it there.
        tables.append({"--dmc-teacher": start.origin})
    if given.dmc_first_sample is None:
        tables.append({"--dmc-first-sample": str(start.first_sample)})
    completed = with_defaults(argv, *tables)
    longer = lengthening(completed, start.saved_arguments)
    completed = longer.flags + completed
    if int(os.environ["RANK"]) == 0:
        added = completed[: len(completed) - len(argv)]
        print("flags set by megatron_dmc: " + " ".join(added), flush=True)
        for remark in filter(None, (longer.remark, short_stage(settings, given.train_iters))):
            print(remark, flush=True)
    return completed


def _without(argv: list[str], flag: str) -> list[str]:
    """``argv`` less a flag and its value: a run that continues does not open its base again."""
    kept = list(argv)
    while flag in kept:
        at = kept.index(flag)
        del kept[at : at + 2]
    return [argument for argument in kept if not argument.startswith(flag + "=")]


def configure(run: Run) -> tuple[Any, DMCModelConfig]:
    """Megatron's arguments, which become its global ones, and the configuration of the model.

    Raises:
        ValueError: flags that Megatron or compressing attention refuses.
    """
    from megatron.training.arguments import parse_and_validate_args

    from megatron_dmc.training.model_config import dmc_model_config

    sys.argv = [sys.argv[0], *run.argv]
    with refused_flags(add_dmc_arguments):
        args = parse_and_validate_args(extra_args_provider=add_dmc_arguments)
        return args, dmc_model_config(args, start=run.start)


def _run_engine(run: Run, saved: int, observer: Observer | None) -> Outcome:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from megatron_dmc.training.data_sets import build_data_sets
    from megatron_dmc.training.decision_log import DecisionLog, both
    from megatron_dmc.training.forward_step import forward_step
    from megatron_dmc.training.metrics import watch_steps

    args, model_config = configure(run)
    log = DecisionLog(Path(args.save)) if args.dmc_log_decisions and args.save else None
    model_config.transformer.dmc_observer = both(observer, log)
    recorder, decision = watch_steps(args)
    # What holds if this process is killed.
    _record(run, Outcome(saved, args.train_iters or 0, Status.RUNNING))
    try:
        with run.loading.telling():
            pretrain(
                cfg_container=pretrain_cfg_container_from_args(args, model_config),
                train_valid_test_dataset_provider=build_data_sets,
                model_type=ModelType.encoder_or_decoder,
                forward_step_func=forward_step,
            )
    except SystemExit as left:
        # Megatron leaves with status 0 also when loading fails; 16 and 17 are its rerun machine's.
        if left.code not in (0, None):
            raise
    except Exception as error:
        raise _in_words(error, recorder.iteration, run.save) from error
    if log is not None:
        log.write()
    iteration = _check_saved(run.save, recorder.iteration)
    if iteration >= args.train_iters:
        return Outcome(iteration, args.train_iters, Status.COMPLETE)
    if decision.ratio_reached:
        return Outcome(iteration, args.train_iters, Status.RATIO_REACHED, run.stop_at_cr)
    return Outcome(iteration, args.train_iters, Status.INTERRUPTED)


def _in_words(error: Exception, iteration: int | None, save: str | None) -> Exception:
    """One message for what ended the engine; the way to it goes to the log of the stage."""
    if iteration is None:
        told = failure(error, "cannot start")
    else:
        told = failure(error, f"stopped behind iteration {iteration}", started=True)
    if told is not error and save is not None:
        told.add_note(f"traceback: {keep_traceback(error, save)}")
    return told


def _check_saved(save: str | None, iteration: int | None) -> int:
    """The iteration reached, judged by the files written and never by Megatron's exit status.

    Args:
        save: directory of the checkpoints, or None.
        iteration: last one done by this process; None where it did none.
    """
    if save is None:
        return iteration or 0
    saved = saved_iteration(save)
    if saved is None:
        raise InfrastructureError(f"Megatron left without a checkpoint in {save}; its last lines say why")
    if not Path(save, f"iter_{saved:07d}").is_dir():
        raise InfrastructureError(f"{save} names iteration {saved}, whose files are missing")
    if iteration is not None and saved < iteration:
        raise InfrastructureError(f"Megatron left at iteration {iteration}, {save} holds only {saved}")
    return saved
