"""A model to compare with: its options, and how it is opened before any work starts."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.cli.model_options import OpenedModel, open_model

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.inference.decoder.decoder import Decoder

SAME_WEIGHTS = "none"
TOKENS_TO_MATCH, PROMPTS_TO_MATCH = 64, 8


def add_reference_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--reference`` and how far texts are compared."""
    group = parser.add_argument_group("reference")
    group.add_argument(
        "--reference",
        metavar="DIR",
        help="compare with this model, of the same tokenizer, by KL, most likely tokens and greedy texts; 'none' is "
        "the model itself without compression",
    )
    group.add_argument(
        "--match-tokens",
        type=int,
        default=TOKENS_TO_MATCH,
        metavar="N",
        help=f"tokens that both continue prompts by, at most half a sequence; 0: none (default: {TOKENS_TO_MATCH})",
    )
    group.add_argument(
        "--match-prompts",
        type=int,
        default=PROMPTS_TO_MATCH,
        metavar="N",
        help=f"prompts of each length, the beginnings of the first sequences (default: {PROMPTS_TO_MATCH})",
    )


@dataclass(frozen=True)
class OpenedReference:
    """A reference whose weights were not read yet.

    Attributes:
        opened: None: the model's own weights.
    """

    opened: OpenedModel | None

    @property
    def weights(self) -> int:
        """Bytes of weights beside the model's own."""
        return 0 if self.opened is None else self.opened.memory.weights

    def load(self, model: Decoder) -> Decoder:
        """The reference of ``model``; its own weights are shared."""
        from megatron_dmc.methods import Dense, method_of

        if self.opened is not None:
            return self.opened.load()
        trained = method_of(model.settings)
        return model.with_method(Dense(trained.neuron_scale, trained.borrowed))


def open_reference(args: argparse.Namespace, opened: OpenedModel) -> OpenedReference | None:
    """What ``--reference`` names; None where it was not given.

    Raises:
        ValueError: another vocabulary or tokenizer than the model's, a size out of range, or no model.
    """
    if args.match_tokens < 0 or args.match_prompts < 1:
        raise ValueError(
            f"--match-tokens {args.match_tokens} --match-prompts {args.match_prompts}: give at least 1 prompt, and 0 "
            "tokens to compare no texts"
        )
    if args.reference is None:
        return None
    if args.reference == SAME_WEIGHTS:
        return OpenedReference(None)
    asked = argparse.Namespace(**vars(args) | {"model": Path(args.reference), "policy": None, "budget": None})
    asked.kv_dtype = "auto"
    reference = open_model(asked)
    _check_vocabulary(args.reference, opened, reference)
    return OpenedReference(reference)


def _check_vocabulary(name: str, opened: OpenedModel, reference: OpenedModel) -> None:
    ours, theirs = (one.source.config.vocab_size for one in (opened, reference))
    if ours != theirs:
        raise ValueError(
            f"--reference {name} has a vocabulary of {theirs:,} tokens, the model one of {ours:,}: give a reference "
            "with the model's tokenizer"
        )
    tokenizers = [_own_tokenizer(one) for one in (opened, reference)]
    if None in tokenizers:
        print("no tokenizer beside both models: only the sizes of their vocabularies were compared", file=sys.stderr)
        return
    first = next((number for number in range(ours) if len({one.token(number) for one in tokenizers if one}) > 1), None)
    if first is not None:
        words = " and ".join(repr(one.token(first)) for one in tokenizers if one)
        raise ValueError(
            f"--reference {name} has another tokenizer than the model (token {first} is {words}): give a reference "
            "with the model's tokenizer"
        )


def _own_tokenizer(opened: OpenedModel) -> Tokenizer | None:
    """The one beside the model; None: there is none."""
    from megatron_dmc.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(opened.source.companions) if opened.source.companions.is_dir() else None
    except ValueError:
        return None
