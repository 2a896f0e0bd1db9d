"""Text piece by piece: it ends before a stop string wherever tokens end, and nothing is given out early."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.inference.text_stream import TextStream


def decode(ids):
    """One token is one byte."""
    return bytes(ids).decode(errors="replace")


def words(ids):
    """One token is one of these strings."""
    return "".join(("ab", "a", "bc", "abc", "c\n", "\n", "d")[number] for number in ids)


def pieces(stream, ids):
    given_out = []
    for number in ids:
        given_out.append(stream.add(number))
        if stream.stopped:
            break
    return [*given_out, stream.finish()]


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(decode, b"q", ["STOP", "\n\n"])
    assert pieces(stream, b"a\nST\n\nOP") == ["a", "", "\n", "", "ST", "", ""]
    assert stream.stopped
    assert stream.add(ord("x")) == ""


def test_what_did_not_become_one_is_given_out_at_the_end():
    stream = TextStream(decode, b"", ["STOP"])
    assert pieces(stream, b"aSTO") == ["a", "", "", "", "STO"]
    assert not stream.stopped


def test_a_stop_string_in_the_middle_of_a_token():
    assert pieces(TextStream(words, [1], ["b"]), [3, 6]) == ["a", ""]


def test_a_prompt_that_ends_like_a_stop_string_does_not_stop():
    assert "".join(pieces(TextStream(decode, b"\n", ["\n\n"]), b"\nx\n")) == "\nx\n"


def test_half_a_character_at_the_end_is_replaced():
    assert "".join(pieces(TextStream(decode, b"", ["?"]), "a\u6771".encode()[:-1])) == "a\ufffd"


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 6), max_size=12), stop=st.lists(st.text("abc\n", min_size=1), max_size=3))
def test_the_text_ends_with_the_token_that_completes_a_stop_string(ids, stop):
    """1. The whole text after every token, searched; 2. the stream."""
    expected = words(ids)
    for count in range(1, len(ids) + 1):
        found = [place for one in stop if (place := words(ids[:count]).find(one)) >= 0]
        if found:
            expected = expected[: min(found)]
            break
    given_out = pieces(TextStream(words, [], stop), ids)
    assert "".join(given_out) == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=8), stop=st.text(min_size=1, max_size=2))
def test_pieces_are_whole_characters(text, stop):
    given_out = pieces(TextStream(decode, b"", [stop]), text.encode())
    assert "".join(given_out) == text.split(stop)[0]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in given_out)


@pytest.mark.parametrize("cut", range(1, 6))
def test_every_cut_of_a_text_into_tokens_gives_the_same(cut):
    text = "ab\u6771STOPde"
    data = text.encode()
    tokens = [data[start : start + cut] for start in range(0, len(data), cut)]
    stream = TextStream(lambda ids: b"".join(tokens[number] for number in ids).decode(errors="replace"), [], ["STOP"])
    assert "".join(pieces(stream, range(len(tokens)))) == "ab\u6771"
