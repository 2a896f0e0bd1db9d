"""What is known of the data before Megatron starts."""

import json

import numpy as np
import pytest

from megatron_dmc.data.indexed import IndexedWriter
from megatron_dmc.data.manifest import SCHEMA_VERSION, write_manifest
from megatron_dmc.training.data_flags import add_data_arguments, data_flags, data_sources
from megatron_dmc.training.flag_parser import FlagParser


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, eod in (("train", 2), ("validation", 2), ("other", 5), ("foreign", None)):
        write(tmp_path / name, eod)
    return tmp_path


def write(prefix, eod):
    """A data set of one document; with a manifest where the end of a document is given."""
    with IndexedWriter(prefix, 100) as writer:
        writer.add(np.arange(10))
    text = dict.fromkeys(("tokenizer_sha256", "bin_sha256", "idx_sha256", "corpus_sha256"), "0")
    counts = {"vocab_size": 100, "num_tokens": 10, "num_documents": 1, "num_bad_lines": 0}
    if eod is not None:
        write_manifest(prefix, {"schema_version": SCHEMA_VERSION, "eod": eod, "files": [], **text, **counts})


def flags(*argv):
    return data_flags(parsed(*argv))


def parsed(*argv):
    parser = FlagParser()
    parser.add_argument("--tokenizer-type")
    add_data_arguments(parser)
    return parser.parse_known_args(argv)[0]


@pytest.mark.parametrize(
    "data",
    [
        ("--train-data-path", "train"),
        ("--train-data-path", "train", "--test-data-path", "validation"),
        ("--data-path", "train", "--split", "1,0,0"),
        ("--data-path", "train", "--split", "100"),
    ],
)
def test_without_validation_data_nothing_is_validated(data):
    assert flags(*data)["--eval-iters"] == "0"
    assert flags(*data, "--eval-iters", "0")["--eval-iters"] == "0"
    for asked in (("--eval-iters", "3"), ("--full-validation",)):
        with pytest.raises(ValueError, match=f"{' '.join(asked)}: there is no validation data; give --valid-data-path"):
            flags(*data, *asked)


@pytest.mark.parametrize(
    "data",
    [
        ("--train-data-path", "train", "--valid-data-path", "validation"),
        ("--data-path", "train"),
        ("--data-path", "0.5", "train", "0.5", "validation", "--split", "9,1,0"),
    ],
)
def test_with_validation_data_the_number_of_batches_is_the_users(data):
    assert "--eval-iters" not in flags(*data, "--eval-iters", "3")


@pytest.mark.parametrize("flag", ["--train-data-path", "--data-path", "--test-data-path"])
def test_a_data_set_that_is_not_there_is_named_with_those_that_are(flag):
    with pytest.raises(
        ValueError, match=f"{flag} trian: trian.bin and trian.idx missing; .*foreign, other, train, val"
    ):
        flags(flag, "trian")
    with pytest.raises(ValueError, match="there is no data set in nowhere"):
        flags(flag, "0.5", "train", "0.5", "nowhere/train")
    with pytest.raises(ValueError, match="give the path without .bin or .idx"):
        flags(flag, "train.bin")


def test_half_a_data_set_is_missing(here):
    (here / "train.idx").unlink()
    with pytest.raises(ValueError, match=r"train: train\.idx missing"):
        flags("--train-data-path", "train")


def test_no_data_at_all_is_refused():
    with pytest.raises(ValueError, match="no training data: give --train-data-path"):
        flags()
    assert flags("--mock-data") == {}


def test_lists_of_data_sets_are_read(here):
    (here / "blend").write_text("0.3 train\n0.7 validation\n")
    (here / "splits").write_text(json.dumps({"train": ["train", "other", "foreign"], "valid": None, "test": "1 other"}))
    assert data_sources(parsed("--data-args-path", "blend"))["--data-args-path"] == ["train", "validation"]
    sources = data_sources(parsed("--per-split-data-args-path", "splits"))
    assert [found for found in sources.values() if found] == [["train", "other", "foreign"], ["other"]]
    (here / "splits").write_text(json.dumps({"train": 3}))
    with pytest.raises(ValueError, match="a list of weights and prefixes per split"):
        flags("--per-split-data-args-path", "splits")


def test_documents_end_as_the_data_says():
    assert flags("--train-data-path", "train")["--null-tokenizer-eod-id"] == "2"
    assert flags("--train-data-path", "train", "--eod-mask-loss")["--null-tokenizer-eod-id"] == "2"
    for own in (("--tokenizer-type", "SentencePieceTokenizer"), ("--null-tokenizer-eod-id", "2")):
        assert "--null-tokenizer-eod-id" not in flags("--train-data-path", "train", *own)


@pytest.mark.parametrize(
    ("prefixes", "why"),
    [
        (("foreign",), "there is no manifest beside the data"),
        (("1", "train", "1", "other"), "documents end with 2 or 5"),
        (("1", "train", "1", "foreign"), "documents end with 2 or an unknown id"),
    ],
)
def test_masking_an_end_that_is_not_known_is_refused(prefixes, why):
    assert "--null-tokenizer-eod-id" not in flags("--data-path", *prefixes)
    with pytest.raises(ValueError, match=f"--eod-mask-loss: the end of a document is not known, {why}"):
        flags("--data-path", *prefixes, "--eod-mask-loss")


def test_another_end_than_that_of_the_data_is_refused():
    assert flags("--data-path", "foreign", "--eod-mask-loss", "--null-tokenizer-eod-id", "7") == {}
    with pytest.raises(ValueError, match="--null-tokenizer-eod-id 7: documents of train end with 2"):
        flags("--data-path", "train", "--null-tokenizer-eod-id", "7")
