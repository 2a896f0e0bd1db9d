"""``megatron-dmc chat``: turns from a pipe and from a terminal, and mistakes."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from tests.inference.chat_model import TEMPLATE, write_chat_model
from tests.inference.model_directory import write_model

OPTIONS = ["--max-new-tokens", "8", "--ignore-eod"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_chat_model(folder, DMCConfig(decision_bias=-1.0))
    return folder


def chat(monkeypatch, capsys, model, turns, *options):
    """Exit code, and what was printed and said beside it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
    code = main(["chat", "--model", str(model), *OPTIONS, *options])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_every_line_is_a_turn_and_reads_what_it_adds(monkeypatch, capsys, model):
    code, out, _ = chat(monkeypatch, capsys, model, "the fox\n\nand a dog\nlast", "--json", "--system", "be brief")
    assert code == 0
    turns = [json.loads(line) for line in out.splitlines()]
    assert [(turn["turn"], turn["user"]) for turn in turns] == [(1, "the fox"), (2, "and a dog"), (3, "last")]
    assert all(len(turn["tokens"]) == 8 for turn in turns)
    tokens = [turn["cache"]["num_tokens"] for turn in turns]
    assert tokens == sorted(tokens)
    for before, turn in zip(tokens, turns[1:], strict=False):
        assert before + turn["speed"]["prefill_tokens"] + turn["speed"]["decode_tokens"] == turn["cache"]["num_tokens"]
    assert turns[-1]["cache"]["compression_ratio"] > 1.1


def test_answers_for_people(monkeypatch, capsys, model):
    code, out, said = chat(monkeypatch, capsys, model, "the fox\nand a dog\n")
    assert code == 0
    assert said.count("cache: ") == said.count("tokens/s; decode: ") == 2
    _, lines, _ = chat(monkeypatch, capsys, model, "the fox\nand a dog\n", "--json")
    assert out == "".join(json.loads(line)["text"] + "\n" for line in lines.splitlines())


def test_a_stop_string_ends_an_answer(monkeypatch, capsys, model):
    _, out, _ = chat(monkeypatch, capsys, model, "the fox\n", "--json")
    text = json.loads(out)["text"]
    _, out, _ = chat(monkeypatch, capsys, model, "the fox\n", "--json", "--stop", text[4:6])
    assert json.loads(out)["text"] == text[: text.index(text[4:6])]
    assert json.loads(out)["finish_reason"] == "stop"


def test_a_base_model_is_refused_and_a_template_may_be_given(monkeypatch, capsys, tmp_path):
    write_model(tmp_path / "base", max_position_embeddings=512)
    code, _, said = chat(monkeypatch, capsys, tmp_path / "base", "hello\n")
    assert code == 1
    assert "a base model was not taught to converse" in said
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    template = ("--chat-template", str(tmp_path / "template.jinja"), "--json")
    code, out, _ = chat(monkeypatch, capsys, tmp_path / "base", "hello\n", *template)
    assert code == 0
    assert len(json.loads(out)["tokens"]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chat-template", "nowhere"], "nowhere is missing"),
        (["--top-k", "-1"], "top_k=-1: must be >= 0"),
        (["--stop", ""], "must be strings that are not empty"),
        (["--prefill-chunk", "0"], "prefill_chunk=0: must be at least 1"),
        (["--num-blocks", "2"], "give the cache more blocks"),
        (["--memory-fraction", "2"], "--memory-fraction 2: must be in (0, 1]"),
        (["--num-blocks", "999999999999"], "lower --num-blocks"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_exit_with_1(monkeypatch, capsys, model, options, message):
    code, _, said = chat(monkeypatch, capsys, model, "the fox\n", *options)
    assert code == 1
    assert message in said


def test_a_conversation_that_is_too_long_ends_with_a_message(monkeypatch, capsys, model):
    code, out, said = chat(monkeypatch, capsys, model, "the fox\n" + "the dog " * 300 + "\n", "--json")
    assert code == 1
    assert len(out.splitlines()) == 1
    assert "the model reads at most 512: begin a new one" in said


def test_input_that_is_no_text_is_refused(model):
    command = [sys.executable, "-m", "megatron_dmc", "chat", "--model", str(model), *OPTIONS]
    finished = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, check=False)
    assert finished.returncode == 1
    assert "is not UTF-8 text" in finished.stderr.decode()


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(model):
    command = [sys.executable, "-m", "megatron_dmc", "chat", "--model", str(model), "--ignore-eod"]
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "100000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    try:
        read_until(terminal, b"\n> ")
        os.write(terminal, b"the fox\n")
        read_until(terminal, b"the fox\r\n")
        assert select.select([terminal], [], [], 120)[0], "no answer"
        process.send_signal(signal.SIGINT)
        assert b"cache: " in read_until(terminal, b"\n> ")
        os.write(terminal, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(terminal)


def read_until(terminal, end, seconds=120):
    seen, limit = b"", time.monotonic() + seconds
    while not seen.endswith(end):
        assert time.monotonic() < limit, seen
        if select.select([terminal], [], [], 1)[0]:
            byte = os.read(terminal, 1)
            assert byte, seen
            seen += byte
    return seen
