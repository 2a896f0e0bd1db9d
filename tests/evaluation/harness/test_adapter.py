"""The adapter in lm-evaluation-harness: every shipped task, and likelihoods against whole forward passes."""

import json
import shutil

import pytest
import torch

from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.evaluation.harness.continuations import Scorer
from megatron_dmc.evaluation.harness.run import go_offline, with_data
from megatron_dmc.evaluation.harness.task_files import read_task
from megatron_dmc.inference.decoder.decoder import Decoder
from tests.evaluation.harness.benchmark_files import HELLASWAG, WINOGRANDE, write_benchmarks
from tests.inference.model_directory import TEXT, write_model

go_offline()
pytest.importorskip("lm_eval", reason="lm-evaluation-harness (extra [eval]) is not installed")

from datasets import Dataset  # noqa: E402 -- the variables that keep them offline come first
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from megatron_dmc.evaluation.harness.adapter import CompressedLM  # noqa: E402

BEGIN = 1
"""What Llama 2 puts first."""
SHIPPED = "mmlu,piqa,arc_easy,arc_challenge,hellaswag,winogrande,boolq,gsm8k"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eval") / "model"
    write_model(directory, DMCConfig(decision_bias=-1.0), max_position_embeddings=1024)
    return directory


@pytest.fixture(scope="module")
def adapter(model):
    tokenizer = load_tokenizer(model)
    tokenizer.first = [BEGIN]
    return CompressedLM(Scorer(Decoder(open_source(model))), tokenizer, frozenset([tokenizer.eod]))


def requests(kind, *arguments):
    return [Instance(kind, {}, one, 0) for one in arguments]


def log_prob(adapter, tokens, start):
    """Of the tokens from ``start`` on, by one forward pass."""
    decoder = adapter._scorer.model
    token_T1 = torch.tensor(tokens).unsqueeze(-1)
    log_probs = decoder.logits(decoder.forward(token_T1[:-1]))[:, 0].log_softmax(-1)
    return log_probs.gather(-1, token_T1[1:])[start - 1 :].sum().item()


@pytest.mark.slow
def test_every_shipped_task(model, tmp_path, capsys):
    data = write_benchmarks(tmp_path / "data")
    arguments = ["eval", "--model", str(model), "--data-dir", str(data), "--json"]
    assert main([*arguments, "--tasks", SHIPPED]) == 0
    found = json.loads(capsys.readouterr().out)["standard_tasks"]
    tasks = found["tasks"]
    assert len(tasks) == 9
    assert tasks["mmlu_algebra"]["num_questions"] == 2
    assert tasks["mmlu_algebra"]["num_fewshot"] == tasks["gsm8k"]["num_fewshot"] == 5
    expected = (
        sum(tasks[f"mmlu_{name}"]["metrics"]["acc,none"] * n for name, n in (("algebra", 2), ("virology", 1))) / 3
    )
    assert found["groups"]["mmlu"]["metrics"]["acc,none"] == pytest.approx(expected)
    assert {"acc,none", "acc_norm,none"} <= tasks["hellaswag"]["metrics"].keys()
    assert "exact_match,strict-match" in tasks["gsm8k"]["metrics"]
    assert found["path_of_scores"] == "teacher-forced"
    assert found["cache"]["compression_ratio"] > 1.2


def test_likelihoods_of_pairs(adapter):
    tokenizer = adapter._tokenizer
    contexts = [("def step_1(x):", "\n    return x"), ("", "def step"), ("def step_2(x): ", "return")]
    found = adapter.loglikelihood(requests("loglikelihood", *contexts))
    for (context, continuation), (value, _) in zip(contexts, found, strict=True):
        tokens = tokenizer.encode_prompt(context + continuation)
        start = len(tokenizer.encode_prompt(context.rstrip())) if context else 1
        assert tokens[0] == BEGIN, "a text begins as Llama wants it"
        assert value == pytest.approx(log_prob(adapter, tokens, start), abs=1e-3)


def test_whole_texts_in_windows(adapter):
    tokenizer = adapter._tokenizer
    short, long = TEXT[:300], TEXT[:4000]
    found = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", (short,), (long,)))
    tokens = [BEGIN, *tokenizer.encode(short)]
    assert found[0] == pytest.approx(log_prob(adapter, tokens, 1), abs=1e-2)
    tokens = [BEGIN, *tokenizer.encode(long)]
    assert len(tokens) > 1025, "more than one window"
    assert found[1] < found[0]


def test_an_empty_context_of_a_tokenizer_that_puts_nothing_first(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    adapter = CompressedLM(Scorer(Decoder(open_source(model))), load_tokenizer(folder), frozenset())
    assert adapter._tokenizer.first == []
    assert adapter.tok_encode("def") == adapter._tokenizer.encode("def")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    assert adapter.prefix_token_id == BEGIN
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert adapter.prefix_token_id == adapter.eot_token_id == adapter._tokenizer.eod


def test_texts_end_where_the_task_says(adapter):
    settings = {"until": ["\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.7}
    (text,) = adapter.generate_until(requests("generate_until", ("def step_1(x):", settings)))
    assert "\n" not in text
    sampling = adapter._request("def", settings).sampling
    assert (sampling.max_new_tokens, sampling.stop, sampling.temperature) == (20, ("\n",), 0.0)
    assert adapter._request("def", {"do_sample": True, "temperature": 0.7}).sampling.temperature == 0.7
    cut = adapter._request(TEXT, {"max_gen_toks": 24}).prompt
    assert cut == adapter._tokenizer.encode(TEXT)[-1000:]


def shipped(name, data):
    """A shipped task as the harness builds it, and the first document that it asks about."""
    (task,) = read_task(name, data)
    built = TaskManager(include_defaults=False).load([with_data(task)])["tasks"][name]
    return built, next(iter(built.eval_docs))


def test_jinja_says_what_the_harness_computes_in_python(tmp_path):
    hellaswag = pytest.importorskip("lm_eval.tasks.hellaswag.utils", reason="this release keeps it elsewhere")
    winogrande = pytest.importorskip("lm_eval.tasks.winogrande.preprocess_winogrande", reason="as above")
    data = write_benchmarks(tmp_path)
    task, doc = shipped("hellaswag", data)
    (expected,) = hellaswag.process_docs(Dataset.from_list([HELLASWAG]))
    assert task.doc_to_text(doc) == expected["query"] == "Cooking: A man cooks. He Then"
    assert task.doc_to_choice(doc) == expected["choices"]
    assert task.doc_to_target(doc) == expected["gold"]
    task, doc = shipped("winogrande", data)
    assert task.doc_to_text(doc) == winogrande.doc_to_text(WINOGRANDE) == 1
    assert task.doc_to_choice(doc) == winogrande.doc_to_choice(WINOGRANDE)
    assert task.doc_to_target(doc) == winogrande.doc_to_target(WINOGRANDE) == "was small."


def test_a_chat_needs_a_template(adapter):
    with pytest.raises(ValueError, match="leave out --chat"):
        adapter.apply_chat_template([{"role": "user", "content": "hi"}])
