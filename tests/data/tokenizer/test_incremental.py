"""Text given out piece by piece is the text of the whole, without the prompt, and never half a character."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.data.tokenizer.incremental import MAX_HELD_TOKENS, IncrementalDecoder, continuation
from tests.data.tokenizer.directories import auto_tokenizer, byte_level_directory, sentencepiece_directory

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\u2581\ufffd"), max_size=30)


@pytest.fixture(scope="module", params=["sentencepiece", "json", "bytes"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        byte_level_directory(folder)
    else:
        sentencepiece_directory(folder)
        if request.param == "json":
            auto_tokenizer(folder).save_pretrained(folder)
    return load_tokenizer(folder)


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, text=TEXT, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_pieces_join_to_the_text_of_the_whole(tokenizer, prompt, text, cuts):
    before, ids = tokenizer.encode_prompt(prompt), tokenizer.encode(text)
    decoder = IncrementalDecoder(tokenizer.decode, before)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [decoder.add(ids[start:end]) for start, end in itertools.pairwise(borders)]
    assert not any("\ufffd" in piece for piece in pieces)
    whole = tokenizer.decode(before + ids)
    assert tokenizer.decode(before) + "".join(pieces) + decoder.finish() == whole


def test_the_space_before_a_word_is_not_lost(tokenizer):
    ids = tokenizer.encode("over the the")[-1:]
    assert continuation(tokenizer.decode, tokenizer.encode_prompt("over"), ids * 3) == " the the the"


def test_special_tokens_in_between_lose_nothing(tokenizer):
    the = tokenizer.encode("over the")[-1]
    ids = [the, tokenizer.eod, tokenizer.eod, the, tokenizer.eod, the]
    assert continuation(tokenizer.decode, tokenizer.encode_prompt("over"), ids) == " the the the"


def test_a_character_comes_when_its_last_byte_does(tokenizer):
    ids = tokenizer.encode("a\U0001f642")[-4:]
    decoder = IncrementalDecoder(tokenizer.decode, tokenizer.encode("a"))
    assert [decoder.add([number]) for number in ids] == ["", "", "", "\U0001f642"]


def test_bytes_that_are_no_character_are_replaced_and_hold_nothing_back(tokenizer):
    half, a = tokenizer.encode("a\u6771")[-2], tokenizer.encode("aa")[-1:]
    decoder = IncrementalDecoder(tokenizer.decode, tokenizer.encode("a"))
    assert decoder.add([half]) == ""
    assert decoder.finish() == "\ufffd"
    assert set(decoder.add([half] * MAX_HELD_TOKENS)) == {"\ufffd"}
    assert decoder.add(a) + decoder.finish() in ("a", " a", "aa")
