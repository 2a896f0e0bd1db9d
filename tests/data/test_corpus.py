"""Documents come out as they are in the files, and bad input is named by file and line."""

import json

import pytest

from megatron_dmc.data.corpus import python_source, user_corpus


def test_text_files_are_documents_in_the_order_given(texts, text_files):
    assert list(user_corpus(text_files).documents()) == texts
    assert list(user_corpus(text_files[::-1]).documents()) == texts[::-1]


def test_jsonl_lines_are_documents_and_empty_ones_are_left_out(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"body": "one\\n"}\n\n{"body": ""}\n{"body": "two", "id": 2}')
    assert list(user_corpus([path], "body").documents()) == ["one\n", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"other": "x"}', "line 2 has no text under 'text'.*--json-key"),
        ('["text"]', "line 2 has no text"),
        ('{"text": 3}', "line 2 has no text"),
        ('{"text": "\\ud800"}', "line 2 is not Unicode"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "documents.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(user_corpus([path]).documents())


def test_a_line_without_end_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_dmc.data.corpus.LONGEST_LINE", 10)
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "a long line"}')
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        list(user_corpus([path]).documents())


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "image.txt"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        list(user_corpus([path]).documents())


def test_missing_input(tmp_path):
    with pytest.raises(ValueError, match="no input"):
        user_corpus([])
    with pytest.raises(ValueError, match="not a file: .*nothing"):
        user_corpus([tmp_path / "nothing"])


def test_the_standard_library_is_real_text_in_one_order():
    corpus = python_source()
    assert corpus.num_bytes > 5_000_000
    names = [path.name for path in corpus.files]
    assert {"argparse.py", "dataclasses.py"} <= set(names)
    assert not [path for path in corpus.files if {"test", "site-packages"} & set(path.parts[-3:])]
    assert corpus.files == python_source().files
