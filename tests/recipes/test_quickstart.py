"""The main job with a few steps: every part is the real one."""

import json
import shutil

import pytest
import torch

from megatron_dmc.cli import main
from megatron_dmc.support.errors import EXIT_CHECK_FAILED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = ["--base-steps", "6", "--zero-out-steps", "1", "--retrofit-steps", "2", "--consolidate-steps", "1"]
SIZES = ["--seq-length", "64", "--global-batch-size", "4", "--micro-batch-size", "4", "--eval-sequences", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart") / "run"
    # So few steps cannot reach the target: the verdict fails, and everything else must work.
    assert main(["quickstart", "--output", str(directory), *STEPS, *SIZES]) == EXIT_CHECK_FAILED
    return directory


def report(run):
    return json.loads((run / "report" / "report.json").read_text())["runs"][0]


def test_the_report_has_everything(run):
    found = report(run)
    assert set(found["evaluations"]) == {"base", "control", "dmc"}
    assert [stage["name"] for stage in found["stages"]][:4] == ["base", "zero_out", "retrofit", "consolidate"]
    assert len(found["data"]["train"]["corpus_sha256"]) == 64
    assert len(list((run / "report").glob("*.png"))) == 3


def test_both_paths_agree_on_the_trained_model(run):
    statuses = {finding["name"]: finding["status"] for finding in report(run)["quality"]}
    assert statuses["whole sequences and decoding through the cache agree"] == "ok"


def test_a_run_that_reaches_its_ratio_is_good(tmp_path, capsys):
    """Two minutes: the shortest stages whose ratio (1.21) lies in the middle of what the verdict allows."""
    steps = ["--base-steps", "8", "--zero-out-steps", "4", "--retrofit-steps", "90", "--consolidate-steps", "120"]
    sizes = ["--seq-length", "128", "--eval-sequences", "16", "--target-cr", "1.2"]
    assert main(["quickstart", "--output", str(tmp_path / "run"), *steps, *sizes]) == 0, capsys.readouterr().out
    assert {finding["status"] for finding in report(tmp_path / "run")["quality"]} == {"ok"}


def test_control_and_retrofit_read_the_same_sequences(run):
    for stage in ("zero_out", "retrofit", "consolidate"):
        lines = [
            [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
            for name in (stage, f"control_{stage}")
        ]
        ours, control = ([line["consumed_samples"] for line in steps] for steps in lines)
        assert ours == control


def test_the_exported_model_continued_the_prompt(run):
    generation = json.loads((run / "generation.json").read_text())
    assert generation["results"][0]["prompt"].startswith("def ")
    assert generation["cache"]["uncompressed_entries"] >= generation["cache"]["entries"] > 0


def test_a_finished_run_prints_its_report_again(run, capsys):
    assert main(["quickstart", "--output", str(run), *STEPS, *SIZES]) == EXIT_CHECK_FAILED
    printed = capsys.readouterr()
    assert "report.md" in printed.out
    assert "training" not in printed.err


def test_another_configuration_is_refused(run, capsys):
    assert main(["quickstart", "--output", str(run), *STEPS, *SIZES, "--target-cr", "2"]) == 1
    assert "recipe.dmc.target_cr: 4.0 there, 2.0 here" in capsys.readouterr().err


def test_a_users_own_model(run, tmp_path):
    """A Llama that transformers itself wrote, in bfloat16, takes the place of the base."""
    transformers = pytest.importorskip("transformers")
    model, output = tmp_path / "model", tmp_path / "run"
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    for file in (run / "base_hf").glob("tokenizer*"):
        shutil.copy(file, model)
    command = ["quickstart", "--hf-model", str(model), "--output", str(output), *STEPS[2:], *SIZES]
    assert main(command) == EXIT_CHECK_FAILED
    found = report(output)
    assert [stage["name"] for stage in found["stages"]][:3] == ["zero_out", "retrofit", "consolidate"]
    assert len(json.loads((output / "generation.json").read_text())["results"]) == 1


def test_too_little_data_is_said_before_training(tmp_path, capsys):
    assert main(["quickstart", "--output", str(tmp_path / "run"), "--base-steps", "100000"]) == 1
    assert "none is read twice" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "base").exists()
