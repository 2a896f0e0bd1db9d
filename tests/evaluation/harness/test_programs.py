"""Generated programs: what passes, and what their limits keep in."""

import os

import pytest

from megatron_dmc.evaluation.harness import programs
from megatron_dmc.evaluation.harness.pass_at_1 import pass_at_1, program
from megatron_dmc.evaluation.harness.programs import Limits, isolation, run_program
from tests.evaluation.harness.benchmark_files import HUMANEVAL

SHORT = Limits(seconds=20)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", "passed"),
        ("raise ValueError('no')", "ValueError: no"),
        ("assert 1 == 2", "AssertionError"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "ended early with status 0"),
        ("import os; os._exit(0)", "ended early with status 0"),
        ("open('reached', 'w').write('guess'); import os; os._exit(0)", "ended early with status 0"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('large', 'wb').write(b'x' * (2 << 20))", "OSError: [Errno 27] File too large"),
        ("import torch", "ModuleNotFoundError: No module named 'torch'"),
    ],
)
def test_what_passes(source, reason):
    outcome = run_program(source, SHORT)
    assert outcome.reason == reason
    assert outcome.passed == (reason == "passed")


def test_a_program_without_an_end():
    assert run_program("while True: pass", Limits(seconds=2)).reason == "timed out"


def test_the_environment_and_the_folder_of_the_user_are_out_of_sight(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_USER", "x")
    source = f"import os\nassert 'SECRET_OF_THE_USER' not in os.environ\nassert os.getcwd() != {os.getcwd()!r}"
    assert run_program(source, SHORT).passed


def test_a_network_is_out_of_reach_where_the_system_allows():
    if isolation() != "no network":
        pytest.skip(isolation())
    source = "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as error:\n"
    assert run_program(f"{source}    assert error.errno == 101, error", SHORT).passed


def test_a_system_that_does_not_take_the_network_away_says_so(monkeypatch):
    monkeypatch.setattr(programs, "_without_network", lambda: ())
    assert "network not taken away" in isolation()
    assert run_program("x = 1", SHORT).passed


def test_the_whole_program_calls_its_tests():
    assert run_program(program(HUMANEVAL, "    return 1\n"), SHORT).passed
    assert run_program(program(HUMANEVAL, "    return 2\n"), SHORT).reason == "AssertionError"


def test_pass_at_1_is_the_share_that_passes(monkeypatch):
    from megatron_dmc.evaluation.harness import pass_at_1 as module

    def generate(scorer, tokenizer, requests):
        for request, text in zip(requests, ("    return 1\n", "    return 2\n"), strict=True):
            request.text = text

    class Tokenizer:
        def encode_prompt(self, text):
            return [1]

    monkeypatch.setattr(module, "generate", generate)
    found = pass_at_1(None, Tokenizer(), frozenset(), [HUMANEVAL] * 2)
    assert found["metrics"] == {"pass@1,none": 0.5, "pass@1_stderr,none": 0.5}
    assert [one["reason"] for one in found["outcomes"]] == ["passed", "AssertionError"]
