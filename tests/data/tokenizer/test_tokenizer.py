"""Tokenizers of our own training: the round trip is exact, and both formats give the same ids."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.data.corpus import python_source
from megatron_dmc.data.sentencepiece_training import SMALLEST_VOCABULARY, train_tokenizer
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.support.files import sha256_file

# Special tokens are not shown; U+2581 is sentencepiece's sign for a space.
SPECIAL = ("<unk>", "<s>", "</s>")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=60)
LAYOUTS = [
    "",
    " ",
    "\n",
    "\t\t x",
    "  two  spaces ",
    "a\r\nb\r",
    "if x:\n        pass\n",
    "\0",
    "東京 🙂",
    "e\u0301\u2028",
]


@pytest.fixture(scope="module")
def both(tokenizer_directory):
    return [load_tokenizer(tokenizer_directory / name) for name in ("tokenizer.model", "tokenizer.json")]


@pytest.mark.parametrize("text", LAYOUTS)
def test_round_trip_keeps_white_space_and_unknown_characters(both, text):
    for tokenizer in both:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_round_trip_of_any_text(both, text):
    first, second = both
    ids = first.encode(text)
    assert second.encode(text) == ids
    if not any(token in text for token in SPECIAL):
        assert first.decode(ids) == second.decode(ids) == text


def test_round_trip_of_the_standard_library(both):
    for number, text in enumerate(python_source().documents()):
        if number % 40 == 0 and not any(token in text for token in SPECIAL):
            assert both[0].decode(both[0].encode(text)) == text


def test_both_formats_agree_on_sizes_and_special_ids(both):
    first, second = both
    assert (first.vocab_size, first.eod) == (second.vocab_size, second.eod) == (360, 2)
    assert first.sha256 != second.sha256


def test_the_file_that_is_named_counts_and_tokenizer_json_where_none_is(tokenizer_directory):
    for name, taken in [("", "tokenizer.json"), ("tokenizer.json",) * 2, ("tokenizer.model",) * 2]:
        tokenizer = load_tokenizer(tokenizer_directory / name)
        assert tokenizer.path == tokenizer_directory / taken
        assert tokenizer.sha256 == sha256_file(tokenizer_directory / taken)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_copy_is_the_tokenizer_that_was_named(tokenizer_directory, tmp_path, name):
    shutil.copytree(tokenizer_directory, tmp_path / "renamed")
    named = (tmp_path / "renamed" / name).rename(tmp_path / "renamed" / f"own{Path(name).suffix}")
    (tmp_path / "copy").mkdir()
    load_tokenizer(named).copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").path == tmp_path / "copy" / name
    assert load_tokenizer(tmp_path / "copy").sha256 == sha256_file(named)
    companions = {"tokenizer_config.json", "generation_config.json"}
    assert companions < {path.name for path in (tmp_path / "copy").iterdir()}


def test_special_tokens_leave_no_trace_in_text(both):
    for tokenizer in both:
        ids = tokenizer.encode("x = 1")
        assert tokenizer.decode([1, *ids, 2]) == "x = 1"


def test_transformers_reads_the_same_ids(both, tokenizer_directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_directory)
    text = "def f(x):\n\treturn  'é'\n"
    assert theirs(text, add_special_tokens=False)["input_ids"] == both[0].encode(text)
    assert theirs.eos_token_id == both[0].eod


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(ValueError, match="holds neither"):
        load_tokenizer(tmp_path)


def test_not_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_must_name_the_end_of_a_document(tokenizer_directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_directory / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(tmp_path).eod == 2


def test_truncation_stored_in_the_file_does_not_cut_documents(tokenizer_directory, tmp_path):
    stored = json.loads((tokenizer_directory / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert len(load_tokenizer(tmp_path).encode("def function(x): return x")) > 3


def test_a_prompt_starts_as_the_tokenizer_says(both, tokenizer_directory, tmp_path):
    documents = [tokenizer.encode("x = 1") for tokenizer in both]
    assert [tokenizer.encode_prompt("x = 1") for tokenizer in both] == documents
    shutil.copytree(tokenizer_directory, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    for name, document in zip(("tokenizer.model", "tokenizer.json"), documents, strict=True):
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer.encode("x = 1") == document
        assert tokenizer.encode_prompt("x = 1") == [1, *document]


def test_vocabularies_that_cannot_be_trained(texts, tmp_path):
    with pytest.raises(ValueError, match="must be above"):
        train_tokenizer(texts, SMALLEST_VOCABULARY, tmp_path)
    with pytest.raises(ValueError, match="cannot train a vocabulary of 30000"):
        train_tokenizer(texts, 30000, tmp_path)
