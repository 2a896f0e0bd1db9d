"""Prepared data is what the tokenizer says, split by content, the same with any number of workers."""

import filecmp
import json

import numpy as np
import pytest

from megatron_dmc.data.corpus import BadLines, Corpus, user_corpus
from megatron_dmc.data.indexed import IndexedTokens
from megatron_dmc.data.manifest import manifest_path, read_manifest
from megatron_dmc.data.prepare import SPLITS, Split, prepare_directory
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.support.files import sha256_file
from tests.data.tokenizer.directories import sentencepiece_directory

HALVES = Split(60, 20, 20)


@pytest.fixture(scope="module")
def prepared(corpus, tokenizer_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_directory(corpus, directory, tokenizer=tokenizer_directory, split=HALVES)
    return directory


def test_every_document_is_in_one_split_with_its_end(prepared, texts):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    found = []
    for name in SPLITS:
        data = IndexedTokens(prepared / name)
        for document in range(len(data)):
            tokens = data.tokens_of(document)
            assert tokens[-1] == tokenizer.eod
            text = tokenizer.decode(tokens[:-1])
            assert HALVES.of(text) == name
            found.append(text)
    assert sorted(found) == sorted(texts)


def test_manifest_says_what_is_in_the_files(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    for name in SPLITS:
        manifest, data = read_manifest(prepared / name), IndexedTokens(prepared / name)
        assert manifest["num_tokens"] == len(data.tokens)
        assert manifest["num_documents"] == len(data)
        assert manifest["bin_sha256"] == sha256_file(prepared / f"{name}.bin")
        assert manifest["idx_sha256"] == sha256_file(prepared / f"{name}.idx")
        assert (manifest["vocab_size"], manifest["eod"]) == (tokenizer.vocab_size, tokenizer.eod)
        assert manifest["tokenizer_sha256"] == tokenizer.sha256


def test_workers_do_not_change_a_byte(prepared, corpus, tokenizer_directory, tmp_path):
    prepare_directory(corpus, tmp_path / "data", tokenizer=tokenizer_directory, split=HALVES, workers=2)
    names = [f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx", "json")]
    assert filecmp.cmpfiles(prepared, tmp_path / "data", names, shallow=False) == (names, [], [])


def test_megatron_reads_the_same_documents(prepared):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    ours, theirs = IndexedTokens(prepared / "train"), indexed_dataset.IndexedDataset(str(prepared / "train"))
    assert len(ours) == len(theirs)
    assert len(theirs.document_indices) == len(theirs) + 1
    for document in range(len(ours)):
        np.testing.assert_array_equal(theirs[document], ours.tokens_of(document))


def test_a_tokenizer_can_be_trained_on_the_way(corpus, tmp_path):
    manifests = prepare_directory(corpus, tmp_path / "data", tokenizer=340, split=Split(1, 0, 0))
    assert list(manifests) == ["train"]
    assert manifests["train"]["vocab_size"] == load_tokenizer(tmp_path / "data" / "tokenizer").vocab_size == 340


def test_copies_of_a_document_stay_in_one_split():
    split = Split(1, 1, 1)
    assert {split.of("the same text") for _ in range(3)} == {split.of("the same text")}
    shares = [split.of(str(number)) for number in range(3000)]
    assert all(900 < shares.count(name) < 1100 for name in SPLITS)


@pytest.mark.parametrize("shares", [(0, 0, 0), (1, -1, 1)])
def test_shares_that_cannot_be(shares):
    with pytest.raises(ValueError, match="three shares"):
        Split(*shares)


def test_a_split_without_documents_leaves_nothing_behind(text_files, tokenizer_directory, tmp_path):
    one = Corpus(tuple(text_files[:1]))
    with pytest.raises(ValueError, match="no document fell into"):
        prepare_directory(one, tmp_path / "data", tokenizer=tokenizer_directory, split=Split())
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_kept(prepared, corpus, tokenizer_directory):
    with pytest.raises(ValueError, match="--overwrite"):
        prepare_directory(corpus, prepared, tokenizer=tokenizer_directory, split=Split(1, 0, 0))
    assert (prepared / "test.bin").is_file()


def test_no_worker(corpus, tokenizer_directory, tmp_path):
    with pytest.raises(ValueError, match="workers=0: must be >= 1"):
        prepare_directory(corpus, tmp_path / "data", tokenizer=tokenizer_directory, split=Split(), workers=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema_version=3"),
        ({"vocab_size": "360"}, "does not hold exactly"),
        ({"files": "a.txt"}, "does not hold exactly"),
        ({"extra": 1}, "does not hold exactly"),
    ],
)
def test_a_manifest_of_another_kind(prepared, tmp_path, change, message):
    stored = json.loads(manifest_path(prepared / "train").read_text())
    (tmp_path / "train.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "train")


def test_a_manifest_of_the_first_version_is_read(prepared, tmp_path):
    stored = json.loads(manifest_path(prepared / "train").read_text())
    del stored["files"], stored["num_bad_lines"]
    (tmp_path / "train.json").write_text(json.dumps({**stored, "schema_version": 1}))
    assert read_manifest(tmp_path / "train") == {**stored, "schema_version": 2, "files": [], "num_bad_lines": 0}


def test_the_manifest_names_the_files_and_counts_what_was_left_out(tokenizer_directory, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"text": "x"}\n{"text": 3}\n{"text": "y"}\n')
    (folder / "a.txt").write_text("x")
    corpus, output = user_corpus([folder]), tmp_path / "data"
    with pytest.raises(ValueError, match="line 2 has no text"):
        prepare_directory(corpus, output, tokenizer=tokenizer_directory, split=Split(1, 0, 0))
    manifests = prepare_directory(
        corpus, output, tokenizer=tokenizer_directory, split=Split(1, 0, 0), workers=2, bad=BadLines()
    )
    assert manifests["train"]["files"] == ["corpus/a.txt", "corpus/b.jsonl"]
    assert manifests["train"]["num_bad_lines"] == 1
    assert manifests["train"]["num_documents"] == 3


def test_the_tokenizer_that_is_named_is_the_one_of_the_data(corpus, tokenizer_directory, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model"):
        named = tokenizer_directory / name
        manifests = prepare_directory(corpus, tmp_path / name, tokenizer=named, split=Split(1, 0, 0))
        assert manifests["train"]["tokenizer_sha256"] == sha256_file(named)
        assert load_tokenizer(tmp_path / name / "tokenizer").path.name == name


def test_added_tokens_are_whole_in_the_data(tmp_path):
    first = sentencepiece_directory(tmp_path)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"text": "<|im_start|>user\nhi<|im_end|>"}))
    prepare_directory(
        user_corpus([tmp_path / "chat.jsonl"]), tmp_path / "data", tokenizer=tmp_path, split=Split(1, 0, 0), workers=2
    )
    tokens = IndexedTokens(tmp_path / "data" / "train").tokens_of(0).tolist()
    assert tokens[0] == first + 1
    assert tokens[-2:] == [first, first]


def test_data_of_another_tool_has_no_manifest(tmp_path):
    assert read_manifest(tmp_path / "other") is None
