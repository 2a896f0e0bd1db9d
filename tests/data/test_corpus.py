"""Documents come out as they are in the files, and bad input is named by file and line."""

import gzip
import json
import sys

import pytest

from megatron_dmc.data.corpus import BadLines, python_source, user_corpus

LINES = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(3))
DOCUMENTS = [f"document {number}" for number in range(3)]


def test_text_files_are_documents_in_the_order_given(texts, text_files):
    assert list(user_corpus(text_files).documents()) == texts
    assert list(user_corpus(text_files[::-1]).documents()) == texts[::-1]


def test_jsonl_lines_are_documents_and_empty_ones_are_left_out(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"body": "one\\n"}\n\n{"body": ""}\n{"body": "two", "id": 2}')
    assert list(user_corpus([path], "body").documents()) == ["one\n", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "my-corpus.json", "a.txt", "corpus", "part-0.data"])
@pytest.mark.parametrize("compress", ["", ".gz", ".zst"])
def test_json_lines_are_read_under_any_name(tmp_path, name, compress):
    path = tmp_path / (name + compress)
    path.write_bytes(compressed(LINES.encode(), compress))
    assert list(user_corpus([path]).documents()) == DOCUMENTS


@pytest.mark.parametrize("compress", [".gz", ".zst"])
def test_a_compressed_text_is_one_document(tmp_path, compress):
    path = tmp_path / f"a.txt{compress}"
    path.write_bytes(compressed(b"one\n\xe2\x80\xa8two\n", compress))
    assert list(user_corpus([path]).documents()) == ["one\n\u2028two\n"]
    assert user_corpus([path]).num_bytes is None


@pytest.mark.parametrize("compress", [".gz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no such format"])
def test_damaged_compression_names_the_file(tmp_path, compress, damage):
    path = tmp_path / f"a.jsonl{compress}"
    path.write_bytes(damage(compressed(LINES.encode() * 1000, compress)))
    with pytest.raises(ValueError, match=r"a\.jsonl\.(gz|zst) is damaged"):
        list(user_corpus([path]).documents(BadLines()))


@pytest.mark.parametrize("text", ["{\n}\n", '{"other": "x"}\n', "[1, 2]\n", '"text"\n', "plain\n" + LINES])
def test_a_text_that_is_no_json_lines_is_one_document(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert list(user_corpus([tmp_path / "a.txt"]).documents()) == [text]


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    text = "a\u2028b\x0bc\x0cd\x85e\rf"
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n")
    assert list(user_corpus([tmp_path / "a.jsonl"]).documents()) == [text]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    folder = tmp_path / "corpus"
    for name in ("b/2.jsonl", "b/10.json", "a.txt", "c.jsonl.gz", "README.md", ".cache/x.jsonl", ".hidden.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(compressed(json.dumps({"text": name}).encode(), name[-3:]))
    (tmp_path / "last.txt").write_text("last")
    corpus = user_corpus([folder, tmp_path / "last.txt"])
    assert list(corpus.documents()) == ["a.txt", "b/10.json", "b/2.jsonl", "c.jsonl.gz", "last"]
    assert corpus.names[0] == "corpus/a.txt"
    assert corpus.names[-1] == "last.txt"
    assert corpus.left_out == ("corpus/README.md",)


def test_a_folder_without_anything_to_read(tmp_path):
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ValueError, match=r"holds no file to read: \.jsonl, .*\.parquet"):
        user_corpus([tmp_path])


def test_parquet_rows_are_documents(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": ["one", "", "two\n"], "id": [1, 2, 3]})
    assert list(user_corpus([tmp_path / "a.parquet"]).documents()) == ["one", "two\n"]
    with pytest.raises(ValueError, match="has no column 'body': give one of text, id with --json-key"):
        list(user_corpus([tmp_path / "a.parquet"], "body").documents())


def test_parquet_rows_without_text_are_bad(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"text": ["one", None, "two"]})
    with pytest.raises(ValueError, match=r"a\.parquet, row 2 has no text"):
        list(user_corpus([tmp_path / "a.parquet"]).documents())
    bad = BadLines()
    assert list(user_corpus([tmp_path / "a.parquet"]).documents(bad)) == ["one", "two"]
    assert bad.count == 1


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        list(user_corpus([tmp_path / "a.parquet"]).documents(BadLines()))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_what_is_missing_is_said(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"needs the pyarrow package: pip install 'megatron_dmc\[data\]'"):
        user_corpus([tmp_path / name])


def test_bad_lines_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": 1}\n{\n\n{"text": "two"}\n')
    bad = BadLines()
    assert list(user_corpus([tmp_path / "a.jsonl"]).documents(bad)) == ["one", "two"]
    assert bad.count == 2
    assert "line 2 has no text" in str(bad.first)


def compressed(data, suffix):
    if suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        return pyarrow.compress(data, codec="zstd", asbytes=True)
    return gzip.compress(data) if suffix == ".gz" else data


def write_parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"other": "x"}', "line 2 has no text under 'text'.*--json-key"),
        ('["text"]', "line 2 is not JSON: a list: one object per line"),
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
    monkeypatch.setattr("megatron_dmc.data.json_lines.LONGEST_LINE", 10)
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
