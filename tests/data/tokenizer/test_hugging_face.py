"""tokenizer.json with what the files beside it add and say."""

import json

import pytest

from megatron_dmc.data.tokenizer import load_tokenizer
from tests.data.tokenizer.directories import added, auto_tokenizer, byte_level_directory, write


@pytest.fixture
def folder(tmp_path):
    byte_level_directory(tmp_path)
    return tmp_path


def config(folder, **changes):
    path = folder / "tokenizer_config.json"
    write(path, json.loads(path.read_text()) | changes)


def test_tokens_that_only_the_config_has_are_added(folder):
    size = load_tokenizer(folder).vocab_size
    plain = load_tokenizer(folder).sha256
    config(folder, added_tokens_decoder={str(size): added("<|tool|>"), str(size + 1): added("<|call|>", special=False)})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|tool|>") == [size]
    assert tokenizer.decode(tokenizer.encode("a<|tool|><|call|>b")) == "a<|call|>b"
    assert tokenizer.encode("a<|call|>") == auto_tokenizer(folder)("a<|call|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.sha256 != plain


@pytest.mark.parametrize("says", [True, False])
def test_its_own_template_says_what_a_prompt_begins_with(folder, says):
    config(folder, add_bos_token=says)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.first == tokenizer.encode("<|begin_of_text|>")
    assert tokenizer.encode_prompt("the fox") == auto_tokenizer(folder)("the fox")["input_ids"]


def test_a_prompt_that_begins_with_the_first_token_gets_no_second_one(folder):
    tokenizer = load_tokenizer(folder)
    begun = tokenizer.encode_prompt("<|begin_of_text|>hi")
    assert begun == tokenizer.encode_prompt("hi")
    assert begun.count(tokenizer.first[0]) == 1


def test_a_prompt_does_not_end_with_the_end_of_a_text(folder):
    stored = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}}
    stored["post_processor"]["single"].append(end)
    eod = load_tokenizer(folder).eod
    stored["post_processor"]["special_tokens"]["<|end_of_text|>"] = {
        "id": "<|end_of_text|>",
        "ids": [eod],
        "tokens": ["<|end_of_text|>"],
    }
    write(folder / "tokenizer.json", stored)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_prompt("hi") == [*tokenizer.first, *tokenizer.encode("hi")]


def test_ids_that_nobody_has_leave_no_trace(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([*tokenizer.encode("hi"), tokenizer.vocab_size + 3]) == "hi"
    assert tokenizer.token(tokenizer.vocab_size) is None


def test_an_id_that_is_taken_is_refused(folder):
    config(folder, added_tokens_decoder={"7": added("<|tool|>")})
    with pytest.raises(ValueError, match=r"states the id 7 for '<\|tool\|>'.*take the files of one model"):
        load_tokenizer(folder)
