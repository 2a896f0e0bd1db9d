"""Megatron's command-line flags for a model, from the one table of its settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.megatron import ALL_SETTINGS, Setting
from megatron_dmc.training.flag_parser import FlagParser


def model_flags(config: ModelConfig) -> dict[str, str | None]:
    """Flags that build a model; None marks a switch. Raises ``ValueError`` where Megatron has no flag for it."""
    # No tokenizer is loaded for training: only the number of ids counts.
    return {"--tokenizer-type": "NullTokenizer"} | _flags((setting, setting.value(config)) for setting in ALL_SETTINGS)


def fixed_flags() -> dict[str, str | None]:
    """Flags that every model has, also one that is trained from scratch by Megatron's own flags."""
    return _flags((setting, setting.default) for setting in ALL_SETTINGS if setting.fixed)


def check_flags(argv: list[str], config: ModelConfig) -> None:
    """Raise ``ValueError`` when ``argv`` gives a flag of the model another value than the base checkpoint has."""
    of_model = {setting.flag: setting for setting in ALL_SETTINGS if setting.flag is not None and not setting.fixed}
    given = FlagParser(argument_default=argparse.SUPPRESS)
    for flag, setting in of_model.items():
        if isinstance(setting.value(config), bool):
            given.add_argument(flag, dest=flag, action="store_true")
        else:
            given.add_argument(flag, dest=flag)
    for flag, value in vars(given.parse_known_args(argv)[0]).items():
        expected = of_model[flag].value(config)
        if not _is(value, expected):
            stated = flag if value is True else f"{flag} {value}"
            raise ValueError(f"{stated}: the base checkpoint has {expected}; leave the flag out")


def add_model_arguments(parser: Any) -> None:
    """Add the settings of a model that Megatron has no flag for; the base checkpoint sets them."""
    for setting in ALL_SETTINGS:
        if setting.flag is not None and setting.flag.startswith("--dmc-"):
            kind = type(setting.default)
            text = f"of the model; set from the base checkpoint (default: {setting.default})"
            parser.add_argument(setting.flag, type=kind, default=setting.default, help=text)


def _flags(values: Iterable[tuple[Setting, Any]]) -> dict[str, str | None]:
    flags: dict[str, str | None] = {}
    for setting, value in values:
        if setting.flag is None:
            continue
        if isinstance(value, bool):
            if value is setting.switch:
                flags[setting.flag] = None
        elif setting.fixed or value != setting.default:
            flags[setting.flag] = str(value)
    return flags


def _is(text: Any, expected: Any) -> bool:
    """Whether the text of a flag means a value."""
    if isinstance(expected, (bool, str)) or expected is None:
        return text == expected
    try:
        return float(text) == float(expected)
    except ValueError:
        return False
