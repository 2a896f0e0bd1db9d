"""Exit codes and messages of the program, whatever the command."""

import argparse
import subprocess
import sys

import pytest

import megatron_dmc.cli as cli
from megatron_dmc.support.errors import CheckFailed, InfrastructureError

HEAVY = ("torch", "numpy", "megatron.core", "transformers", "tokenizers", "sentencepiece", "matplotlib", "pyarrow")


def commands(parser, before=()):
    """Every command with its parts: ``convert import``."""
    yield list(before)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, part in action.choices.items():
                yield from commands(part, (*before, name))


def run_with(monkeypatch, error):
    """The exit code when a command raises ``error``."""

    def run(args):
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    return cli.main([])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("wrong"), 1),
        (OverflowError("wrong"), 1),
        (ImportError("wrong"), 1),
        (FileNotFoundError("wrong"), 1),
        (IsADirectoryError("wrong"), 1),
        (CheckFailed("wrong"), 2),
        (InfrastructureError("wrong"), 64),
        (OSError("wrong"), 64),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(monkeypatch, capsys, error, code):
    assert run_with(monkeypatch, error) == code
    assert capsys.readouterr().err == "megatron-dmc: wrong\n"


def test_an_interruption_says_how_to_continue(monkeypatch, capsys):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["unknown"], [], ["data", "prepare"], ["doctor", "--js"], ["report"]])
def test_bad_usage_exits_with_1(capsys, argv):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 1
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys, command):
    try:
        code = cli.main([command, "--help"])
    except SystemExit as left:
        code = left.code
    assert code == 0
    assert f"megatron-dmc {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands(cli.build_parser()), ids=lambda command: " ".join(command) or "none")
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys; from megatron_dmc.cli import main\n"
        f"try: main({[*command, '--help']})\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stderr.strip() == "[]"
    assert "usage: megatron-dmc" in finished.stdout
