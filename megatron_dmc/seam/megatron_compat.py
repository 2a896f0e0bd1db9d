"""Megatron's moving parts: every change to its engine, by name, with a check of what is changed.

Called once by entry points, after ``host.use_cpu()`` where there is no GPU. ``unpickling`` routes what Megatron builds
from files; nothing else of it is patched.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.support.versions import REQUIRED

TESTED_VERSIONS = ("0.19.2",)
_ORIGINAL = "_megatron_dmc_original"


def check_version() -> str:
    """The version of megatron-core; a warning when this release was not tested with it.

    Raises:
        ImportError: ``megatron.training`` is missing, with the package to install.
    """
    try:
        import megatron.core
        import megatron.training
    except ImportError as error:
        package = "megatron-core[training]"
        raise ImportError(
            f"{error}; megatron_dmc needs the engine: pip install '{package}{REQUIRED[package]}'"
        ) from error
    version = str(megatron.core.__version__)
    # Core adds the commit of the repository around its files, ours where .venv lies in it: 0.19.2+719bd7e.
    if version.partition("+")[0] not in TESTED_VERSIONS:
        tested = ", ".join(TESTED_VERSIONS)
        warnings.warn(f"megatron-core {version} is untested; this release was tested with {tested}", stacklevel=2)
    return version


def symbol(module_name: str, name: str, parameters: tuple[str, ...] = ()) -> tuple[ModuleType, Any]:
    """A symbol of Megatron and the module that holds it.

    Args:
        module_name: full module path.
        name: attribute of the module.
        parameters: names that its signature must have.

    Raises:
        ImportError: the symbol or one of the parameters is missing, with the version found and those tested.
    """
    module = importlib.import_module(module_name)
    found = getattr(module, name, None)
    missing = "" if found is not None else f"{module_name}.{name}"
    if found is not None and parameters:
        absent = [parameter for parameter in parameters if parameter not in inspect.signature(found).parameters]
        missing = f"{module_name}.{name}({', '.join(absent)})" if absent else ""
    if missing:
        raise ImportError(
            f"megatron-core {check_version()} has no {missing}; tested: {', '.join(TESTED_VERSIONS)}. "
            "Install a tested version, or report this one"
        )
    return module, found


def adapt_engine(*, cpu: bool) -> None:
    """Make ``pretrain()`` of the installed wheel run; a second call changes nothing.

    Args:
        cpu: this machine has no CUDA device and ``host.use_cpu()`` was called.
    """
    check_version()
    skip_helper_compilation()
    keep_adam_steps()
    if cpu:
        allow_initialization_without_cuda()
        attend_without_scores()


def _replace(holder: ModuleType | type, name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(original)`` in the original's place; a second call starts from the original again."""
    current = getattr(holder, name)
    original = getattr(current, _ORIGINAL, current)
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _ORIGINAL, original)
    setattr(holder, name, replacement)


def skip_helper_compilation() -> None:
    """Do not compile the data-set helpers when they import.

    The wheel carries the compiled extension but no Makefile, so the compilation at start would end the process.
    """
    module, _ = symbol("megatron.core.datasets.utils", "compile_helpers")
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return
    _replace(module, "compile_helpers", lambda original: lambda: None)


def allow_initialization_without_cuda() -> None:
    """Let ``pretrain()`` start without CUDA: it never passes ``allow_no_cuda`` on."""
    module, _ = symbol("megatron.training.training", "initialize_megatron", ("allow_no_cuda",))
    _replace(module, "initialize_megatron", lambda original: functools.partial(original, allow_no_cuda=True))


def attend_without_scores() -> None:
    """Let Megatron's causal attention call torch's flash kernel, as Transformer Engine's does on a GPU.

    Its own, which is all there is on a CPU, writes the scores of every head and several copies of them to memory: a
    third of a step's time.
    """
    _, attention = symbol(
        "megatron.core.transformer.dot_product_attention", "DotProductAttention", ("attn_mask_type", "softmax_scale")
    )
    _replace(attention, "forward", _with_flash)


