"""``megatron-dmc evaluate``: what it prints, and its exit codes."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_dmc.cli import evaluate as evaluate_command
from megatron_dmc.cli import main
from megatron_dmc.config import DMCConfig
from megatron_dmc.data.indexed import IndexedWriter
from megatron_dmc.data.sentencepiece_training import train_tokenizer
from megatron_dmc.evaluation import perplexity
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.support import progress
from tests.inference.model_directory import TEXT, VOCAB_SIZE, write_model
from tests.inference.tiny_model import RandomSource, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate") / "model"
    write_model(directory, DMCConfig(decision_bias=-1.0))
    return directory


@pytest.fixture(scope="module")
def data(model):
    prefix = model.parent / "test"
    with IndexedWriter(prefix, VOCAB_SIZE) as writer:
        for seed in range(3):
            writer.add(np.random.default_rng(seed).integers(0, VOCAB_SIZE, 200))
    return prefix


def test_both_paths_on_an_indexed_data_set(model, data, capsys):
    options = ["--seq-length", "50", "--sequences", "6", "--batch-size", "4", "--prefill-length", "10", "--json"]
    assert main(["evaluate", "--model", str(model), "--data", str(data), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["num_tokens"] == 300
    assert result["dmc"]["decision_bias"] == -1.0
    assert result["agreement"]["failures"] == []
    assert result["decode"]["cache"]["compression_ratio"] > 1.2
    assert result["teacher_forced"]["perplexity"] == pytest.approx(result["decode"]["perplexity"], rel=1e-4)


def test_a_cache_of_8_bits_is_reported_beside_the_teacher_forced_path(model, data, capsys):
    options = ["--seq-length", "50", "--sequences", "2", "--kv-dtype", "int8", "--json"]
    assert main(["evaluate", "--model", str(model), "--data", str(data), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert not result["agreement"]["asserted"]
    assert result["agreement"]["mean_log_prob_difference"] > 1e-5
    assert result["decode"]["cache"]["kv_dtype"] == "int8"
    assert result["decode"]["loss"] == pytest.approx(result["teacher_forced"]["loss"], rel=1e-2)


def test_the_work_and_the_perplexity_are_shown_while_it_runs(model, data, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    options = ["--seq-length", "50", "--sequences", "6", "--batch-size", "4", "--path", "teacher-forced"]
    assert main(["evaluate", "--model", str(model), "--data", str(data), *options]) == 0
    printed = capsys.readouterr()
    memory, *said = printed.err.splitlines()
    assert re.fullmatch(r"memory: about .* of weights, .* of cache, .* of workspace\) of .*", memory)
    assert said[0] == "6 sequences, 300 tokens, by the path teacher-forced"
    assert said[1] == "evaluating model: 200 of 300 tokens (67%)"
    assert re.fullmatch("the first batch says: about [0-9]+ s in all", said[2])
    assert re.fullmatch(r"evaluating model: 300 of 300 tokens \(100%\), perplexity so far [0-9.]+", said[3])
    measured = re.search(r"perplexity ([0-9.]+)", printed.out)[1]
    assert float(said[4].split()[-1]) == pytest.approx(float(measured), abs=1e-3)


def test_against_the_same_weights_at_several_lengths(model, data, capsys):
    options = ["--reference", "none", "--lengths", "40,60", "--sequences", "4", "--match-tokens", "10"]
    said = ["--name", "DMC at 2", "--tokens-trained", "1000"]
    assert main(["evaluate", "--model", str(model), "--data", str(data), *options, *said, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["name"], result["method"], result["tokens_trained"]) == ("DMC at 2", "dmc", 1000)
    assert [one["seq_length"] for one in result["evaluations"]] == [40, 60]
    for one in result["evaluations"]:
        against = one["decode"]["against_reference"]
        assert against["mean_kl"] > 0
        assert against["mean_kl"] == pytest.approx(one["teacher_forced"]["against_reference"]["mean_kl"], rel=1e-3)
        assert against["reference_perplexity"] != against["perplexity"]
        assert one["greedy_match"]["num_new_tokens"] == 10
        assert one["greedy_match"]["prompt_length"] == one["seq_length"] - 10
    assert main(["evaluate", "--model", str(model), "--data", str(data), *options]) == 0
    printed = capsys.readouterr().out
    assert "decode against the reference:" in printed
    assert "greedy texts (4 prompts of 30 tokens, 10 new):" in printed
    assert re.search(r"^60 decode +4 ", printed, re.MULTILINE)


def test_another_model_as_the_reference(model, data, tmp_path, capsys):
    write_model(tmp_path / "dense")
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--seq-length", "50", "--sequences", "2"]
    assert main([*arguments, "--reference", str(tmp_path / "dense"), "--match-tokens", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["greedy_match"] is None
    assert result["reference"] == str(tmp_path / "dense")


def test_a_policy_beside_the_uncompressed_model(data, tmp_path, capsys):
    write_model(tmp_path / "dense")
    options = ["--policy", "tova", "--budget", "8", "--path", "decode", "--seq-length", "50", "--sequences", "2"]
    arguments = ["evaluate", "--model", str(tmp_path / "dense"), "--data", str(data), "--reference", "none"]
    assert main([*arguments, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["budget"]) == ("tova", 8)
    assert result["decode"]["mean_resident_entries"] < 9
    assert result["decode"]["against_reference"]["max_kl"] > 1e-3


def test_a_reference_with_another_tokenizer(model, data, tmp_path, capsys):
    write_model(tmp_path / "other")
    train_tokenizer(["other words make other tokens " + chr(10) + "1 2 3 4 " * 99], VOCAB_SIZE, tmp_path / "other")
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--seq-length", "50"]
    assert main([*arguments, "--reference", str(tmp_path / "other")]) == 1
    assert "has another tokenizer than the model (token" in capsys.readouterr().err


def test_a_reference_with_another_vocabulary(model, data, tmp_path, capsys):
    source = RandomSource(tiny_llama(vocab_size=310))
    (tmp_path / "other").mkdir()
    config = to_hf_config(source.config, None, bos_token_id=1, eos_token_id=2)
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    save_file(source.tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--seq-length", "50"]
    assert main([*arguments, "--reference", str(tmp_path / "other")]) == 1
    assert "has a vocabulary of 310 tokens, the model one of 300" in capsys.readouterr().err


def test_the_parser_offers_every_path():
    assert evaluate_command.PATHS == perplexity.PATHS


def test_a_text_file_for_people(model, tmp_path, capsys):
    (tmp_path / "held-out.txt").write_text(TEXT[:2000])
    arguments = ["evaluate", "--model", str(model), "--text", str(tmp_path / "held-out.txt"), "--seq-length", "100"]
    assert main([*arguments, "--path", "decode"]) == 0
    printed = capsys.readouterr().out
    assert "decode:         perplexity" in printed
    assert "uncompressed:" in printed
    assert "compression ratio by layer (rows) and KV head (columns):" in printed


def test_paths_that_disagree_exit_with_2(model, data, capsys, monkeypatch):
    honest = perplexity.score_whole

    def shifted(model, token_TB, reference):
        scores = honest(model, token_TB, reference)
        scores.log_prob_SB.add_(1e-3)
        return scores

    monkeypatch.setattr(perplexity, "score_whole", shifted)
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--seq-length", "50", "--sequences", "2"]
    assert main([*arguments, "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["agreement"]["failures"]
    assert "teacher-forced evaluation and decoding disagree: log-probabilities differ by" in printed.err
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    assert "reported only: not float32 throughout" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--data": "nothing"}, "nothing.bin is missing"),
        ({"--seq-length": "1000"}, "the data has 600 tokens"),
        ({"--seq-length": "150"}, "the model reads at most 128 tokens"),
        ({"--sequences": "0"}, "must be at least 1"),
        ({"--batch-size": "0"}, "batch_size=0"),
        ({"--block-size": "0"}, "block_size=0"),
        ({"--prefill-length": "51"}, "from 0 to the sequence length 50"),
        ({"--device": "abacus"}, "--device abacus"),
        ({"--kv-dtype": "int4"}, "kv_dtype='int4': must be one of auto, fp8, int8"),
        ({"--kv-dtype": "fp8", "--path": "teacher-forced"}, "has no cache that could be quantised"),
        ({"--path": "fast"}, "invalid choice: 'fast'"),
        ({"--reference": "nowhere"}, "nowhere"),
        ({"--match-prompts": "0"}, "give at least 1 prompt"),
        ({"--match-tokens": "-1"}, "0 tokens to compare no texts"),
        ({"--lengths": "many"}, "--lengths"),
        ({"--tokens-trained": "-1"}, "--tokens-trained -1: must be at least 0"),
    ],
)
def test_mistakes_exit_with_1(model, data, changed, message, capsys):
    options = {"--model": str(model), "--data": str(data), "--seq-length": "50"} | changed
    try:
        code = main(["evaluate", *(word for option in options.items() for word in option)])
    except SystemExit as exit:
        code = exit.code
    assert code == 1
    assert message in capsys.readouterr().err


def test_data_of_another_vocabulary(model, tmp_path, capsys):
    with IndexedWriter(tmp_path / "other", 1000) as writer:
        writer.add(np.full(100, 999))
    assert main(["evaluate", "--model", str(model), "--data", str(tmp_path / "other"), "--seq-length", "50"]) == 1
    assert "the data holds token 999" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(model, data, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = ["evaluate", "--model", str(model), "--data", str(data), "--device", "cuda"]
    assert main(arguments) == 1
    assert "cpu always works" in capsys.readouterr().err
