"""What stands for the objects of a pickle that is described, not opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dmc.support.errors import Refused


class Name:
    """A global that a pickle mentions, and what calling it would build (None: it may only be mentioned)."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any] | None) -> None:
        self.name = name
        self.build = build


class Record:
    """An object of a checkpoint: its class, the arguments it is made of, and the state set afterwards.

    Attributes:
        is_key: it may serve as a key, once its state is set.
    """

    __slots__ = ("accepts", "args", "is_key", "kind", "state")

    def __init__(
        self,
        kind: str,
        args: tuple[Any, ...] = (),
        accepts: Callable[[Any], bool] | None = None,
        is_key: bool = False,
    ) -> None:
        self.kind = kind
        self.args = args
        self.accepts = accepts
        self.is_key = is_key
        self.state: Any = None

    @property
    def parts(self) -> tuple[Any, Any]:
        """What it holds."""
        return self.args, self.state

    def set_state(self, state: Any) -> None:
        """Set its state, once.

        Raises:
            Refused: it has a state, or none like this.
        """
        if self.state is not None:
            raise Refused(f"it sets the state of {self.kind} twice")
        if self.accepts is None or not self.accepts(state):
            raise Refused(f"it sets a state of {self.kind} that no checkpoint holds")
        self.state = state


class OrderedMapping(dict[Any, Any]):
    """An ``OrderedDict`` of a pickle: unlike a dict it may have a state, torch's ``_metadata`` of a state dict."""

    state: Any = None

    def set_state(self, state: Any) -> None:
        """Set its state, once.

        Raises:
            Refused: it has a state, or another one.
        """
        if self.state is not None or type(state) is not dict or state.keys() != {"_metadata"}:
            raise Refused("it sets a state of an OrderedDict that no checkpoint holds")
        self.state = state
