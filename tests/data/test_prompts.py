"""A prompt is a line, and a line ends at a line feed alone."""

import json

import pytest

from megatron_dmc.data.prompts import check_text, read_prompts

SEPARATORS = ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\r"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_separators_inside_a_prompt_are_text(tmp_path, separator):
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"the quick{separator}brown fox\nthe lazy dog\n".encode())
    assert read_prompts(path) == [f"the quick{separator}brown fox", "the lazy dog"]


def test_windows_files_are_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two \r\n")
    assert read_prompts(path) == ["one", "  two "]


def test_json_lines_hold_prompts_of_several_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "one\ntwo"}) + "\n" + json.dumps({"prompt": "three"}))
    assert read_prompts(path) == ["one\ntwo", "three"]
    path.write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 1 has no text under 'prompt': write one object"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"caf\xe9\n", "is not UTF-8 text: .*save it as UTF-8"), (b"\n \n", "holds no prompt"), (None, "is missing")],
)
def test_files_that_hold_no_prompts(tmp_path, data, message):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=f"prompts.txt {message}"):
        read_prompts(path)


def test_bytes_of_the_command_line_that_are_no_text():
    check_text("café 🙂", "--prompt")
    with pytest.raises(ValueError, match=r"--prompt is not UTF-8 text \(character 4\)"):
        check_text(b"caf\xe9".decode("utf-8", "surrogateescape"), "--prompt")
