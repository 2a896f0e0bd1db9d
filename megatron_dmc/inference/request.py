"""A text that is being continued: what was asked, how far it is, and why it ended."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.logprobs import TokenLogprob
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.inference.text_stream import TextStream
from megatron_dmc.models.config import ModelConfig

FinishReason = Literal["eod", "stop", "length", "aborted", "error"]


@dataclass(eq=False)
class Request:
    """One prompt and its continuation.

    Args:
        prompt: token ids, at least one.
        sampling: how to continue it.
        on_text: called with every piece of text that became final; what it raises ends this request alone. Needs an
            engine with a tokenizer.
        keep: at its end its memory stays, for a request that follows it.
        follows: a kept request that this prompt may extend; its memory becomes this one's, and only what the prompt
            adds is read. A prompt that changes what the cache holds is read whole.
        source: a request with the same prompt, submitted before: where possible, the memory of its prompt is shared.
    """

    prompt: list[int]
    sampling: SamplingParams
    on_text: Callable[[str], None] | None = None
    keep: bool = False
    follows: Request | None = None
    source: Request | None = None
    output: list[int] = field(default_factory=list)
    """Tokens so far, without an end token; those of a stop string belong to it."""
    text: str = ""
    """Text of ``output`` so far, as far as it is final; empty without a tokenizer."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens in ``output``, where the sampling asks for them."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens of the prompt but the first, where the sampling asks for them."""
    finish_reason: FinishReason | None = None
    """None while the request waits or runs."""
    error: str = ""
    """What went wrong where ``finish_reason`` is ``error``."""
    usage: CacheUsage | None = None
    """What the cache held for it at its end."""
    row: int | None = None
    """Row of the cache while it runs, or is kept, or waits with the memory of what it follows."""
    num_read: int = 0
    """Tokens of prompt and output that the cache holds."""
    stream: TextStream | None = None
    """Makes the text; from the engine, where it has a tokenizer."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.sampling.seed)

    def samples(self, count: int) -> list[Request]:
        """``count`` requests for this prompt, itself the first, with the seeds that follow its own.

        Raises:
            ValueError: fewer than one.
        """
        if count < 1:
            raise ValueError(f"n={count}: must be at least 1 sample of a prompt")
        seeds = range(self.sampling.seed + 1, self.sampling.seed + count)
        samplings = [dataclasses.replace(self.sampling, seed=seed) for seed in seeds]
        return [self, *(Request(self.prompt, sampling, source=self) for sampling in samplings)]

    def tokens(self, start: int, end: int | None = None) -> list[int]:
        """Prompt and output from one place to another."""
        length = len(self.prompt)
        end = length + len(self.output) if end is None else end
        return self.prompt[start:end] + self.output[max(0, start - length) : max(0, end - length)]

    @property
    def unread(self) -> list[int]:
        """Tokens that the model reads next: the prompt or the rest of it, later the newest token."""
        return self.tokens(self.num_read)

    @property
    def num_unread(self) -> int:
        """How many they are."""
        return len(self.prompt) + len(self.output) - self.num_read

    @property
    def progress(self) -> int:
        """Tokens that need no more work, of ``max_new_tokens``."""
        return self.sampling.max_new_tokens if self.finish_reason else len(self.output)

    def extends(self, other: Request) -> bool:
        """Whether the prompt adds to what the cache holds of another request."""
        held = other.num_read
        return 0 < held < len(self.prompt) and self.prompt[:held] == other.tokens(0, held)

    def draw(self) -> float:
        """The request's next random number, in [0, 1)."""
        return self._random.random()

    def receive(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Take the next token, which may be the last, and pass on the text that it completes."""
        piece = ""
        if token in self.sampling.end_tokens:
            self.finish_reason = "eod"
        else:
            self.output.append(token)
            if logprob is not None:
                self.logprobs.append(logprob)
            piece = self.stream.add(token) if self.stream else ""
            if self.stream and self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.output) == self.sampling.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason and self.stream:
            piece += self.stream.finish()
        self.text += piece
        if piece and self.on_text is not None:
            self.on_text(piece)

    def end(self, reason: FinishReason) -> None:
        """End for a reason; text that was held back is text now."""
        self.finish_reason = reason
        if self.stream:
            self.text += self.stream.finish()

    def fail(self, error: str) -> None:
        """End without a result."""
        self.finish_reason, self.error = "error", error


def check_request(index: int, request: Request, config: ModelConfig) -> None:
    """Refuse what a model cannot read; messages name the request by its ``index``.

    Raises:
        ValueError: an empty prompt, one that leaves no room for the text, or a token outside the vocabulary.
    """
    length = len(request.prompt)
    if not length:
        raise ValueError(f"prompt {index} is empty: give at least one token")
    if not 0 <= min(request.prompt) <= max(request.prompt) < config.vocab_size:
        outside = next(token for token in request.prompt if not 0 <= token < config.vocab_size)
        raise ValueError(
            f"prompt {index} holds token {outside}: the model's vocabulary is 0..{config.vocab_size - 1}; "
            "give the tokenizer that the model was trained with"
        )
    limit = config.max_position_embeddings
    if length + request.sampling.max_new_tokens > limit:
        raise ValueError(
            f"prompt {index} has {length} tokens and may grow by {request.sampling.max_new_tokens}: the model "
            f"reads at most {limit}; shorten the prompt or lower max_new_tokens"
        )
