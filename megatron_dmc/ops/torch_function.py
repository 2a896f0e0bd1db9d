"""Long chains of small torch operations, kept out of sight of torch function modes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def without_modes[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch calls inside skip every ``TorchFunctionMode``.

    A mode costs Python code on each call, of which a scan makes hundreds; on short sequences that is more than the
    work itself. Only for code that takes its devices and dtypes from its inputs, where a mode has nothing to change.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run
