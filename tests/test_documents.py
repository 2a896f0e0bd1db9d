"""Documents tell the truth: their commands parse, the paths they name exist, and they speak of the product alone."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from megatron_dmc.cli import build_parser
from megatron_dmc.training.arguments import add_dmc_arguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not {".venv", "runs", "node_modules"} & set(path.relative_to(ROOT).parts)
)
SHELL_BLOCK = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
NAMED_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
TOP_LEVEL = {path.name for path in ROOT.iterdir()}
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|opt|Users)/")
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(path: Path) -> list[str]:
    """Lines of shell blocks, continued lines joined."""
    text = path.read_text(encoding="utf-8")
    blocks = "\n".join(SHELL_BLOCK.findall(text)).replace("\\\n", " ")
    lines = [line.split(" #")[0].strip() for line in blocks.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def started_by_torchrun() -> list[tuple[str, str]]:
    """Commands of the program that torchrun starts, as they are called without it."""
    module = "-m megatron_dmc "
    return [
        (path, "megatron-dmc " + line.split(module)[1]) for path, line in all_commands("torchrun") if module in line
    ]


def all_commands(program: str) -> list[tuple[str, str]]:
    return [
        (path.relative_to(ROOT).as_posix(), line)
        for path in DOCUMENTS
        for line in commands(path)
        if re.match(rf"(\S+=\S+ )*(\S+/)?{program}\b", line)
    ]


@pytest.mark.parametrize(("document", "line"), all_commands("megatron-dmc") + started_by_torchrun())
def test_commands_parse(document, line):
    words = shlex.split(line)
    arguments = words[next(index for index, word in enumerate(words) if word.endswith("megatron-dmc")) + 1 :]
    args = build_parser().parse_args(arguments)
    if "--dmc-stage" in arguments:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        _, others = add_dmc_arguments(parser).parse_known_args(args.megatron_flags)
        assert not [flag for flag in others if flag.startswith("--dmc")]


@pytest.mark.parametrize(("document", "line"), all_commands("make"))
def test_make_targets_exist(document, line):
    assert set(shlex.split(line)[1:]) <= MAKE_TARGETS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_exist(path):
    text = path.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        assert (path.parent / link).exists(), f"{path}: link to {link}"
    for name in NAMED_PATH.findall(text):
        if "/" in name and name.split("/")[0] in TOP_LEVEL - {"runs"}:
            assert (ROOT / name).exists(), f"{path}: {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_document_names_a_machine(path):
    assert not MACHINE_PATHS.search(path.read_text(encoding="utf-8"))


def test_the_quick_start_is_what_the_makefile_does():
    makefile = (ROOT / "Makefile").read_text()
    assert "megatron-dmc quickstart --output runs/quickstart" in makefile
    assert {"make quickstart", "make test"} <= {line for _, line in all_commands("make")}
