"""A pickle described as plain data: every opcode is checked, nothing is imported, nothing is called.

The reader walks the opcodes as Python's unpickler would, but where that one imports and calls, this one looks the
name up in a table (module and name exactly as written) and builds an inert value. A name outside the table is an
error that shows it, and so are arguments or a state that the table does not foresee, and values beyond the bounds of
``pickle_bounds``. Whatever passes here does nothing but build the listed objects when the same bytes are unpickled.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from megatron_dmc.checkpoint.described import Name, OrderedMapping, Record
from megatron_dmc.checkpoint.pickle_bounds import Budget, check_key, check_size, without_collections
from megatron_dmc.support.errors import Refused

__all__ = ["Name", "OrderedMapping", "Record", "Refused", "checked_members", "describe"]

_MARK = object()
_INTEGER_BYTES_LIMIT = 32
_PROTOCOL_LIMIT = 5

# What can go wrong while a damaged stream is walked.
_DAMAGE = (ValueError, TypeError, IndexError, KeyError, OverflowError, EOFError, ArithmeticError)


def describe(
    data: bytes,
    what: str,
    names: Mapping[str, Callable[..., Any] | None],
    load_persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of a pickle as dicts, lists, numbers, strings and :class:`Record`.

    Args:
        data: the pickle, from its first byte to its last.
        what: where it comes from, for messages.
        names: ``module.name`` of every allowed global, and the function that stands for calling it.
        load_persistent: the value of a persistent id; None: there are none.

    Raises:
        ValueError: an import that is not in ``names`` (the message shows it), another use of a global than calling
            it once, an opcode that no pickler writes, values beyond all bounds, or a damaged stream.
    """
    walk = _Walk(names, load_persistent, len(data))
    try:
        with without_collections():
            return _walked(walk, data, what)
    except Refused:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{what} is damaged: not a pickle that torch or Megatron wrote ({error!s:.200})") from error


def _walked(walk: _Walk, data: bytes, what: str) -> Any:
    for opcode, argument, position in pickletools.genops(data):
        try:
            if opcode.name == "STOP":
                if position != len(data) - 1:
                    raise Refused("bytes are left over behind its end")
                return walk.finish(data)
            walk.step(opcode.name, argument)
        except Refused as refusal:
            raise Refused(f"{what} is refused: {refusal} (byte {position})") from None
    raise ValueError("the pickle has no end")


