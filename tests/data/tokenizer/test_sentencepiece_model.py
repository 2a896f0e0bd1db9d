"""Tokens that were added to a sentencepiece model stay whole."""

import json

import pytest

from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.support.files import sha256_file
from tests.data.tokenizer.directories import CHAT_TOKENS, added, sentencepiece_directory, write


@pytest.fixture
def folder(tmp_path):
    sentencepiece_directory(tmp_path)
    return tmp_path


def config(folder, **changes):
    path = folder / "tokenizer_config.json"
    write(path, json.loads(path.read_text()) | changes)


def test_added_tokens_json_alone_is_enough(folder):
    first = load_tokenizer(folder).vocab_size - len(CHAT_TOKENS)
    config(folder, added_tokens_decoder={})
    write(folder / "added_tokens.json", {token: first + place for place, token in enumerate(CHAT_TOKENS)})
    tokenizer = load_tokenizer(folder)
    start, *_, end = tokenizer.encode("<|im_start|>the<|im_end|>")
    assert (start, end) == (first + 1, first)
    # Named as eos_token, the one is special; nothing says that of the other.
    assert tokenizer.decode([first + 1, first]) == "<|im_start|>"
    assert tokenizer.eod == first


def test_text_around_a_token_that_is_shown_keeps_its_spaces(folder):
    stated = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    last = max(stated, key=int)
    config(folder, added_tokens_decoder=stated | {last: added("<|im_start|>", special=False)})
    tokenizer = load_tokenizer(folder)
    for text in ("the <|im_start|> fox", "<|im_start|> the", "the<|im_start|>fox"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_takes_the_white_space_that_it_says(folder):
    stated = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    last = max(stated, key=int)
    config(folder, added_tokens_decoder=stated | {last: added("<|im_start|>", lstrip=True, rstrip=True)})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("the \n<|im_start|>  fox") == tokenizer.encode("the<|im_start|>fox")


def test_ids_that_nobody_has_leave_no_trace(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode([tokenizer.vocab_size + 7, *ids, tokenizer.eod, -1]) == "the fox"
    assert tokenizer.token(tokenizer.vocab_size) is None
    assert tokenizer.token(tokenizer.eod) == "<|im_end|>"


def test_without_json_files_it_is_sentencepiece_alone(folder):
    for path in folder.glob("*.json"):
        path.unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("<s>the</s>")) == "<s>the</s>"
    assert (tokenizer.first, tokenizer.eod) == ([], 2)


def test_the_hash_tells_added_tokens_apart(folder):
    with_tokens = load_tokenizer(folder).sha256
    config(folder, added_tokens_decoder={})
    assert load_tokenizer(folder).sha256 == sha256_file(folder / "tokenizer.model") != with_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens_decoder": {"x": added("<a>")}}, "an id and a token are needed"),
        ({"added_tokens_decoder": {"400": {"special": True}}}, "an id and a token are needed"),
    ],
)
def test_a_config_that_cannot_be_read(folder, changes, message):
    config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("number", ["7", -1, True])
def test_an_added_token_needs_an_id(folder, number):
    write(folder / "added_tokens.json", {"<new>": number})
    with pytest.raises(ValueError, match="added token '<new>' has the id"):
        load_tokenizer(folder)
