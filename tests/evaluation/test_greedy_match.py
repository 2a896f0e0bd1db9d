"""Greedy texts of two models, compared with texts that are made by whole forward passes."""

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.greedy_match import greedy_match
from tests.inference.tiny_model import tiny_model

NUM_NEW = 12


def prompts():
    return torch.randint(0, 50, (5, 20), generator=torch.Generator().manual_seed(0)).tolist()


def greedy(model, prompt):
    tokens = list(prompt)
    for _ in range(NUM_NEW):
        logits = model.logits(model.forward(torch.tensor(tokens).unsqueeze(-1))[-1])
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def test_against_whole_forward_passes():
    model, reference = tiny_model(DMCConfig(decision_bias=-1.0)), tiny_model()
    counted = []
    found = greedy_match(model, reference, prompts(), NUM_NEW, batch_size=3, advance=counted.append)
    pairs = [(greedy(model, prompt), greedy(reference, prompt)) for prompt in prompts()]
    equal = [[a == b for a, b in zip(*pair, strict=True)] for pair in pairs]
    prefixes = [places.index(False) if False in places else NUM_NEW for places in equal]
    assert found.equal_tokens.mean == pytest.approx(sum(map(sum, equal)) / 5 / NUM_NEW)
    assert found.common_prefix.mean == pytest.approx(sum(prefixes) / 5 / NUM_NEW)
    assert found.identical_texts == sum(map(all, equal)) / 5
    assert 0 < found.equal_tokens.mean < 1
    assert found.equal_tokens.mean >= found.common_prefix.mean
    assert sum(counted) == 2 * 5 * NUM_NEW
    assert found.to_dict()["prompt_length"] == 20


def test_a_model_writes_what_it_writes():
    found = greedy_match(tiny_model(), tiny_model(), prompts(), NUM_NEW)
    assert found.equal_tokens.mean == found.common_prefix.mean == found.identical_texts == 1.0


def test_a_prompt_without_room_for_its_text():
    with pytest.raises(ValueError, match="the model reads at most 30"):
        greedy_match(tiny_model(max_position_embeddings=30), tiny_model(), prompts(), NUM_NEW)
