"""Hostile pickles: streams of opcodes that leave one value, and what a careless reader does meanwhile."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

from tests.checkpoint.five_ways import Touch


class Call:
    """Unpickled as Python does it, it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text_of(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def call_of(module: str, name: str, *arguments: bytes) -> bytes:
    return _name(module, name) + b"(" + b"".join(arguments) + b"tR"


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _torch_loads(marker: Path) -> bytes:
    return call_of("torch.storage", "_load_from_bytes", _pickled(pickle.dumps(Touch(marker))))


def commands(marker: Path) -> dict[str, bytes]:
    """Streams of opcodes that leave one value; the marker appears when a careless reader builds it."""
    command, path = f"touch {marker}", str(marker)
    code = f"open({path!r}, 'w')"
    calls = {
        "os.system": Call(os.system, command),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, path, "w"),
        "compile and exec": Call(exec, Call(compile, code, "x", "exec")),
        "subprocess": Call(subprocess.check_output, ["touch", path]),
        "mkdir": Call(os.mkdir, path),
        "map": Call(list, Call(map, eval, [code])),
        "nested pickle": Call(pickle.loads, pickle.dumps(Touch(marker))),
        "path": Call(Path.touch, marker),
    }
    streams = {name: _pickled(call) for name, call in calls.items()}
    shell, done = _name("posix", "system"), text_of(command) + b"\x85R"
    shell_by_name = call_of("builtins", "getattr", call_of("builtins", "__import__", text_of("os")), text_of("system"))
    return streams | {
        "getattr": shell_by_name + done,
        "INST": b"(" + text_of(command) + b"iposix\nsystem\n",
        "OBJ": b"(" + _name("io", "FileIO") + text_of(path) + text_of("w") + b"o",
        "NEWOBJ": _name("_io", "FileIO") + b"(" + text_of(path) + text_of("w") + b"t\x81",
        "NEWOBJ_EX": _name("_io", "FileIO")
        + b")}"
        + text_of("file")
        + text_of(path)
        + b"s"
        + text_of("mode")
        + text_of("w")
        + b"s\x92",
        "dotted name": text_of("torch") + text_of("os.system") + b"\x93" + done,
        "name of Python 2": call_of("__builtin__", "eval", text_of(code)),
        "storage from bytes": _torch_loads(marker),
        "module of a module": _name("torch.serialization", "os") + b"0" + shell + done,
        "state of a class": _name("argparse", "Namespace")
        + b"}"
        + text_of("x")
        + shell
        + b"sb"
        + shell
        + text_of(command)
        + b"\x85R0",
        "popped": shell + done + b"0N",
        "in a key": b"}" + shell + done + b"Ns",
        "TorchScript": call_of("torch.jit._pickle", "build_intlist", _pickled([1])),
        "extension": b"\x82\x01",
        "runpy": call_of("runpy", "run_path", text_of(path)),
        "ctypes": call_of("ctypes", "CDLL", text_of(path)),
        "import": call_of("importlib", "import_module", text_of("this")),
        "partial": call_of("functools", "partial", shell, text_of(command)) + b")R",
        "numpy file": call_of("numpy", "fromfile", text_of("/etc/hostname")),
        "memory map": call_of("numpy", "memmap", text_of(path), text_of("uint8"), text_of("w+"), b"K\x00", _number(10)),
        "text file of torch": call_of("torch.serialization", "load", text_of(path)),
        "a generator": call_of("torch._C", "Generator"),
    }


def bombs() -> dict[str, bytes]:
    """Streams that take memory or time instead."""
    numpy_type = call_of("numpy", "dtype", text_of("f8"))
    array = call_of("numpy._core.multiarray", "_reconstruct", _name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")
    encoded = _name("_codecs", "encode") + b"h\x00" + text_of("latin1") + b"\x86R0"
    colliding = (k * ((1 << 61) - 1) for k in range(5, 40))
    twice = b"N" + b"\x85" + b"".join(b"q\x00h\x00\x86" for _ in range(90))
    return {
        "large array": call_of("numpy", "ndarray", _number(1 << 40) + b"\x85"),
        "large array by state": array + b"(K\x01" + _number(1 << 40) + b"\x85" + numpy_type + b"\x89C\x00tb",
        "objects in an array": call_of("numpy", "dtype", text_of("O8")),
        "array of text": call_of("numpy", "dtype", text_of("U1000000000")),
        "slow key": b"}" + twice + b"Ns",
        "repeated tuples": twice,
        "deep tuples": b"N" + b"\x85" * 5000,
        "itself": b"]q\x00h\x00a",
        "far memo": b"Nr\xff\xff\xff\x7f",
        "long number": b"\x8b" + (1 << 16).to_bytes(4, "little") + b"\x7f" * (1 << 16),
        "copies": text_of("x" * 50_000) + b"q\x01" + encoded * 100 + b"0N",
        "large size": call_of("torch", "Size", b"]" + b"(" + b"K\x01" * 3 + b"e", b"K\x01"),
        "file position": _name("_io", "BytesIO") + b")\x81(C\x01x" + _number(1 << 50) + b"Ntb",
        "parts of a path": call_of("pathlib", "PosixPath", b"](" + text_of("x") * 3 + b"e"),
        "class by an enumeration": call_of("signal", "Signals", text_of("X"), text_of("a b c")),
        "keys that collide": b"}" + b"".join(b"\x8a\x10" + key.to_bytes(16, "little") + b"Ns" for key in colliding),
        "an encoding": call_of("_codecs", "encode", text_of("x"), text_of("rot13")),
    }
