"""A model beside a reference, compared with the definitions written over whole logits in float64."""

import json

import numpy as np
import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.against_reference import buckets
from megatron_dmc.evaluation.estimate import Estimate
from megatron_dmc.evaluation.perplexity import DECODE, check, cut_sequences, evaluate
from megatron_dmc.methods import Dense, method_of, policy
from tests.inference.tiny_model import tiny_model

SETTINGS = DMCConfig(decision_bias=-1.0)
SEQ_LENGTH, COUNT = 60, 5


def sequences(vocab_size=50):
    stream = np.random.default_rng(0).integers(0, vocab_size, COUNT * SEQ_LENGTH + 1).astype(np.uint16)
    return cut_sequences(stream, SEQ_LENGTH, None)


def uncompressed(model):
    return model.with_method(Dense(method_of(model.settings).neuron_scale))


def expected(model, reference, token_NT):
    """KL [S, N], agreement of the most likely tokens [S, N], and both losses [S, N]."""
    token_TN = token_NT.T
    log_q, log_p = (one.logits(one.forward(token_TN[:-1])).double().log_softmax(-1) for one in (model, reference))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    target = token_TN[1:].unsqueeze(-1)
    losses = [-x.gather(-1, target).squeeze(-1) for x in (log_q, log_p)]
    return kl, (log_q.argmax(-1) == log_p.argmax(-1)).double(), *losses


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr("megatron_dmc.evaluation.against_reference.FIRST_BUCKET", 16)


@pytest.mark.parametrize("at_once", [1 << 24, 1])
def test_both_paths_against_the_definitions(small_buckets, monkeypatch, at_once):
    monkeypatch.setattr("megatron_dmc.evaluation.scores.LOGITS_AT_ONCE", at_once)
    model, token_NT = tiny_model(SETTINGS), sequences()
    reference = tiny_model(seed=1)
    kl, same, loss, reference_loss = expected(model, reference, token_NT)
    evaluation = evaluate(model, token_NT, batch_size=2, reference=reference)
    for path in (evaluation.teacher_forced, evaluation.decode):
        overall, spans = path.against_reference
        assert [(span.start, span.end) for span in spans] == [(0, 16), (16, 32), (32, 60)]
        for span in (overall, *spans):
            here = slice(span.start, span.end)
            for found, values in (
                (span.kl, kl),
                (span.same_top, same),
                (span.loss, loss),
                (span.reference_loss, reference_loss),
                (span.excess_loss, loss - reference_loss),
            ):
                means_N = values[here].mean(dim=0)
                assert found.mean == pytest.approx(means_N.mean().item(), rel=1e-4)
                assert found.standard_error == pytest.approx(means_N.std().item() / COUNT**0.5, rel=1e-3)
            assert span.max_kl == pytest.approx(kl[here].max().item(), rel=1e-4)
    assert overall.kl.mean > 0.1
    assert evaluation.decode.perplexity == pytest.approx(overall.to_dict()["perplexity"], rel=1e-5)
    json.dumps(evaluation.to_dict())


def test_the_same_weights_without_compression():
    model = tiny_model(SETTINGS)
    found = evaluate(model, sequences(), path="teacher-forced", reference=uncompressed(model)).teacher_forced
    assert found.compression_ratio > 1.5
    assert found.against_reference.overall.kl.mean > 1e-3
    plain = evaluate(uncompressed(model), sequences(), path="teacher-forced")
    assert found.against_reference.overall.reference_loss.mean == pytest.approx(plain.teacher_forced.loss, rel=1e-6)
    assert model.method.compresses, "the reference has a method of its own"


def test_a_model_beside_itself():
    model = tiny_model()
    overall = evaluate(model, sequences(), path=DECODE, reference=model).decode.against_reference.overall
    assert overall.kl.mean == pytest.approx(0, abs=1e-6)
    assert overall.max_kl == pytest.approx(0, abs=1e-5)
    assert overall.same_top == Estimate(1.0, 0.0)


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_a_policy_holds_its_budget_at_every_position(name):
    model = tiny_model()
    found = evaluate(model.with_method(policy(name, 20)), sequences(), path=DECODE, reference=model).decode
    held = [min(position + 1, 21) for position in range(SEQ_LENGTH)]
    assert found.mean_resident_entries == pytest.approx(sum(held) / SEQ_LENGTH)
    assert found.mean_resident_ratio == pytest.approx((SEQ_LENGTH + 1) / 2 / (sum(held) / SEQ_LENGTH))
    assert found.against_reference.overall.kl.mean > 1e-3


def test_mean_resident_entries_and_bytes():
    dense = evaluate(tiny_model(), sequences())
    assert dense.teacher_forced.mean_resident_entries == (SEQ_LENGTH + 1) / 2 == dense.decode.mean_resident_entries
    assert dense.decode.mean_resident_ratio == 1
    assert dense.teacher_forced.mean_resident_bytes is None
    usage = dense.decode.cache
    blocks = sum(-(-length // 32) for length in range(1, SEQ_LENGTH + 1)) / SEQ_LENGTH
    assert dense.decode.mean_resident_bytes == blocks * usage.num_heads * usage.block_bytes
    compressed = evaluate(tiny_model(SETTINGS), sequences())
    curve = [entries for _, entries in compressed.teacher_forced.entries_over_tokens]
    mean = sum(curve) / len(curve) / 4
    assert compressed.teacher_forced.mean_resident_entries == pytest.approx(mean)
    assert compressed.decode.mean_resident_entries == pytest.approx(mean)


def test_positions_that_a_prefill_hides_do_not_count():
    decode = evaluate(tiny_model(), sequences(), path=DECODE, prefill_length=40).decode
    assert decode.mean_resident_entries == sum(range(40, SEQ_LENGTH + 1)) / 21
    assert decode.mean_resident_ratio == 1


def test_buckets_double_and_cover():
    assert buckets(100) == [(0, 100)]
    assert buckets(129) == [(0, 128), (128, 129)]
    assert buckets(1024) == [(0, 128), (128, 256), (256, 512), (512, 1024)]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"vocab_size": 60}, "the reference has a vocabulary of 60 tokens, the model one of 50"),
        ({"max_position_embeddings": 30}, "the reference reads at most 30 tokens"),
    ],
)
def test_a_reference_that_does_not_fit(reference, message):
    with pytest.raises(ValueError, match=message):
        check(tiny_model(), sequences(), "both", 2, 0, reference=tiny_model(**reference))


def test_a_policy_is_no_reference():
    with pytest.raises(ValueError, match="the reference is kept by h2o"):
        check(tiny_model(), sequences(), "both", 2, 0, reference=tiny_model().with_method(policy("h2o", 4)))
