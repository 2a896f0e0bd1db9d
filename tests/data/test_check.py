"""`data check` finds what is wrong, and says what to do."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_dmc.data.check import check_cache, check_data_set, check_index, check_tokenizers_agree
from megatron_dmc.data.indexed import IndexedTokens, IndexedWriter
from megatron_dmc.data.manifest import read_manifest, write_manifest
from megatron_dmc.data.prepare import Split, prepare_directory
from megatron_dmc.data.sentencepiece_training import train_tokenizer


@pytest.fixture
def prefix(corpus, tokenizer_directory, tmp_path):
    prepare_directory(corpus, tmp_path / "data", tokenizer=tokenizer_directory, split=Split(1, 0, 0))
    return tmp_path / "data" / "train"


def failures(findings):
    return [f"{finding.name} {finding.detail}" for finding in findings if finding.status == "failed"]


def test_a_good_data_set_passes(prefix, tokenizer_directory):
    findings = check_data_set(prefix, tokenizer_directory)
    assert len(findings) == 6
    assert failures(findings) == []


def test_another_tokenizer_is_found(prefix, texts, tmp_path):
    (tmp_path / "other").mkdir()
    train_tokenizer(texts, 340, tmp_path / "other")
    assert len(failures(check_data_set(prefix, tmp_path / "other"))) == 1


def test_changed_tokens_are_found_by_their_hash(prefix):
    path = prefix.with_name("train.bin")
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    assert any("train.bin" in failure and "manifest" in failure for failure in failures(check_data_set(prefix)))


def test_ids_beyond_the_vocabulary_and_open_documents_are_found(prefix):
    manifest = read_manifest(prefix)
    with IndexedWriter(prefix, manifest["vocab_size"]) as writer:
        writer.add(np.array([1, manifest["vocab_size"], 5]))
    found = failures(check_data_set(prefix))
    assert any(f"id {manifest['vocab_size']}: allowed are 0 to" in failure for failure in found)
    assert any("document 0 does not end" in failure for failure in found)


def test_a_manifest_that_counts_otherwise_is_found(prefix):
    write_manifest(prefix, {**read_manifest(prefix), "num_documents": 7})
    assert any("the manifest says (7," in failure for failure in failures(check_data_set(prefix)))


def test_a_broken_index_is_one_finding_not_a_crash(prefix):
    prefix.with_name("train.idx").write_bytes(b"short")
    assert any("shorter than the header" in failure for failure in failures(check_data_set(prefix)))


def test_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        check_data_set(tmp_path / "nothing")


def test_both_tokenizers_of_a_directory_are_compared(tokenizer_directory, texts, tmp_path):
    assert failures(check_tokenizers_agree(tokenizer_directory)) == []
    train_tokenizer(texts[:20], 320, tmp_path)
    shutil.copy(tokenizer_directory / "tokenizer.json", tmp_path)
    assert len(failures(check_tokenizers_agree(tmp_path))) == 1


def test_index_cache(tmp_path):
    np.save(tmp_path / "good.npy", np.arange(10))
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    (tmp_path / "text.npy").write_text("not an array")
    content = (tmp_path / "good.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-8])
    findings = {finding.name.rsplit("/", 1)[1]: finding.status for finding in check_cache(tmp_path)}
    assert findings == {
        "cut.npy": "failed",
        "floats.npy": "failed",
        "good.npy": "ok",
        "pickle.npy": "failed",
        "text.npy": "failed",
    }


def test_no_index_cache(tmp_path):
    with pytest.raises(ValueError, match="holds no index"):
        check_cache(tmp_path)


def test_checking_reads_the_real_data(prefix):
    data = IndexedTokens(prefix)
    assert any(f"{len(data)} documents" in finding.detail for finding in check_data_set(prefix))


def _header(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _array(kind: bytes, shape: bytes) -> bytes:
    return _header(b"{'descr': '%s', 'fortran_order': False, 'shape': %s}" % (kind, shape))


class _Touch:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


HOSTILE = {
    "a plain pickle": lambda marker: pickle.dumps(_Touch(marker)),
    "objects": lambda marker: (
        _header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + pickle.dumps([_Touch(marker)])
    ),
    "an archive": lambda marker: b"PK\3\4" + bytes(40),
    "fields of objects": lambda marker: _header(b"{'descr': [('x', '|O')], 'fortran_order': False, 'shape': (1,)}"),
    "a program": lambda marker: _header(b"__import__('os').system('x')"),
    "a large shape": lambda marker: _array(b"<i8", b"(1000000000000,)"),
    "a negative shape": lambda marker: _array(b"<i8", b"(-1, -2)") + bytes(16),
    "deep brackets": lambda marker: _header(b"(" * 9000),
    "a long header": lambda marker: _header(b" " * 65000),
    "text": lambda marker: _array(b"<U8", b"(1,)") + bytes(32),
    "another version": lambda marker: b"\x93NUMPY\x09\x00" + bytes(20),
    "nothing": lambda marker: b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_index_is_refused_and_nothing_runs(tmp_path, kind):
    marker, path = tmp_path / "marker", tmp_path / "index.npy"
    path.write_bytes(HOSTILE[kind](marker))
    with pytest.raises(ValueError, match="delete it"):
        check_index(path)
    assert [finding.status for finding in check_cache(tmp_path)] == ["failed"]
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_an_index_that_is_no_file_is_not_opened(tmp_path, kind):
    path = tmp_path / "index.npy"
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    with pytest.raises(ValueError, match="not a regular file"):
        check_index(path)
