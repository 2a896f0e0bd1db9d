"""The index is compared with the real sizes before anything is mapped."""

import random
import shutil
import struct

import numpy as np
import pytest

from megatron_dmc.data.indexed import HEADER, MAGIC, IndexedTokens, IndexedWriter

DOCUMENTS = [np.arange(5), np.arange(1), np.arange(100) % 7]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("indexed") / "data"
    with IndexedWriter(prefix, vocab_size=1000) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    return prefix


@pytest.fixture
def copied(written, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{written}{suffix}", tmp_path)
    return tmp_path / written.name


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_round_trip(tmp_path, vocab_size, dtype):
    with IndexedWriter(tmp_path / "data", vocab_size) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    data = IndexedTokens(tmp_path / "data")
    assert data.dtype == dtype
    assert len(data) == len(DOCUMENTS)
    for number, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(data.tokens_of(number), document)
    np.testing.assert_array_equal(data.tokens, np.concatenate(DOCUMENTS))


def test_megatron_opens_it(written):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    theirs = indexed_dataset.IndexedDataset(str(written))
    for number, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(theirs[number], document)


def test_an_empty_data_set(tmp_path):
    with IndexedWriter(tmp_path / "data", 1000):
        pass
    data = IndexedTokens(tmp_path / "data")
    assert (len(data), len(data.tokens)) == (0, 0)


def test_a_failed_writer_leaves_no_index(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "data", 1000) as writer:
        writer.add(DOCUMENTS[0])
        raise RuntimeError
    assert not (tmp_path / "data.idx").exists()


def header(magic=MAGIC, version=1, code=8, sequences=3, borders=4):
    return HEADER.pack(magic, version, code, sequences, borders)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (header(magic=b"NOTANIDX\0"), "no index of tokens"),
        (header(version=2), "no index of tokens"),
        (header(code=6), "no index of tokens"),
        (header(sequences=2**60), "its header asks for"),
        (header(sequences=4, borders=4), "its header asks for"),
        (header() + struct.pack("<i", -5), "contradict each other"),
        (header() + struct.pack("<i", 6), "contradict each other"),
    ],
)
def test_lies_in_the_index(copied, start, message):
    path = copied.with_name("data.idx")
    content = path.read_bytes()
    path.write_bytes(start + content[len(start) :])
    with pytest.raises(ValueError, match=message):
        IndexedTokens(copied)


def test_borders_must_rise_to_the_end(copied):
    path = copied.with_name("data.idx")
    path.write_bytes(path.read_bytes()[:-8] + struct.pack("<q", 10**6))
    with pytest.raises(ValueError, match="document borders"):
        IndexedTokens(copied)


def test_tokens_that_are_missing(copied):
    path = copied.with_name("data.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="its index says"):
        IndexedTokens(copied)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        IndexedTokens(copied)


def test_a_damaged_index_is_refused_or_harmless(copied):
    """Whatever bytes are changed or cut, opening ends in ValueError, or in a data set inside its bounds."""
    path = copied.with_name("data.idx")
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.randint(0, len(damaged))] if draw.random() < 0.3 else damaged)
        try:
            data = IndexedTokens(copied)
        except ValueError:
            continue
        assert sum(len(data.tokens_of(document)) for document in range(len(data))) == len(data.tokens)
