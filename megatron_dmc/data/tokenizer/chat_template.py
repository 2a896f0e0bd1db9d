"""How a model was taught to see a conversation: the template beside its tokenizer.

A template is a program in Jinja, and may come from a stranger: it runs in Jinja's sandbox, over texts alone, and is
given what transformers gives it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.data.tokenizer.config import CONFIG_FILE, read_tokenizer_config
from megatron_dmc.support.files import read_bounded, read_json

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_FILE = "chat_template.jinja"
BYTES_LIMIT = 1 << 20
"""Far above every known template (Llama 3.1: 4 KB)."""

Message = Mapping[str, str]
"""``role`` (system, user, assistant) and ``content``."""


class ChatTemplate:
    """Makes one text of a conversation.

    Args:
        source: the program.
        path: where it stands, for messages.
        named: texts of special tokens that it may use, by name (``bos_token``).

    Raises:
        ValueError: it is no template.
    """

    def __init__(self, source: str, path: Path, named: Mapping[str, str]) -> None:
        import jinja2

        self.path = path
        self._named = dict(named)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{path} holds no chat template that can be read: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the next answer begins.

        Raises:
            ValueError: the template refuses it, or fails.
        """
        given: dict[str, Any] = {**self._named, "messages": [dict(message) for message in messages]}
        try:
            return self._template.render(**given, tools=None, documents=None, add_generation_prompt=True)
        except Exception as error:  # whatever a program may raise
            raise ValueError(f"the chat template of {self.path} does not take this conversation: {error}") from error


def read_chat_template(*folders: Path) -> ChatTemplate:
    """The template of the first folder that has one: in ``chat_template.jinja``, or in ``tokenizer_config.json``.

    Raises:
        ValueError: none has one, or it cannot be read.
    """
    for folder in folders:
        path = folder / TEMPLATE_FILE
        if path.is_file():
            return template_file(path)
        if (folder / CONFIG_FILE).is_file():
            source = _default(read_json(folder / CONFIG_FILE).get("chat_template"))
            if source is not None:
                return ChatTemplate(source, folder / CONFIG_FILE, read_tokenizer_config(folder).named)
    looked_at = " or ".join(map(str, dict.fromkeys(folders)))
    raise ValueError(
        f"no chat template in {looked_at}: a base model was not taught to converse; continue a text with megatron-dmc "
        "generate, or give a template with --chat-template"
    )


def template_file(path: Path, folder: Path | None = None) -> ChatTemplate:
    """The template in a file, with the special tokens of ``folder`` (by default its own).

    Raises:
        ValueError: no file, not UTF-8, or no template.
    """
    try:
        source = read_bounded(path, BYTES_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    return ChatTemplate(source, path, read_tokenizer_config(folder or path.parent).named)


def _default(stated: Any) -> str | None:
    """A template, or the one named ``default`` among several."""
    if isinstance(stated, list):
        named = {one.get("name"): one.get("template") for one in stated if isinstance(one, dict)}
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates for transformers expect to run in."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant said, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 -- as the base class has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PublicNamespace(Namespace):
        """Takes no name that begins with an underscore: those are Python's own."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace takes no {name!r}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PublicNamespace,
    }
    return environment
