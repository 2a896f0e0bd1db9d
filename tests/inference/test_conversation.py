"""Turns: each answer is that of the whole conversation read anew, and a turn reads only what it adds."""

import pytest

from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.data.tokenizer.chat_template import ChatTemplate, read_chat_template
from megatron_dmc.inference.conversation import Conversation
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.sampling import SamplingParams
from tests.inference.chat_model import TEMPLATE, write_chat_model

SAMPLING = SamplingParams(max_new_tokens=12, temperature=1.0)
SETTINGS = {
    "dense": None,
    "dmc": DMCConfig(decision_bias=-1.0),
    "dms": DMCConfig("dms", decision_bias=0.0, window_size=5),
}
QUESTIONS = ["the quick fox", "again <|im_end|> and again", "na\u00efve \u6771"]


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_chat_model(folder, SETTINGS[request.param])
    return folder


@pytest.fixture
def parts(folder):
    """Engine, tokenizer and template of the model."""
    tokenizer = load_tokenizer(folder)
    engine = Engine(Decoder(open_source(folder)), decode=tokenizer.decode, prefill_tokens=64)
    return engine, tokenizer, read_chat_template(folder)


def answer(engine, conversation, text, sampling=SAMPLING, stop_after=None):
    request = conversation.ask(text, sampling)
    steps = 0
    while engine.is_busy:
        engine.step()
        steps += 1
        if steps == stop_after:
            engine.abort(request)
    conversation.finish(request)
    return request


@pytest.mark.parametrize("system", [None, "be brief"])
def test_answers_are_those_of_the_whole_conversation(parts, system):
    engine, tokenizer, template = parts
    conversation = Conversation(engine, tokenizer, template, system)
    for question in QUESTIONS:
        before = engine.speed.prefill_tokens
        request = answer(engine, conversation, question)
        alone = Engine(engine.model, decode=tokenizer.decode).generate([request.prompt], SAMPLING)[0]
        assert request.output == alone.output
        assert request.text == alone.text
        assert request.usage.entries == alone.usage.entries
        said = template.render(conversation.messages[:-1])
        assert tokenizer.decode(request.prompt) == tokenizer.decode(tokenizer.encode(said))
        assert engine.speed.prefill_tokens - before <= len(tokenizer.encode(question)) + 40
    assert [message["role"] for message in conversation.messages][-2:] == ["user", "assistant"]
    assert len(conversation.messages) == 6 + (system is not None)
    engine.forget(request)
    engine.runner.cache.check_integrity()
    assert engine.runner.cache.blocks.num_in_use == engine.runner.cache.rows.num_in_use == 0


def test_a_turn_reads_what_it_adds(parts):
    engine, tokenizer, template = parts
    conversation = Conversation(engine, tokenizer, template, "x " * 100)
    answer(engine, conversation, "the fox")
    before = engine.speed.prefill_tokens
    second = answer(engine, conversation, "the dog")
    added = tokenizer.encode("<|im_end|>\n<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n")
    # And the last token of the answer, which had not been read.
    assert engine.speed.prefill_tokens - before <= len(added) + 1 < len(second.prompt) / 4


def test_a_template_that_changes_what_was_said_is_read_whole(parts):
    engine, tokenizer, _ = parts
    forgetful = "{% set messages = messages[-1:] %}" + TEMPLATE
    conversation = Conversation(engine, tokenizer, ChatTemplate(forgetful, None, {}))
    for question in QUESTIONS[:2]:
        request = answer(engine, conversation, question)
        expected = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        assert request.prompt == expected
        assert request.output == Engine(engine.model).generate([expected], SAMPLING)[0].output
    assert engine.runner.cache.rows.num_in_use == 1


def test_an_answer_that_was_stopped_goes_on(parts):
    engine, tokenizer, template = parts
    conversation = Conversation(engine, tokenizer, template)
    first = answer(engine, conversation, "the fox", stop_after=4)
    assert first.finish_reason == "aborted"
    assert conversation.messages[-1]["content"] == first.text
    second = answer(engine, conversation, "and on")
    assert second.prompt[: len(first.prompt) + len(first.output)] == first.tokens(0)
    assert second.output == Engine(engine.model).generate([second.prompt], SAMPLING)[0].output


def test_a_question_that_was_stopped_before_its_answer_was_not_asked(parts):
    engine, tokenizer, template = parts
    conversation = Conversation(engine, tokenizer, template)
    answer(engine, conversation, "the fox")
    said = list(conversation.messages)
    answer(engine, conversation, "word " * 60, stop_after=1)
    assert conversation.messages == said
    third = answer(engine, conversation, "the dog")
    assert "word" not in tokenizer.decode(third.prompt)
    assert third.output == Engine(engine.model).generate([third.prompt], SAMPLING)[0].output


def test_a_stop_string_is_no_part_of_the_conversation(parts):
    engine, tokenizer, template = parts
    free = answer(engine, Conversation(engine, tokenizer, template), "the fox")
    stop = free.text.strip()[3:6]
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, stop=(stop,))
    conversation = Conversation(engine, tokenizer, template)
    first = answer(engine, conversation, "the fox", sampling)
    assert first.finish_reason == "stop"
    second = answer(engine, conversation, "and on")
    assert second.prompt == tokenizer.encode(template.render(conversation.messages[:-1]))


def test_a_conversation_longer_than_the_model_reads_is_refused(parts):
    engine, tokenizer, template = parts
    conversation = Conversation(engine, tokenizer, template)
    with pytest.raises(ValueError, match="the conversation has [0-9]+ tokens, the model reads at most 512"):
        conversation.ask("the fox " * 200, SAMPLING)
    assert conversation.messages == []
    assert answer(engine, conversation, "the fox").finish_reason == "length"


def test_an_answer_takes_no_more_than_the_model_can_read(parts):
    engine, tokenizer, template = parts
    conversation = Conversation(engine, tokenizer, template)
    request = answer(engine, conversation, "a", SamplingParams(max_new_tokens=10**6, end_tokens=frozenset()))
    assert len(request.prompt) + len(request.output) == 512
    assert request.finish_reason == "length"


def test_a_conversation_that_outgrows_the_cache_says_so(parts):
    engine, tokenizer, template = parts
    small = Engine(engine.model, decode=tokenizer.decode, block_size=4, num_blocks=60)
    conversation = Conversation(small, tokenizer, template)
    with pytest.raises(ValueError, match="give the cache more blocks"):
        answer(small, conversation, "the fox " * 60)
    assert conversation.messages == []
    assert answer(small, conversation, "a", SamplingParams(max_new_tokens=2)).finish_reason == "length"