class _Walk:
    """The unpickler's stack and memo, over inert values."""

    def __init__(
        self,
        names: Mapping[str, Callable[..., Any] | None],
        load_persistent: Callable[[Any], Any] | None,
        length: int,
    ) -> None:
        self.names = names
        self.load_persistent = load_persistent
        self.length = length
        self.budget = Budget(length)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("unexpected mark")
        return value

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def finish(self, data: bytes) -> Any:
        """The value, when the pickle has ended."""
        value = self.pop()
        if self.stack:
            raise Refused("values are left over at its end")
        check_size(value, len(data))
        return value

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in _PUSH_ARGUMENT:
            if type(argument) is int and argument.bit_length() > 8 * _INTEGER_BYTES_LIMIT:
                raise Refused("a number of more digits than any checkpoint holds")
            self.stack.append(argument)
        elif opcode in _PUSH_NEW:
            self.stack.append(_PUSH_NEW[opcode]())
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        else:
            raise Refused(f"opcode {opcode}, which no pickle of torch or Megatron contains")

    def mention(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}"
        if not (isinstance(module, str) and isinstance(name, str)) or full not in self.names or "." in name:
            raise Refused(f"it imports {full!r}, which is not among the objects a checkpoint may hold")
        self.stack.append(Name(full, self.names[full]))

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Name) or function.build is None:
            raise Refused(f"it calls {_kind(function)}, which may not be called")
        if not isinstance(arguments, tuple):
            raise ValueError(f"{function.name} is called with {_kind(arguments)} arguments")
        self.budget.charge(arguments)
        try:
            self.stack.append(function.build(*arguments))
        except TypeError:
            raise Refused(f"it calls {function.name} with other arguments than a checkpoint holds") from None

    def set_state(self, state: Any) -> None:
        target = self.stack[-1]
        if not isinstance(target, (Record, OrderedMapping)):
            raise Refused(f"it sets the state of {_kind(target)}, which has none")
        self.budget.charge(state)
        target.set_state(state)

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise Refused(f"it sets items of {_kind(target)}")
        if len(flat) % 2:
            raise ValueError("a key without a value")
        for key in flat[::2]:
            check_key(key, is_record=_is_key(key))
        target.update(zip(flat[::2], flat[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused(f"it appends to {_kind(target)}")
        target.extend(values)

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not set:
            raise Refused(f"it adds to {_kind(target)}")
        target.update(checked_members(values))

    def persistent(self, value: Any) -> None:
        if self.load_persistent is None:
            raise Refused("it holds a persistent id outside a torch file")
        self.stack.append(self.load_persistent(value))


def checked_members(values: Any) -> Any:
    """``values``, which may be the members of a set."""
    for value in values:
        check_key(value, is_record=_is_key(value))
    return values


def _is_key(value: Any) -> bool:
    return isinstance(value, Name) or (isinstance(value, Record) and value.is_key and value.state is not None)


def _kind(value: Any) -> str:
    """What a value is, in a few words: a hostile value must not write the message."""
    if isinstance(value, Name):
        return value.name
    return value.kind if isinstance(value, Record) else f"a {type(value).__name__}"


_PUSH_ARGUMENT = frozenset(
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 "  # noqa: SIM905
    "BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}


def _check_protocol(_: _Walk, number: int) -> None:
    if number > _PROTOCOL_LIMIT:
        raise Refused(f"it is of protocol {number}, {_PROTOCOL_LIMIT} is the last one known")


def _check_frame(walk: _Walk, length: int) -> None:
    if length > walk.length:
        raise Refused("a part of it is longer than the whole")


def _tuple_of(count: int) -> Callable[[_Walk, Any], None]:
    def build(walk: _Walk, _: Any) -> None:
        values = [walk.pop() for _ in range(count)]
        walk.stack.append(tuple(values[::-1]))

    return build


def _stack_global(walk: _Walk, _: Any) -> None:
    name, module = walk.pop(), walk.pop()
    walk.mention(module, name)


def _reduce(walk: _Walk, _: Any) -> None:
    arguments, function = walk.pop(), walk.pop()
    walk.call(function, arguments)


def _new_object_with_keywords(walk: _Walk, _: Any) -> None:
    keywords = walk.pop()
    if keywords:
        raise Refused("it builds an object with keyword arguments")
    _reduce(walk, None)


def _set_item(walk: _Walk, _: Any) -> None:
    value, key = walk.pop(), walk.pop()
    walk.set_items([key, value])


def _drop(walk: _Walk, _: Any) -> None:
    walk.stack.pop()


def _drop_to_mark(walk: _Walk, _: Any) -> None:
    walk.pop_to_mark()


def _memoize(walk: _Walk, index: int | None) -> None:
    value = walk.stack[-1]
    if value is _MARK:
        raise ValueError("a mark cannot be remembered")
    if index is not None and index > len(walk.memo):
        raise Refused("it remembers a value at a place that leaves others empty")  # Python would allocate them all
    walk.memo[len(walk.memo) if index is None else index] = value


_ACTIONS: dict[str, Callable[[_Walk, Any], None]] = {
    "PROTO": _check_protocol,
    "FRAME": _check_frame,
    "GLOBAL": lambda walk, names: walk.mention(*names.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_keywords,
    "BUILD": lambda walk, _: walk.set_state(walk.pop()),
    "BINPERSID": lambda walk, _: walk.persistent(walk.pop()),
    "TUPLE": lambda walk, _: walk.stack.append(tuple(walk.pop_to_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": lambda walk, _: walk.extend([walk.pop()]),
    "APPENDS": lambda walk, _: walk.extend(walk.pop_to_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda walk, _: walk.set_items(walk.pop_to_mark()),
    "ADDITEMS": lambda walk, _: walk.add(walk.pop_to_mark()),
    "FROZENSET": lambda walk, _: walk.stack.append(frozenset(checked_members(walk.pop_to_mark()))),
    "POP": _drop,
    "POP_MARK": _drop_to_mark,
    "MEMOIZE": _memoize,
    "BINPUT": _memoize,
    "LONG_BINPUT": _memoize,
    "BINGET": lambda walk, index: walk.stack.append(walk.memo[index]),
    "LONG_BINGET": lambda walk, index: walk.stack.append(walk.memo[index]),
}
