"""Imports go one way, and importing the package pulls in nothing heavy and changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("megatron_dmc", "checkpoints_convert", "examples")

LEAVES = frozenset({"megatron_dmc", "config", "support", "stages"})
"""Parts that need no other one but those of them before; ``megatron_dmc`` stands for the version and DMCConfig."""

ALLOWED = {
    "stages": frozenset(),
    "config": frozenset({"stages"}),
    "support": frozenset(),
    "ops": frozenset(),
    "models": LEAVES | {"ops"},
    "methods": LEAVES | {"models", "ops"},
    "checkpoint": LEAVES | {"models"},
    "data": LEAVES | {"models", "checkpoint"},
    "seam": LEAVES,
    "runs": LEAVES,
    "training": LEAVES | {"models", "ops", "methods", "checkpoint", "data", "runs", "seam"},
    "inference": LEAVES | {"models", "ops", "methods", "checkpoint", "data"},
    "evaluation": LEAVES | {"models", "ops", "methods", "data", "inference"},
    "hf": LEAVES | {"models", "ops", "methods", "inference"},
    "checkpoints_convert": LEAVES | {"models", "ops", "checkpoint", "seam"},
    "report": LEAVES | {"runs"},
    "recipes": LEAVES
    | {"models", "checkpoint", "data", "runs", "seam", "training", "inference", "evaluation", "report"}
    | {"checkpoints_convert"},
}
"""Part -> parts that it may import. ``cli`` and ``examples`` may import all of them."""

OUTSIDE = {
    "ops": {"torch", "triton"},
    "config": set(),
    "stages": set(),
}
"""Part -> the only packages outside the standard library that it may import."""


def modules():
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def part_of(name: str) -> str:
    """``megatron_dmc.ops.noise`` -> ``ops``; another package is its own part."""
    parts = name.split(".")
    if parts[0] != "megatron_dmc":
        return parts[0]
    return parts[1] if len(parts) > 1 else "megatron_dmc"


def imports_of(path: Path) -> set[str]:
    """Full names of what a module imports, wherever in the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole if node.module in ("megatron_dmc", "checkpoints_convert") else {node.module or ""}
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_go_one_way(path):
    part = part_of(module_name(path))
    if part in ("cli", "examples", "__main__"):
        return
    ours = {name for name in imports_of(path) if name.split(".")[0] in PACKAGES}
    # ``from megatron_dmc import __version__`` names the package itself.
    parts = {"megatron_dmc" if name == "megatron_dmc.__version__" else part_of(name) for name in ours}
    allowed = ALLOWED.get(part, LEAVES) | {part}
    assert parts <= allowed, f"{part} imports {sorted(parts - allowed)}"


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_pure_parts_import_little(path):
    allowed = OUTSIDE.get(part_of(module_name(path)))
    if allowed is None:
        return
    outside = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names) - {"megatron_dmc"}
    assert outside <= allowed


def test_decoding_and_conversion_do_not_need_megatron():
    for part in ("megatron_dmc/inference", "megatron_dmc/evaluation", "megatron_dmc/data", "megatron_dmc/checkpoint"):
        for path in (ROOT / part).rglob("*.py"):
            assert "megatron" not in {name.split(".")[0] for name in imports_of(path)}, path


@pytest.mark.parametrize(
    "statement", ["import megatron_dmc", "from megatron_dmc.cli import build_parser; build_parser()"]
)
def test_importing_stays_light(statement):
    """Neither the package nor the parser of all commands loads torch, Megatron or matplotlib."""
    heavy = ("torch", "megatron.core", "transformers", "matplotlib", "triton", "numpy")
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.strip() == "[]"
