"""Perplexity and measured compression by both paths."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.perplexity import Watch, cut_sequences, evaluate
from tests.inference.tiny_model import tiny_model

SETTINGS = DMCConfig(decision_bias=-1.0)
SEQ_LENGTH = 40


def random_sequences(count, vocab_size=50):
    stream = np.random.default_rng(0).integers(0, vocab_size, count * SEQ_LENGTH + 5).astype(np.uint16)
    return cut_sequences(stream, SEQ_LENGTH, None)


def test_sequences_overlap_in_one_token_only():
    token_NT = cut_sequences(np.arange(23, dtype=np.int32), 5, None)
    assert token_NT.tolist() == [list(range(start, start + 6)) for start in (0, 5, 10, 15)]
    assert cut_sequences(np.arange(23), 5, 3).shape == (3, 6)
    assert cut_sequences(np.arange(21), 5, None).shape == (4, 6)
    assert cut_sequences(np.arange(20), 5, None).shape == (3, 6)
    with pytest.raises(ValueError, match="the data has 5 tokens, one sequence needs 6"):
        cut_sequences(np.arange(5), 5, None)
    with pytest.raises(ValueError, match="seq_length=5, sequences=0: must be at least 1"):
        cut_sequences(np.arange(20), 5, 0)


@pytest.mark.parametrize("prefill_length", [0, 1, 17, SEQ_LENGTH])
@pytest.mark.parametrize("window_size", [0, 12])
def test_both_paths_agree(window_size, prefill_length):
    settings = dataclasses.replace(SETTINGS, window_size=window_size)
    progress = []
    evaluation = evaluate(
        tiny_model(settings),
        random_sequences(5),
        batch_size=2,
        prefill_length=prefill_length,
        watch=Watch(progress.append),
    )
    agreement, whole, decode = evaluation.agreement, evaluation.teacher_forced, evaluation.decode
    agreement.require()
    assert agreement.num_tokens_compared == 5 * SEQ_LENGTH == sum(progress)
    assert agreement.num_equal_decisions == agreement.num_decisions == 5 * SEQ_LENGTH * 4
    assert whole.perplexity == pytest.approx(decode.perplexity, abs=1e-3)
    assert whole.compression_ratio == decode.compression_ratio == decode.cache.compression_ratio > 1.5
    assert whole.compression_ratio_per_layer_and_kv_head == decode.compression_ratio_per_layer_and_kv_head
    assert decode.entries_over_tokens[-1] == (SEQ_LENGTH, decode.cache.num_entries / 5)
    assert decode.entries_over_tokens[0][0] == max(prefill_length, 1)
    assert dict(decode.entries_over_tokens).items() <= dict(whole.entries_over_tokens).items()
    assert json.loads(json.dumps(evaluation.to_dict()))["num_tokens"] == 5 * SEQ_LENGTH


def test_loss_is_the_mean_negative_log_probability():
    model, token_NT = tiny_model(SETTINGS), random_sequences(3)
    evaluation = evaluate(model, token_NT, path="teacher-forced", batch_size=2)
    log_probs = model.logits(model.forward(token_NT[:, :-1].T)).log_softmax(-1)
    losses = -log_probs.gather(-1, token_NT[:, 1:].T.unsqueeze(-1)).squeeze(-1)
    assert evaluation.teacher_forced.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert evaluation.teacher_forced.standard_error == pytest.approx((losses.mean(0).std() / 3**0.5).item(), rel=1e-4)
    assert evaluation.decode is None
    assert evaluation.agreement is None


def test_few_logits_at_a_time_change_nothing(monkeypatch):
    model, token_NT = tiny_model(SETTINGS), random_sequences(3)
    expected = evaluate(model, token_NT, path="teacher-forced").teacher_forced.loss
    monkeypatch.setattr("megatron_dmc.evaluation.scores.LOGITS_AT_ONCE", 1)
    assert evaluate(model, token_NT, path="teacher-forced").teacher_forced.loss == pytest.approx(expected, rel=1e-6)


def test_a_plain_llama_has_ratio_one():
    evaluation = evaluate(tiny_model(), random_sequences(2))
    evaluation.agreement.require()
    assert evaluation.teacher_forced.compression_ratio == evaluation.decode.compression_ratio == 1.0
    assert evaluation.decode.cache.bytes_held == evaluation.decode.cache.uncompressed_bytes
    assert evaluation.decode.entries_over_tokens == evaluation.teacher_forced.entries_over_tokens


def test_the_curve_of_entries_has_few_points_and_the_last_one(monkeypatch):
    monkeypatch.setattr("megatron_dmc.evaluation.perplexity.CURVE_POINTS", 7)
    curve = evaluate(tiny_model(SETTINGS), random_sequences(2), path="decode").decode.entries_over_tokens
    assert [tokens for tokens, _ in curve] == [4, 10, 16, 22, 28, 34, 40]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "fast"}, "path='fast': must be one of teacher-forced, decode, both"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"prefill_length": 41}, "prefill_length=41: must be from 0 to the sequence length 40"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model(SETTINGS), random_sequences(1), **options)


def test_data_that_does_not_fit_the_model():
    with pytest.raises(ValueError, match=r"vocabulary is 0\.\.49; give data made with the tokenizer"):
        evaluate(tiny_model(), random_sequences(1, vocab_size=500))
    with pytest.raises(ValueError, match="seq_length=40: the model reads at most 30 tokens"):
        evaluate(tiny_model(max_position_embeddings=30), random_sequences(1))


def test_bfloat16_is_reported_not_asserted():
    model = tiny_model(SETTINGS, dtype="bfloat16")
    evaluation = evaluate(model, random_sequences(4))
    assert evaluation.dtype == "bfloat16"
    assert not evaluation.agreement.asserted
    assert 0.9 < evaluation.agreement.to_dict()["share_of_equal_decisions"] <= 1
    assert evaluation.agreement.mean_log_prob_difference < 0.2
    assert torch.isfinite(torch.tensor(evaluation.decode.loss))