def _with_flash(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(
        self: Any,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        **others: Any,
    ) -> Tensor:
        asked = [attention_mask, *others.values()]
        if not _is_plain_causal(self) or any(value is not None for value in asked):
            return forward(self, query_SBND, key_SBGD, value_SBGD, attention_mask, attn_mask_type, **others)
        q, k, v = (x_SBND.permute(1, 2, 0, 3) for x_SBND in (query_SBND, key_SBGD, value_SBGD))
        out_BNSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    return attend


def _is_plain_causal(attention: Any) -> bool:
    """Whether a ``DotProductAttention`` computes causal attention and nothing else."""
    softmax = attention.scale_mask_softmax
    special = (softmax.scale, softmax.window_size, attention.softmax_offset)
    drops = attention.training and attention.attention_dropout.p > 0
    return softmax.attn_mask_type.name == "causal" and all(setting is None for setting in special) and not drops


def after_each_step(observe: Callable[[dict[str, Any]], None]) -> None:
    """Call ``observe`` with the arguments of Megatron's per-step log, by name; Megatron has no hook for it."""
    module, log = symbol(
        "megatron.training.training", "training_log", ("loss_dict", "iteration", "learning_rate", "grad_norm")
    )
    signature = inspect.signature(log)

    def wrap(log: Callable[..., Any]) -> Callable[..., Any]:
        def logged(*args: Any, **kwargs: Any) -> Any:
            result = log(*args, **kwargs)
            observe(dict(signature.bind(*args, **kwargs).arguments))
            return result

        return logged

    _replace(module, "training_log", wrap)


def stop_when(decide: Callable[[int], bool]) -> None:
    """Save and leave the training loop after a step at which ``decide(iteration)`` is true on every rank."""
    module, _ = symbol("megatron.training.training", "checkpoint_and_decide_exit", ("iteration",))
    saver, _ = symbol("megatron.training.training", "save_checkpoint_and_time", ("iteration",))

    def wrap(original: Callable[..., bool]) -> Callable[..., bool]:
        def decided(model: Any, optimizer: Any, scheduler: Any, iteration: int, *rest: Any) -> bool:
            if original(model, optimizer, scheduler, iteration, *rest):
                return True
            if not decide(iteration):
                return False
            from megatron.training import get_args

            if get_args().save and not _was_just_saved(iteration):
                operations, context, data = rest
                saver.save_checkpoint_and_time(
                    iteration, model, optimizer, scheduler, operations, context, train_data_iterator=data
                )
            return True

        return decided

    _replace(module, "checkpoint_and_decide_exit", wrap)


def _was_just_saved(iteration: int) -> bool:
    from megatron.training import get_args

    interval = get_args().save_interval
    return bool(interval) and iteration % interval == 0


def keep_adam_steps() -> None:
    """Let checkpoints of the distributed optimizer load with torch's AdamW (no Transformer Engine, no apex).

    AdamW keeps a step count per parameter where Megatron expects one per group: the state is missing before the first
    step, one tensor is shared by all parameters after loading, and the key is absent when parameters are set. Float32
    parameters are views of the model's leaves, which autograd lets nobody overwrite while it records.
    """
    _, optimizer_class = symbol("megatron.core.optimizer.distrib_optimizer", "DistributedOptimizer")
    repairs = {
        "sharded_state_dict": _with_adam_state,
        "load_state_dict": _with_own_steps,
        "_set_main_param_and_optimizer_states": _with_step_key,
    }
    for name, repair in repairs.items():
        if not hasattr(optimizer_class, name):
            raise ImportError(f"megatron-core {check_version()} has no DistributedOptimizer.{name}")
        _replace(optimizer_class, name, repair)


def _with_adam_state(sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    def repaired(self: Any, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if is_loading and _uses_adamw(self):
            _create_adam_state(self.optimizer)
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, **kwargs)

    return repaired


def _with_own_steps(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    def repaired(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        if _uses_adamw(self):
            _separate_adam_steps(self.optimizer)

    return repaired


def _with_step_key(set_states: Callable[..., None]) -> Callable[..., None]:
    def repaired(self: Any, model_param: Any, tensors: Any, *args: Any, **kwargs: Any) -> None:
        if _uses_adamw(self):
            tensors = {**tensors, "step": tensors.get("step")}
        with torch.no_grad():
            set_states(self, model_param, tensors, *args, **kwargs)

    return repaired


def _uses_adamw(optimizer: Any) -> bool:
    return isinstance(optimizer.optimizer, torch.optim.Adam)


def _create_adam_state(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _separate_adam_steps(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        step = group.get("step")
        if step is None:
            continue
        for parameter in group["params"]:
            if "exp_avg" in optimizer.state[parameter]:
                optimizer.state[parameter]["step"] = torch.tensor(float(step))
