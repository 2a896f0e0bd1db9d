"""An eviction policy is one file and one line: one that lives in the tests alone runs through engine and evaluation."""

import json

import pytest
import torch

from megatron_dmc import methods
from megatron_dmc.cli import main
from megatron_dmc.evaluation.perplexity import DECODE, evaluate
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.expectation import ExpectedText
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.ops.rope import apply_rope, cos_sin
from tests.inference.model_directory import write_model
from tests.inference.tiny_model import RandomSource, tiny_llama
from tests.methods.newest import FIRST, Newest

BUDGET = 12


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.setitem(methods.POLICIES, "newest", Newest)
    return methods.policy("newest", BUDGET)


def test_it_decodes_as_plain_attention_over_what_it_keeps(policy):
    """1. The keys and values of each step by hand; 2. the policy in the cache. One layer: no other one feeds it."""
    source = RandomSource(tiny_llama(num_layers=1))
    dense, kept = Decoder(source), Decoder(source, method=policy)
    token_T = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(0))
    prompt = 20
    cache = kept.new_cache(1, block_size=4)
    rows = cache.add_sequences(1)
    kept.read(token_T[:prompt], [prompt], cache, rows)
    assert (cache.cache_seqlens == BUDGET).all()
    assert cache.blocks.num_in_use == 2 * 3
    seen = [*range(FIRST), *range(prompt - BUDGET + FIRST, prompt)]
    for position in range(prompt, 40):
        hidden = kept.read(token_T[position : position + 1], [1], cache, rows)
        # The oldest but the first leaves for the new one.
        seen = [*seen[:FIRST], *seen[FIRST + 1 :], position]
        expected = reference_hidden(dense, token_T[: position + 1], seen)
        torch.testing.assert_close(hidden[0], expected, atol=1e-4, rtol=0)
    cache.check_integrity()


def reference_hidden(dense, token_T, visible):
    """Hidden state of the last token of a one-layer model that attends to the tokens ``visible``, by softmax."""
    layer = dense.layers[0]
    hidden = torch.nn.functional.embedding(token_T, dense.embedding)
    q, k, v = dense._project(hidden, layer)
    cos, sin = (x[:, None] for x in cos_sin(torch.arange(len(token_T)), dense.inverse_frequencies))
    q, k = apply_rope(q, cos, sin)[-1], apply_rope(k, cos, sin)[visible].repeat_interleave(2, dim=1)
    weights = (torch.einsum("nd,end->ne", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    mixed = torch.einsum("ne,end->nd", weights, v[visible].repeat_interleave(2, dim=1)).flatten()
    hidden = hidden[-1] + layer.attention_output(mixed)
    gate, up = layer.gate_up(dense._norm(hidden, layer.mlp_norm)).chunk(2)
    hidden = hidden + layer.down(torch.nn.functional.silu(gate) * up)
    return dense._norm(hidden, dense.final_norm)


def test_the_engine_bounds_its_cache_and_frees_it(policy):
    source = RandomSource(tiny_llama())
    prompts = [list(range(30)), [1, 2, 3], [7]]
    engine = Engine(Decoder(source, method=policy), block_size=4)
    together = engine.generate(prompts, SamplingParams(max_new_tokens=20))
    assert all(max(map(max, request.usage.entries)) == BUDGET for request in together)
    sampling = SamplingParams(max_new_tokens=20)
    alone = [Engine(engine.model, block_size=3).generate([prompt], sampling)[0] for prompt in prompts]
    assert [request.output for request in together] == [request.output for request in alone]
    dense = Engine(Decoder(source)).generate(prompts, SamplingParams(max_new_tokens=20))
    assert [request.output for request in dense] != [request.output for request in together]
    engine.runner.cache.check_integrity()
    assert engine.runner.cache.blocks.num_in_use == 0


def test_a_full_cache_fails_what_cannot_be_read_again_alike(policy):
    """Its decisions depend on what was decoded: a request that lost its memory could not get the same one back."""
    engine = Engine(Decoder(RandomSource(tiny_llama()), method=policy), block_size=4, num_blocks=22, max_sequences=2)
    prompts, sampling = [[1] * 6, [2] * 6], SamplingParams(max_new_tokens=20)
    assert [one.finish_reason for one in engine.generate(prompts, sampling)] == ["length"] * 2, "one after the other"
    engine.expectation.text = lambda request: ExpectedText(1, 0, 0, 0)
    assert [one.finish_reason for one in engine.generate(prompts, sampling)] == ["length", "error"]


def test_evaluation_measures_it_by_decoding(policy):
    model = Decoder(RandomSource(tiny_llama()), method=policy)
    token_NT = torch.randint(0, 50, (3, 41), generator=torch.Generator().manual_seed(1))
    result = evaluate(model, token_NT, path=DECODE)
    assert result.decode.compression_ratio == pytest.approx(40 / BUDGET)
    with pytest.raises(ValueError, match="newest decides token by token, measure it with path='decode'"):
        evaluate(model, token_NT)


def test_the_commands_know_its_name(policy, tmp_path, capsys):
    write_model(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--policy", "newest", "--budget", str(BUDGET), "--json"]
    assert main(["generate", *options, "--prompt", "a b c", "--max-new-tokens", "30", "--ignore-eod"]) == 0
    generated = json.loads(capsys.readouterr().out)
    assert generated["cache"]["entries"] == BUDGET * 4
    assert main(["generate", *options[:2], "--policy", "oldest", "--budget", "12", "--prompt", "a"]) == 1
    assert "policy 'oldest': must be one of" in capsys.readouterr().err


def test_a_budget_too_small_is_refused(policy):
    with pytest.raises(ValueError, match="budget=4: must be above 4"):
        methods.policy("newest", FIRST)
    with pytest.raises(ValueError, match="policy 'oldest': must be one of .*newest"):
        methods.policy("oldest", 12)
