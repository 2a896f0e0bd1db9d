"""Likelihoods of continuations, against whole forward passes and against transformers."""

import pytest
import torch

from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.harness import continuations
from megatron_dmc.evaluation.harness.continuations import Continuation, Scorer
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.methods import policy
from tests.inference.model_directory import VOCAB_SIZE, write_model
from tests.inference.tiny_model import tiny_model

SETTINGS = DMCConfig(decision_bias=-1.0)


def pairs(vocab_size=50):
    generator = torch.Generator().manual_seed(0)
    return [
        Continuation(*(torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths))
        for lengths in ((5, 3), (20, 1), (1, 12), (40, 7), (8, 8))
    ]


def by_whole_pass(model, pair):
    """(log-probability, whether greedy) from one forward pass without a cache."""
    tokens = torch.tensor([*pair.context, *pair.target]).unsqueeze(-1)
    logits = model.logits(model.forward(tokens[:-1]))[len(pair.context) - 1 :, 0]
    target = torch.tensor(pair.target)
    log_prob = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).sum().item()
    return log_prob, bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("path", ["teacher-forced", "decode"])
@pytest.mark.parametrize("settings", [None, SETTINGS])
def test_both_paths_against_a_whole_pass(path, settings, monkeypatch):
    monkeypatch.setattr(continuations, "LOGITS_AT_ONCE", 100)
    model = tiny_model(settings)
    counted = []
    scorer = Scorer(model, path, batch_size=2)
    found = scorer.score(pairs(), counted.append)
    for likelihood, pair in zip(found, pairs(), strict=True):
        assert likelihood.log_prob == pytest.approx(by_whole_pass(model, pair)[0], abs=1e-3)
        assert likelihood.is_greedy == by_whole_pass(model, pair)[1]
    assert sum(counted) == 5
    assert sum(usage.num_sequences for usage in scorer.usages) == 5


@pytest.mark.parametrize("path", ["teacher-forced", "decode"])
def test_a_greedy_continuation_is_said_to_be_greedy(path):
    model = tiny_model()
    context = list(range(10))
    target: list[int] = []
    for _ in range(5):
        hidden = model.forward(torch.tensor([*context, *target]).unsqueeze(-1))
        target.append(int(model.logits(hidden[-1]).argmax()))
    other = [*target[:-1], (target[-1] + 1) % 50]
    scorer = Scorer(model, path)
    assert [one.is_greedy for one in scorer.score([Continuation(context, target), Continuation(context, other)])] == [
        True,
        False,
    ]


@pytest.mark.slow
def test_against_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference is transformers' own Llama")
    write_model(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = Scorer(Decoder(open_source(tmp_path / "model"))).score(pairs(VOCAB_SIZE))
    for likelihood, pair in zip(ours, pairs(VOCAB_SIZE), strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([pair.inputs])).logits[0, len(pair.context) - 1 :]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(pair.target).unsqueeze(-1)).sum().item()
        assert likelihood.log_prob == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_a_policy_scores_by_decoding(name):
    """A prompt is read densely: what the policy does to it is seen by the tokens that are decoded."""
    dense = tiny_model()
    evicting = Scorer(dense.with_method(policy(name, 4)))
    assert evicting.path == "decode"
    pair = [Continuation(list(range(30)), [3, 1, 4, 1, 5])]
    first = [Continuation(list(range(30)), [3])]
    assert evicting.score(first)[0].log_prob == pytest.approx(Scorer(dense).score(first)[0].log_prob, abs=1e-4)
    assert abs(evicting.score(pair)[0].log_prob - Scorer(dense).score(pair)[0].log_prob) > 1e-2
    with pytest.raises(ValueError, match=f"{name} decides token by token"):
        Scorer(dense.with_method(policy(name, 4)), "teacher-forced")


def test_the_beginning_of_a_long_text_is_left_out():
    model = tiny_model(max_position_embeddings=20)
    pair = Continuation([n % 50 for n in range(100)], [7, 8, 9])
    scorer = Scorer(model)
    (found,) = scorer.score([pair])
    assert found.log_prob == pytest.approx(
        by_whole_pass(model, Continuation(pair.context[-18:], pair.target))[0], abs=1e-3
    )
    assert scorer.num_truncated == 1
    with pytest.raises(ValueError, match="a continuation of 30 tokens is longer than the model reads"):
        scorer.score([Continuation([1], [2] * 30)])


def test_batches_are_bounded_in_texts_and_tokens(monkeypatch):
    monkeypatch.setattr(continuations, "TOKENS_AT_ONCE", 30)
    found = list(continuations._batches([Continuation([0] * n, [0]) for n in (3, 25, 4, 40, 5)], 2))
    assert found == [[3], [1, 4], [2, 0]]


def test_a_path_that_there_is_not():
    with pytest.raises(ValueError, match="continuations are scored by teacher-forced or decode"):
        Scorer(tiny_model(), "both")
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        Scorer(tiny_model(), batch_size=0)
