"""A model of ours as lm-evaluation-harness sees one.

A text begins with what the tokenizer puts first (``<s>`` of Llama 2) unless it begins so itself. An empty context is
that token too; of a tokenizer that puts nothing first it is its ``bos_token``, or else its end of document, as in the
harness's own adapter of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.data.tokenizer.chat_template import ChatTemplate
from megatron_dmc.data.tokenizer.config import read_tokenizer_config
from megatron_dmc.evaluation.harness.continuations import Continuation, Scorer
from megatron_dmc.evaluation.harness.generation import generate
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.support.progress import progress

MAX_NEW_TOKENS = 256
"""Of a generated answer, where the task does not say."""


class CompressedLM(TemplateLM):
    """Scores by :class:`Scorer`, generates by :class:`Engine`.

    Args:
        scorer: of the model.
        tokenizer: of the model.
        end_tokens: each ends a generated text.
        template: for chats; None: there is none.
    """

    def __init__(
        self, scorer: Scorer, tokenizer: Tokenizer, end_tokens: frozenset[int], template: ChatTemplate | None = None
    ) -> None:
        super().__init__()
        self._scorer, self._tokenizer, self._end_tokens, self._template = scorer, tokenizer, end_tokens, template

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        if self._tokenizer.first:
            return self._tokenizer.first[0]
        named = read_tokenizer_config(self._tokenizer.path.parent).bos_token
        ids = self._tokenizer.encode(named) if named else []
        return ids[0] if len(ids) == 1 else self._tokenizer.eod

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that the model reads."""
        return self._scorer.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """For the harness's own cache of requests."""
        return self._tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, after what the tokenizer puts first unless ``add_special_tokens`` is False."""
        return self._tokenizer.encode(string) if add_special_tokens is False else self._tokenizer.encode_prompt(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Where the template comes from; None: none is used."""
        return str(self._template.path) if chat_template and self._template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation up to where the next answer begins."""
        if self._template is None:
            raise ValueError("no chat template beside the tokenizer: leave out --chat")
        if not add_generation_prompt:
            raise ValueError("a task that begins its answers (gen_prefix) is asked in plain text: leave out --chat")
        return self._template.render(chat_history)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Continuation(context, target) for _, context, target in requests]
        with progress("scoring continuations", len(pairs), "texts") as advance:
            return [(found.log_prob, found.is_greedy) for found in self._scorer.score(pairs, advance)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap where a text is too long."""
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(scored)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> list[tuple[Any, list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts by the engine, each with the settings that its task asks for."""
        asked = [self._request(*request.args) for request in requests]
        generate(self._scorer, self._tokenizer, asked)
        return [request.text for request in asked]

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        until = settings.get("until") or []
        sampling = SamplingParams(
            max_new_tokens=settings.get("max_gen_toks", MAX_NEW_TOKENS),
            temperature=settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0,
            top_p=settings.get("top_p", 1.0),
            end_tokens=self._end_tokens,
            stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
        )
        # As in the harness: of a prompt that is too long its end counts.
        room = max(1, self.max_length - sampling.max_new_tokens)
        return Request(self.tok_encode(context)[-room:], sampling)
