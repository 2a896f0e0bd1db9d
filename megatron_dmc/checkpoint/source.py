"""A checkpoint of either kind as one model with Hugging Face names, read tensor by tensor."""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.checkpoint.companions import FOLDER
from megatron_dmc.checkpoint.expected_files import check_files
from megatron_dmc.checkpoint.guard import CheckedCheckpoint, examine_location
from megatron_dmc.checkpoint.hf_directory import HuggingFaceDirectory
from megatron_dmc.checkpoint.legacy import LegacyCheckpoint
from megatron_dmc.checkpoint.locate import HUGGING_FACE, LEGACY, locate
from megatron_dmc.checkpoint.saved_arguments import SavedArguments, arguments_from_state
from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import Cut, MegatronShape
from megatron_dmc.models.tensors import EMBEDDING, Entry, by_hf_name, check_names, entries
from megatron_dmc.support.element_types import ElementType

if TYPE_CHECKING:
    from torch import Tensor

# Not part of the model: what Megatron keeps for the optimizer, the random state and the run.
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state_machine", "common_state", "chained_")


class Source(ABC):
    """A model whose tensors can be read one after the other, under Hugging Face names.

    Attributes:
        directory: where its weights are.
        companions: folder with its configuration and tokenizer files; it need not exist.
        config: its shape, with the type of its stored tensors.
        dmc: its DMC settings; None: it has none.
        ignored_settings: unknown settings of its configuration that change nothing, as the user says.
    """

    directory: Path
    companions: Path
    config: ModelConfig
    dmc: DMCConfig | None
    ignored_settings: Sequence[str] = ()
    _last: tuple[Entry, list[Tensor]] | None = None

    @abstractmethod
    def parts(self, entry: Entry) -> list[Tensor]:
        """The Hugging Face tensors of an entry of the table."""

    def names(self) -> list[str]:
        """Every tensor, in the order of the forward pass."""
        return list(by_hf_name(self.config))

    def tensor(self, name: str, cut: Cut | None = None) -> Tensor:
        """One tensor, or a part of it. Those that Megatron fuses with it stay in memory until another entry is read."""
        entry, place = by_hf_name(self.config)[name]
        if self._last is None or self._last[0] != entry:
            self._last = None
            self._last = (entry, self.parts(entry))
        whole = self._last[1][place]
        return whole if cut is None else cut.of(whole)


def open_source(path: Path | str, ignored_settings: Sequence[str] = ()) -> HuggingFaceSource | MegatronSource:
    """Open a Hugging Face directory or a Megatron checkpoint (``torch_dist`` of any layout, or legacy).

    Nothing in it is executed; see ``megatron_dmc.checkpoint``. What was chosen or passed over where the files leave a
    choice is told on standard error.

    Args:
        ignored_settings: unknown settings of ``config.json`` that change nothing, as the user says.

    Raises:
        ValueError: no checkpoint, a damaged or hostile one, another kind of model, missing or unknown tensors.
    """
    location = locate(path)
    if location.format != HUGGING_FACE:
        return MegatronSource(examine_location(location))
    check_files(location)
    source = HuggingFaceSource(location.directory, ignored_settings)
    for note in source.files.notes:
        print(f"{path}: {note}", file=sys.stderr)
    return source


class HuggingFaceSource(Source):
    """A Hugging Face directory."""

    def __init__(self, directory: Path, ignored_settings: Sequence[str] = ()) -> None:
        self.directory = self.companions = directory
        self.ignored_settings = ignored_settings
        self.files = HuggingFaceDirectory(directory, ignored_settings)
        self.config, self.dmc = self.files.config, self.files.dmc

    def parts(self, entry: Entry) -> list[Tensor]:
        return [self.tensor(name) for name in entry.hf_names]

    def tensor(self, name: str, cut: Cut | None = None) -> Tensor:
        return self.files.tensors[name].read(cut)


