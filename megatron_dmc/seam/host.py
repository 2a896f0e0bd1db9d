"""Megatron's training engine on a machine without CUDA: tensors on the CPU, gloo between processes.

Megatron asks for CUDA in device literals, streams, memory statistics and random-number trackers.
:func:`use_cpu` answers those calls with their CPU meaning. It acts only where CUDA is absent, only when an entry
point calls it, and before ``megatron.core`` is imported. ``megatron_compat`` holds everything that a machine with a
GPU needs as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_PREFIX = "torch.cuda."
# Of glibc, see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def needs_cpu() -> bool:
    """Whether this machine has no CUDA device, so that an entry point must call :func:`use_cpu`."""
    return not torch.cuda.is_available()


def use_cpu() -> None:
    """Redirect CUDA to the CPU in this process; a second call changes nothing.

    Raises:
        RuntimeError: CUDA is present, or ``megatron.core`` was imported before.
    """
    if isinstance(torch.cuda.current_stream, _Redirect):
        return
    if not needs_cpu():
        raise RuntimeError("use_cpu() is for machines without CUDA; here Megatron runs on the GPU as it is")
    if "megatron.core" in sys.modules:
        raise RuntimeError("use_cpu() must be called before megatron.core is imported")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _redirect_devices()
    _redirect_streams()
    _redirect_memory_statistics()
    _redirect_random_state()
    _DeviceRewrite().__enter__()


def keep_memory(environment: Mapping[str, str] = os.environ) -> None:
    """Let glibc keep the memory of freed tensors for the next ones, as torch's allocator does on a GPU.

    By default it maps every large tensor anew, and the system fills it with zeros page by page. What a user asks of
    malloc in ``environment`` stays; another C library has no such settings.
    """
    asked = any(name.startswith("MALLOC_") for name in environment) or "GLIBC_TUNABLES" in environment
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not asked:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


class _Redirect:
    """A function that stands in for one of ``torch.cuda``; its type marks the redirection as done."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _redirect(module: Any, **answers: Callable[..., Any]) -> None:
    for name, answer in answers.items():
        setattr(module, name, _Redirect(answer))


def _redirect_devices() -> None:
    # Capability 9.0 with one device: the answers of the machine that Megatron's own checks are written for.
    properties = SimpleNamespace(major=9, minor=0, name="cpu", total_memory=0, multi_processor_count=1)
    _redirect(
        torch.cuda,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        get_device_capability=lambda device=None: (9, 0),
        get_device_properties=lambda device=None: properties,
        get_device_name=lambda device=None: "cpu",
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        ipc_collect=_nothing,
    )
    torch.cuda.device = _NoDevice  # type: ignore[assignment, misc]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign, assignment]


class _NoDevice(contextlib.nullcontext):
    """``torch.cuda.device`` without a device to switch to."""

    def __init__(self, device: Any = None) -> None:
        super().__init__()


class _Stream:
    """A stream of a machine that runs everything in order. A class, because annotations name it."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record_event = _nothing

    def query(self) -> bool:
        return True


class _Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _redirect_streams() -> None:
    stream = _Stream()
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.Event = _Event  # type: ignore[assignment, misc]
    _redirect(
        torch.cuda,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        set_stream=_nothing,
        stream=lambda stream=None: contextlib.nullcontext(),
    )
    _redirect(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing, mark=_nothing)


def _redirect_memory_statistics() -> None:
    zero_functions = (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "device_memory_used",
    )
    for module in (torch.cuda, torch.cuda.memory):
        _redirect(module, **{name: lambda device=None: 0 for name in zero_functions})
        _redirect(module, memory_stats=lambda device=None: {}, reset_peak_memory_stats=_nothing)


def _redirect_random_state() -> None:
    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def seed_generator(seed: int) -> None:
        # Not torch.manual_seed, which seeds CUDA through this very function.
        torch.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        _redirect(
            module,
            manual_seed=seed_generator,
            manual_seed_all=seed_generator,
            get_rng_state=get_state,
            set_rng_state=set_state,
        )
    from megatron.core.tensor_parallel import random as megatron_random

    # Megatron keeps a state per parallel axis and swaps them through these two functions.
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: get_state()
    megatron_random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: set_state(new_state)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int):
        return not isinstance(device, bool)
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


_REWRITTEN_METHODS = frozenset({torch.Tensor.to, torch.Tensor.pin_memory, torch.Tensor.type})


class _DeviceRewrite(TorchFunctionMode):
    """Replaces CUDA devices in torch calls by the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every torch call passes here: most leave at once.
        if not kwargs and func not in _REWRITTEN_METHODS:
            return func(*args)
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is torch.Tensor.pin_memory:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _cuda_type_name(func(*args))
        return func(*args, **kwargs)


def _cuda_type_name(name: str) -> str:
    # Optimizers sort parameters by type name and know only the CUDA names.
    if name.startswith(_CUDA_TYPE_PREFIX):
        return name
    return _CUDA_TYPE_PREFIX + name.removeprefix("torch.")
