"""``megatron-dmc data``: from files to a checked data set."""

import json

import pytest

from megatron_dmc.cli import main


@pytest.fixture
def prepared(text_files, tokenizer_directory, tmp_path):
    inputs = [str(path) for path in text_files]
    tokenizer = str(tokenizer_directory)
    output = tmp_path / "data"
    arguments = ["--tokenizer", tokenizer, "--output", str(output), "--split", "60,20,20"]
    assert main(["data", "prepare", *inputs, *arguments]) == 0
    return output


def test_prepare_then_check(prepared, capsys):
    prefixes = [str(prepared / name) for name in ("train", "validation", "test")]
    assert main(["data", "check", *prefixes, "--tokenizer", str(prepared / "tokenizer"), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {finding["status"] for finding in findings} == {"ok"}


def test_a_damaged_data_set_exits_with_2(prepared, capsys):
    with open(prepared / "test.bin", "r+b") as stream:
        stream.write(b"\xff")
    assert main(["data", "check", str(prepared / "test")]) == 2
    assert "prepare the data again" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt", "--train-tokenizer"], "not a file: missing.txt"),
        (["--train-tokenizer"], "no input"),
        (["x.txt", "--python-source", "--train-tokenizer"], "give one of the two"),
        (["--python-source", "--train-tokenizer", "--split", "1,2"], "three numbers"),
        (["--python-source", "--tokenizer", "missing"], "no tokenizer at missing"),
        (["--python-source", "--train-tokenizer", "--workers", "0"], "workers=0"),
    ],
)
def test_mistakes_exit_with_1_and_write_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", *arguments, "--output", "out"]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_data_set_to_check(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path / "nothing")]) == 1
    assert "is missing" in capsys.readouterr().err


def test_what_was_read_and_left_out_is_said(tmp_path, tokenizer_directory, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "my-corpus.json").write_text('{"text": "one"}\n{"text": 2}\n{"text": "two"}\n')
    (folder / "README.md").write_text("not a document")
    arguments = ["data", "prepare", str(folder), "--tokenizer", str(tokenizer_directory), "--split", "1,0,0"]
    assert main([*arguments, "--output", str(tmp_path / "data")]) == 1
    assert "my-corpus.json, line 2 has no text under 'text': name its field" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "data"), "--skip-bad-lines"]) == 0
    printed = capsys.readouterr().out
    assert "files read: 1\n" in printed
    assert "files left out: 1 of another kind, first corpus/README.md" in printed
    assert "bad lines left out: 1; the first: " in printed
    assert f"tokenizer: {tokenizer_directory / 'tokenizer.json'}" in printed
    assert "data/train: 2 documents" in printed
