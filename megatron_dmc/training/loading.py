"""What a run loads: decided once, checked, and nothing else opened.

The checkpoint that :func:`~megatron_dmc.training.start.find_start` checked is the one that Megatron loads.
:func:`confine` sees to it in this process: at the place where Megatron makes its own choice, from its own parsed
arguments, another choice is refused; files that were not checked, or changed since, are not opened; and objects are
built by ``megatron_dmc.checkpoint.unpickling`` alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dmc.checkpoint.guard import CheckedCheckpoint
from megatron_dmc.checkpoint.locate import has_tracker

_THE_TRACKER_DECIDES = "the newest checkpoint, which the tracker file names, is what is checked and loaded"
_OURS_ARE_COMPLETE = "give the flags themselves; they are checked before anything is loaded"
_FROM_FILES = "it builds objects from files that nobody checked"

REFUSED_FLAGS: dict[str, str] = {
    "--ckpt-step": f"{_THE_TRACKER_DECIDES}; to start from another iteration, write its number into the tracker file",
    "--non-persistent-ckpt-type": _THE_TRACKER_DECIDES,
    "--non-persistent-global-ckpt-dir": _THE_TRACKER_DECIDES,
    "--non-persistent-local-ckpt-dir": _THE_TRACKER_DECIDES,
    "--use-checkpoint-args": "the shape comes from the checkpoint already, through a reader that executes nothing",
    "--yaml-cfg": _OURS_ARE_COMPLETE,
    "--enable-msc": "checkpoints and data are read from this machine's file systems",
    "--inprocess-restart": "start the command again: it continues from the newest checkpoint",
    "--ict-load": _FROM_FILES,
    "--bert-load": _FROM_FILES,
    "--logits-load-dir": _FROM_FILES,
    "--perform-rl-step": "only pretraining is driven here",
}
"""Flags of Megatron that would load something else than what is checked."""

_MUST_BE_UNSET = ("ckpt_step", "non_persistent_ckpt_type", "use_checkpoint_args", "yaml_cfg", "enable_msc")


def refuse_loading_flags(argv: list[str]) -> None:
    """Raise ``ValueError`` for a flag that would load something else than what is checked."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in REFUSED_FLAGS:
        parser.add_argument(flag, dest=flag, nargs="*")
    parser.add_argument("--ckpt-format", dest="--ckpt-format", nargs="?")
    for flag, given in vars(parser.parse_known_args(argv)[0]).items():
        if given is not None and flag in REFUSED_FLAGS:
            raise ValueError(f"{flag} is not supported: {REFUSED_FLAGS[flag]}")
        if flag == "--ckpt-format" and given not in (None, "torch_dist", "torch"):
            raise ValueError(f"{flag} {given} is not supported: torch_dist and torch are")


class Confinement:
    """What this process may load, and the first thing that it was refused.

    Attributes:
        refusal: kept, because Megatron turns some errors into a silent exit.
    """

    def __init__(self, checkpoint: CheckedCheckpoint | None, teacher: CheckedCheckpoint | None = None) -> None:
        self._checkpoint = checkpoint
        self._teacher = teacher
        self.refusal: ValueError | None = None

    def keeping(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """``act``, whose refusal is kept."""

        def acting(*arguments: Any) -> Any:
            try:
                return act(*arguments)
            except ValueError as refusal:
                self.refusal = self.refusal or refusal
                raise

        return acting

    def open(self, path: Path) -> BinaryIO:
        """Open a file of the checkpoint or of the teacher's; ``ValueError`` for any other."""
        if self._teacher is not None and os.path.realpath(path) in self._teacher.files:
            return self._teacher.open(path)
        if self._checkpoint is None:
            raise ValueError(f"{path} is refused: this run starts from no checkpoint, so none was checked")
        return self._checkpoint.open(path)

    def check_choice(self, load_dir: str | None, args: Any) -> None:
        """Raise ``ValueError`` when Megatron is about to load something else than what was checked."""
        chosen = [name for name in _MUST_BE_UNSET if getattr(args, name, None)]
        if chosen:
            raise ValueError(f"--{chosen[0].replace('_', '-')} would load something else than what was checked")
        if self._checkpoint is None:
            if load_dir is not None and has_tracker(Path(load_dir)):
                raise ValueError(f"{load_dir}: a checkpoint appeared there after this run started; start again")
        elif load_dir is None or os.path.realpath(load_dir) != os.path.realpath(self._checkpoint.location.root):
            raise ValueError(f"Megatron would load from {load_dir}, {self._checkpoint.location.root} was checked")

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Within it, an engine that leaves for another reason leaves with what was refused."""
        try:
            yield
        except BaseException as left:
            if self.refusal is not None and left is not self.refusal:
                raise self.refusal from left
            raise


def confine(checkpoint: CheckedCheckpoint | None, teacher: CheckedCheckpoint | None = None) -> Confinement:
    """From here on this process loads ``checkpoint`` and nothing else (None: nothing at all).

    Args:
        checkpoint: what the run starts from.
        teacher: what a frozen teacher is loaded from, beside it.

    Raises:
        ImportError: the installed torch or Megatron unpickles in places that are not known here.
    """
    from megatron_dmc.checkpoint import unpickling
    from megatron_dmc.data.check import check_index
    from megatron_dmc.seam.unpickling import Builders, route

    confined = Confinement(checkpoint, teacher)

    def load(source: Any, map_location: Any) -> Any:
        return unpickling.load(source, map_location, confined.open)

    keeping = confined.keeping
    route(
        Builders(
            load=keeping(load),
            unpickle=keeping(unpickling.unpickle),
            open_file=keeping(confined.open),
            check_array=keeping(check_index),
            check_choice=keeping(confined.check_choice),
        )
    )
    return confined
