"""Looks at the machine and the installed packages: what is wrong, and the remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dmc.support.files import free_space
from megatron_dmc.support.findings import Finding
from megatron_dmc.support.versions import EXTRAS, REQUIRED

PURPOSES = {
    "te": "fused layers and norms on a GPU",
    "hf": "loading exported models in transformers, and `convert verify`",
    "eval": "standard benchmarks",
    "plot": "the pictures of `report`, `eval` and `quickstart`",
    "data": "Parquet and .zst files in `data prepare`",
    "dev": "the tests",
}
"""Extra -> what it is for."""

SECURITY_FLOORS = {
    "megatron-core": ("0.17.1", "CVE-2026-65110: a checkpoint runs code when it is loaded"),
    "torch": ("2.10", "CVE-2026-24747: memory corruption while loading with weights_only"),
    "transformers": ("5.3", "CVE-2026-4372: config.json runs code without trust_remote_code"),
    "nvidia-resiliency-ext": ("0.5", "CVE-2025-33225: log files under names that others can guess"),
    "megatron-bridge": ("0.5.1", "CVE-2026-61776: its allow-list for loading can be passed"),
    "nvidia-modelopt": ("0.41", "CVE-2026-24141: a checkpoint runs code when it is loaded"),
}
"""Package -> first version without the hole, and the hole."""

MIN_FREE_DISK = 10e9
MIN_SHARED_MEMORY = 1e9
MIN_MEMORY = 8e9

PRODUCT_SHAPE = (512, 1024, 1024)
"""Rows, inner size and columns of the matrix product that is timed: 512 tokens through a small layer."""
PRODUCT_TURNS = 3
WORTH_BFLOAT16 = 1.2
"""Times as fast as float32, from which a training step gains by ``--bf16``, which also converts and keeps copies."""


def examine(directory: Path) -> list[Finding]:
    """Everything worth knowing before a run. ``directory`` is where output will go."""
    versions = {
        (distribution.metadata["Name"] or "").lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return [
        _python(),
        *_required(versions),
        *_extras(versions),
        *_security(versions),
        *_impostors(versions),
        *_environment(os.environ),
        _gpu(versions),
        *_matrix_products(versions),
        *_machine(directory),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 14):
        return Finding("Python", "ok", version)
    return Finding("Python", "warning", f"{version} is untested", "install Python 3.12 or 3.13")


def _older(version: str, floor: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) < Version(floor)
    except InvalidVersion:
        return False


def _allows(releases: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(releases).contains(version, prereleases=True)
    except InvalidVersion:
        return True


def _required(versions: Mapping[str, str]) -> list[Finding]:
    findings = []
    for package, releases in REQUIRED.items():
        name, remedy = _plain(package), f"pip install '{package}{releases}'"
        version = versions.get(name)
        if version is None:
            findings.append(Finding(name, "failed", "not installed", remedy))
        elif not _allows(releases.partition(",")[0], version):
            findings.append(Finding(name, "failed", f"{version}, needed {releases}", remedy))
        elif not _allows(releases, version):
            findings.append(Finding(name, "warning", f"{version} is untested, tested {releases}", remedy))
        else:
            findings.append(Finding(name, "ok", version))
    return findings


def _extras(versions: Mapping[str, str]) -> list[Finding]:
    findings = []
    for extra, packages in EXTRAS.items():
        package, releases = next(iter(packages.items()))
        name, install = f"extra [{extra}] {_plain(package)}", f"pip install 'megatron_dmc[{extra}]'"
        version = versions.get(_plain(package))
        if version is None:
            findings.append(Finding(name, "ok", f"not installed; only for {PURPOSES[extra]}: {install}"))
        elif not _allows(releases, version):
            findings.append(Finding(name, "warning", f"{version}, needed {releases} for {PURPOSES[extra]}", install))
        else:
            findings.append(Finding(name, "ok", version))
    return findings


def _plain(package: str) -> str:
    """The name of a package without its extras."""
    return package.partition("[")[0]


def _security(versions: Mapping[str, str]) -> list[Finding]:
    return [
        Finding(f"{package} security", "failed", f"{versions[package]}: {hole}", f"pip install '{package}>={floor}'")
        for package, (floor, hole) in SECURITY_FLOORS.items()
        if package in versions and _older(versions[package], floor)
    ]


def _impostors(versions: Mapping[str, str]) -> list[Finding]:
    """The package index holds unrelated projects under names that Megatron's documents mention."""
    findings = []
    if importlib.util.find_spec("apex") is not None and importlib.util.find_spec("apex.optimizers") is None:
        findings.append(Finding("apex", "failed", "is not NVIDIA's apex", "pip uninstall apex; it is not needed"))
    if "megatron" in versions:
        remedy = "pip uninstall megatron, then reinstall megatron-core, whose folder it shares"
        findings.append(Finding("megatron", "failed", "is not NVIDIA's Megatron-LM", remedy))
    return findings


