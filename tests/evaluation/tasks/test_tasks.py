"""Generated tasks: prompts of exact length, answers that are in the text where they are said to be."""

import re
from collections import Counter
from random import Random

import pytest

from megatron_dmc.data.sentencepiece_training import train_tokenizer
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.evaluation.long_context import make_examples
from megatron_dmc.evaluation.tasks import TASKS
from megatron_dmc.evaluation.tasks.base import Draft, fit, hide, score
from megatron_dmc.evaluation.tasks.words import ADJECTIVES, NOUNS
from tests.inference.model_directory import TEXT


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT], 300, folder)
    return load_tokenizer(folder)


def text_of(name, depth=0.5, seed=0, num_units=60):
    draft = TASKS[name].draft(Random(seed), depth)
    return draft, draft.text(num_units)


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_exact_and_examples_repeat(name, tokenizer):
    task = TASKS[name]

    def form(text, prefix):
        return tokenizer.encode_prompt(f"{text}\n{prefix}")

    for length in (600, 777):
        examples = make_examples(task, form, length, 3, [0, 1])
        assert [len(example.prompt) for example in examples] == [length - task.max_new_tokens] * 6
        assert [example.depth for example in examples] == [0, 0.5, 1] * 2
        assert examples == make_examples(task, form, length, 3, [0, 1])
        assert len({example.answers for example in examples}) == 6
        for example in examples:
            text = tokenizer.decode(example.prompt)
            assert all(answer in text for answer in example.answers)


def test_words_that_are_counted_as_tokens(tokenizer):
    """A tokenizer of one token a word: the filler takes up the rest."""
    draft = Draft("a b", lambda count: "x y z " * count, "what ?", "", ("x",))
    for length in range(6, 30):
        assert len(fit(draft, lambda text: len(text.split()), length).split()) == length
    with pytest.raises(ValueError, match="the question alone takes 4 tokens, 3 are left for it"):
        fit(draft, lambda text: len(text.split()), 3)
    with pytest.raises(ValueError, match="no text of exactly 11 tokens was found"):
        fit(draft, lambda text: 2 * len(text.split()), 11)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.has_depth])
@pytest.mark.parametrize("depth", [0, 0.25, 1])
def test_the_needle_stands_at_its_depth(name, depth):
    draft, _ = text_of(name, depth)
    lines = draft.haystack(40).split("\n")
    assert len(lines) == 41
    assert draft.answers[0] in lines[round(depth * 40)]
    assert sum(draft.answers[0] in line for line in lines) == 1
    assert draft.answers[0] not in draft.question + draft.answer_prefix + draft.introduction


def test_a_longer_haystack_begins_like_a_shorter_one():
    draft, _ = text_of("niah", 1.0)
    assert draft.haystack(50).split("\n")[:20] == draft.haystack(20).split("\n")[:20]


def test_another_key_is_never_the_one_that_is_asked_for():
    for seed in range(20):
        draft, text = text_of("niah_multikey", seed=seed, num_units=300)
        key = re.search(r"number of (\S+) is", draft.answer_prefix)[1]
        assert len(re.findall(f"number of {key} is", text)) == 1
        assert len(re.findall(r"\d{7}", text)) == 301


def test_the_chain_of_variables_can_be_followed():
    for seed in range(20):
        draft, text = text_of("variable_tracking", seed=seed)
        value = re.search(r"the value (\d+)", draft.question)[1]
        known, order = {value}, []
        for name, right in re.findall(r"VAR (\w+) = (\w+)", text):
            assert right in known, "an assignment stands before what it refers to"
            known.add(name)
            order.append(name)
        assert tuple(order) == draft.answers


@pytest.mark.parametrize("num_units", [0, 30, 1000])
def test_the_frequent_words_are_the_most_frequent(num_units):
    draft, _ = text_of("frequent_words")
    counts = Counter(draft.haystack(num_units).split())
    best = counts.most_common(4)
    assert tuple(word for word, _ in best[:3]) == draft.answers
    assert num_units == 0 or best[2][1] > best[3][1]
    if num_units == 1000:
        assert [count for _, count in best] == pytest.approx([1000 / 1.645 / rank**2 for rank in (1, 2, 3, 4)], abs=5)


def test_needles_go_between_units():
    assert hide("abcd", [(0.0, "1"), (0.5, "2"), (1.0, "3")]) == ["1", "a", "b", "2", "c", "d", "3"]
    assert hide("", [(0.2, "1"), (0.7, "2")]) == ["1", "2"]


def test_scores_are_shares_of_the_answers():
    assert score(["12", "34"], "it is 12 or so") == 0.5
    assert score(["ABC"], "abc.") == 1.0
    assert score(["ABC"], "") == 0.0


def test_words_are_words():
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) > 100
    assert len(set(NOUNS)) == len(NOUNS) > 150
    assert all(word.isalpha() and word.islower() for word in ADJECTIVES + NOUNS)


def test_lengths_and_depths_out_of_range(tokenizer):
    def form(text, prefix):
        return tokenizer.encode_prompt(text + prefix)

    with pytest.raises(ValueError, match="task niah at length 40: the question alone takes"):
        make_examples(TASKS["niah"], form, 40, 2, [0])
    with pytest.raises(ValueError, match="depths=0"):
        make_examples(TASKS["niah"], form, 400, 0, [0])
