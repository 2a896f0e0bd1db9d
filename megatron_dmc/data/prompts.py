"""Files of prompts: one per line."""

from __future__ import annotations

from pathlib import Path

from megatron_dmc.data.json_lines import is_json_lines, read_json_lines

PROMPT_KEY = "prompt"


def read_prompts(path: Path) -> list[str]:
    r"""The prompts in a file, without empty lines.

    Only ``\n`` (or ``\r\n``) ends a line: other separators, like U+2028, are text. JSON lines (by the file's name) hold
    each prompt under ``prompt``, which may then have several lines.

    Raises:
        ValueError: no file, not UTF-8, a line of JSON without prompt, or no prompt at all.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: give a file with one prompt per line, or --prompt")
    if is_json_lines(path):
        prompts = list(read_json_lines(path, PROMPT_KEY, remedy='write one object {"prompt": ...} per line'))
    else:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}: save it as UTF-8") from error
        prompts = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: give at least one line of text")
    return prompts


def check_text(text: str, what: str) -> None:
    """Refuse bytes of the command line that are no UTF-8, which Python passes on as lone surrogates.

    Raises:
        ValueError: there is one; the message names ``what``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text (character {error.start + 1}): give it in UTF-8") from error