def _environment(environment: Mapping[str, str]) -> list[Finding]:
    findings = []
    if environment.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0") not in ("", "0"):
        detail = "lets every checkpoint run code when it is loaded"
        findings.append(Finding("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "failed", detail, "unset it"))
    if "TORCH_NCCL_AVOID_RECORD_STREAMS" in environment:
        detail = "is ignored by torch, and gave wrong losses in one release"
        findings.append(Finding("TORCH_NCCL_AVOID_RECORD_STREAMS", "warning", detail, "unset it"))
    return findings


def _gpu(versions: Mapping[str, str]) -> Finding:
    if "torch" not in versions:
        return Finding("GPU", "warning", "cannot be seen without torch", "install torch")
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "ok", "none: everything runs on the CPU, at small sizes")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in devices))


def _matrix_products(versions: Mapping[str, str]) -> list[Finding]:
    """How fast this CPU multiplies matrices in both types of training, and so whether ``--bf16`` pays on it."""
    if "torch" not in versions:
        return []
    import torch

    rates = {dtype: _operations_per_second(dtype) for dtype in (torch.float32, torch.bfloat16)}
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return [_judged_products(rates[torch.float32], rates[torch.bfloat16], f"{threads} threads, {instructions}")]


def _judged_products(float32: float, bfloat16: float, conditions: str) -> Finding:
    """What both rates, in operations per second, mean for a run on this CPU."""
    gain = bfloat16 / float32
    advice = "--bf16 pays" if gain >= WORTH_BFLOAT16 else "--bf16 does not pay"
    detail = f"float32 {float32 / 1e9:.0f} GFLOP/s, bfloat16 {gain:.2f} times that ({conditions}): {advice} on this CPU"
    return Finding("CPU matrix products", "ok", detail)


def _operations_per_second(dtype: Any) -> float:
    """The best of a few products after one to warm up: the one that other processes disturbed least."""
    import torch

    rows, inner, columns = PRODUCT_SHAPE
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    seconds = []
    for _ in range(PRODUCT_TURNS + 1):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(seconds[1:])


def _machine(directory: Path) -> list[Finding]:
    existing, free = free_space(directory)
    findings = [_size(f"disk at {existing}", free, MIN_FREE_DISK, "free some space")]
    shared = Path("/dev/shm")
    if shared.is_dir():
        remedy = "start the container with --shm-size=8g; data loaders and NCCL use it"
        findings.append(_size(str(shared), shutil.disk_usage(shared).total, MIN_SHARED_MEMORY, remedy))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings.append(_size("memory", memory, MIN_MEMORY, "the quickstart needs 8 GB"))
    cores = len(os.sched_getaffinity(0))
    return [*findings, Finding("CPU cores", "ok", str(cores))]


def _size(name: str, found: float, lowest: float, remedy: str) -> Finding:
    detail = f"{found / 1e9:.1f} GB"
    return Finding(name, "ok", detail) if found >= lowest else Finding(name, "warning", f"only {detail}", remedy)
