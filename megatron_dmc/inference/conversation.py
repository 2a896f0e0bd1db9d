"""A conversation of many turns: what was said stays in the cache, and a turn reads what it adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron_dmc.data.tokenizer.base import Tokenizer
from megatron_dmc.data.tokenizer.chat_template import ChatTemplate, Message
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams


class Conversation:
    """Turns of a user and a model, by the template of the model.

    The tokens of an answer stay as the model wrote them. Where the template changes what was said before (it may trim
    it, or leave out an old thought), the whole conversation is read again: no entry can be taken back.

    Args:
        engine: that answers, made with the tokenizer's ``decode``.
        tokenizer: of the model.
        template: of the model.
        system: what the model is told first; None leaves it to the template.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, template: ChatTemplate, system: str | None = None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._template = template
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._asked: list[Message] = []
        self._rendered = ""
        """The text that the last turn gave to the model."""
        self._last: Request | None = None

    def ask(self, text: str, sampling: SamplingParams, on_text: Callable[[str], None] | None = None) -> Request:
        """Give the next turn to the engine; the caller steps it until the request is done, and calls :meth:`finish`.

        An answer takes no more tokens than the model can still read.

        Raises:
            ValueError: the template refuses the turn, or there is no room for an answer; the conversation is as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        rendered = self._template.render(asked)
        tokens = self._tokens(rendered)
        limit = self._engine.model.config.max_position_embeddings
        room = limit - len(tokens)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens, the model reads at most {limit}: begin a new one"
            )
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        request = Request(tokens, sampling, on_text, keep=True, follows=self._last)
        self._engine.submit([request])
        self._asked, self._rendered, self._last = asked, rendered, request
        return request

    def finish(self, request: Request) -> None:
        """Let an answer be a part of the conversation. One that failed, or was stopped before it began, is none.

        Raises:
            ValueError: it failed.
        """
        if request.error:
            raise ValueError(request.error)
        if request.output or request.finish_reason != "aborted":
            self.messages = [*self._asked, {"role": "assistant", "content": request.text}]

    def _tokens(self, rendered: str) -> list[int]:
        """The conversation as ids: those that the cache holds as they are, where they stand for the same text."""
        tokens, last = self._tokenizer.encode(rendered), self._last
        if last is None:
            return tokens
        said = last.tokens(0)
        if tokens[: len(said)] == said or last.finish_reason == "stop":
            return tokens
        text = self._rendered + last.text
        return said + self._tokenizer.encode(rendered[len(text) :]) if rendered.startswith(text) else tokens
