"""Reads some of the flags of a run, before Megatron reads all of them."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class FlagParser(argparse.ArgumentParser):
    """Reads some of the flags of a run; a value that cannot be read is a ``ValueError`` and prints no usage."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; `megatron-dmc train --help` explains the flags")