class MegatronSource(Source):
    """A Megatron checkpoint whose pickles were described.

    Attributes:
        saved: its saved arguments and what follows from them.
        shape: the model with its padded vocabulary.
        states_vocab_size: whether it tells how many rows of the embedding are real.
    """

    def __init__(self, checked: CheckedCheckpoint) -> None:
        location = checked.location
        self.directory = location.directory
        self.companions = location.directory / FOLDER
        self._weights: _TorchDistWeights | _LegacyWeights
        if location.format == LEGACY:
            self._weights = _LegacyWeights(LegacyCheckpoint(self.directory))
        else:
            self._weights = _TorchDistWeights(TorchDistCheckpoint(self.directory))
        padded = self._weights.padded_vocab_size()
        self.saved: SavedArguments = arguments_from_state(
            self._weights.common_state(), padded, str(location.directory), location.iteration
        )
        self.states_vocab_size = type(self.saved.args.get("vocab_size")) is int
        self.config = dataclasses.replace(self.saved.config, dtype=self._weights.element_type().name)
        self.dmc = self.saved.dmc
        self.shape = MegatronShape(self.config, padded)
        self._weights.check(self.shape)

    def set_vocab_size(self, vocab_size: int) -> None:
        """State the rows of the vocabulary for a checkpoint that does not.

        Raises:
            ValueError: more rows than the checkpoint holds, or another number than it states.
        """
        if self.states_vocab_size and vocab_size != self.config.vocab_size:
            raise ValueError(f"vocabulary of {vocab_size} ids: {self.directory} states {self.config.vocab_size}")
        if vocab_size > self.shape.padded_vocab_size:
            raise ValueError(
                f"vocabulary of {vocab_size} ids: {self.directory} has {self.shape.padded_vocab_size} rows"
            )
        self.config = dataclasses.replace(self.config, vocab_size=vocab_size)
        self.shape = MegatronShape(self.config, self.shape.padded_vocab_size)

    def parts(self, entry: Entry) -> list[Tensor]:
        return list(entry.row.layout.split(self.fused(entry), self.shape))

    def fused(self, entry: Entry) -> Tensor:
        """Megatron's tensor for an entry, over all its ranks."""
        return self._weights.read(entry)

    def embedding_row(self, row: int) -> Tensor:
        """The embedding of one token."""
        return self._weights.embedding_row(row)


class _TorchDistWeights:
    def __init__(self, checkpoint: TorchDistCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.common_state = checkpoint.common_state
        if EMBEDDING not in checkpoint.tensors:
            raise ValueError(f"{checkpoint.directory} holds no {EMBEDDING}: not a language model of Megatron")

    def padded_vocab_size(self) -> int:
        return self.checkpoint.tensors[EMBEDDING].shape[0]

    def element_type(self) -> ElementType:
        return self.checkpoint.tensors[EMBEDDING].element_type

    def check(self, shape: MegatronShape) -> None:
        """Names, shapes and types of every tensor."""
        given = {name for name in self.checkpoint.tensors if not name.startswith(_NOT_WEIGHTS)}
        expected = entries(shape.config)
        check_names(given, {entry.stacked_name for entry in expected}, str(self.checkpoint.directory))
        for entry in expected:
            tensor = self.checkpoint.tensors[entry.stacked_name]
            layers = () if entry.layer is None else (shape.config.num_layers,)
            _check_shape(entry.stacked_name, tensor.shape, (*layers, *entry.megatron_shape(shape)))
            _check_type(entry.stacked_name, tensor.element_type, self.element_type())

    def read(self, entry: Entry) -> Tensor:
        return self.checkpoint.read(entry.stacked_name, entry.layer)

    def embedding_row(self, row: int) -> Tensor:
        return self.checkpoint.read(EMBEDDING, row)


class _LegacyWeights:
    def __init__(self, checkpoint: LegacyCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors = checkpoint.tensors()
        self.common_state = checkpoint.common_state
        self.padded_vocab_size = checkpoint.padded_vocab_size

    def element_type(self) -> ElementType:
        return self.tensors[EMBEDDING][0].element_type

    def check(self, shape: MegatronShape) -> None:
        """Names, shapes and types of every tensor."""
        expected = entries(shape.config)
        check_names(self.tensors, {entry.megatron_name for entry in expected}, str(self.checkpoint.directory))
        for entry in expected:
            shards = self.tensors[entry.megatron_name]
            cut = entry.row.layout.shard_shape(entry.megatron_shape(shape), len(shards))
            for rank, shard in enumerate(shards):
                _check_shape(f"{entry.megatron_name} of tensor rank {rank}", shard.shape, cut)
                _check_type(entry.megatron_name, shard.element_type, self.element_type())

    def read(self, entry: Entry) -> Tensor:
        return entry.row.layout.unshard([shard.read() for shard in self.tensors[entry.megatron_name]])

    def embedding_row(self, row: int) -> Tensor:
        shards = self.tensors[EMBEDDING]
        rank, place = divmod(row, shards[0].shape[0])
        return shards[rank].rows(place, place + 1).read()[0]


def _check_shape(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(given) != expected:
        raise ValueError(f"{name} has shape {tuple(given)}, its model needs {expected}")


def _check_type(name: str, given: ElementType, expected: ElementType) -> None:
    if given != expected:
        raise ValueError(f"{name} is {given}, the embedding is {expected}: one type for all tensors is supported")
