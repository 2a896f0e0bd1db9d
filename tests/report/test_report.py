"""Reports of finished, running and damaged runs."""

import json

import pytest

from megatron_dmc.cli import main
from megatron_dmc.report.collect import collect
from megatron_dmc.report.curve import join, smoothed
from megatron_dmc.report.quality import quality
from megatron_dmc.report.words import cache_title, heat_map_title, table, training_findings
from megatron_dmc.runs.metrics import read_stages


def line(step, stage, first_sample=0, **values):
    return {"step": step, "stage": stage, "lm_loss": 2.0, "consumed_samples": first_sample + 16 * step, **values}


def write_stage(run, name, stage, steps, first_sample=0, **values):
    (run / name).mkdir(parents=True)
    lines = [json.dumps(line(step, stage, first_sample, **values)) for step in range(1, steps + 1)]
    (run / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def result(perplexity, ratio=1.0, **decode):
    path = {
        "perplexity": perplexity,
        "loss": 1.0,
        "loss_standard_error": 0.01,
        "compression_ratio": ratio,
        "compression_ratio_per_layer_and_kv_head": [[1.0, 2.0], [3.0, 12.5]],
        "entries_over_tokens": [[1, 4.0], [64, 128.0], [128, 160.0]],
        "cache": None,
    }
    held = {"bytes": 10, "uncompressed_bytes": 40, "entries": 5, "uncompressed_entries": 20}
    agreement = {"failures": [], "largest_log_prob_difference": 1e-6, "num_tokens_compared": 9}
    return {
        "teacher_forced": path,
        "decode": {**path, "cache": held} if decode.get("decode") else None,
        "agreement": {**agreement, "share_of_equal_decisions": 1.0} if decode.get("decode") else None,
    }


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    write_stage(run, "base", "off", 5)
    write_stage(run, "zero_out", "zero_out", 3, 80)
    write_stage(run, "retrofit", "retrofit", 6, 128, measured_cr=3.0, target_cr=3.5)
    write_stage(run, "consolidate", "consolidate", 4, 224, measured_cr=3.9, target_cr=4.0)
    for name, steps, first in (("zero_out", 3, 80), ("retrofit", 6, 128), ("consolidate", 4, 224)):
        write_stage(run, f"control_{name}", "off", steps, first)
    configuration = {"configuration": {"recipe": {"dmc": {"target_cr": 4.0}}}, "sha256": "abc"}
    (run / "run.json").write_text(json.dumps(configuration))
    return run


def measure(run, ratio=4.1, perplexity=10.4):
    (run / "evaluation").mkdir()
    results = {"base": result(11), "control": result(10), "dmc": result(perplexity, ratio, decode=True)}
    for name, value in results.items():
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(value))


def test_a_finished_run(run, capsys):
    measure(run)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.md")
    pictures = {path.name for path in (run / "report").glob("*.png")}
    assert pictures == {"training.png", "ratio_by_layer_and_head.png", "cache_while_decoding.png"}
    text = (run / "report" / "report.md").read_text()
    assert all(f"]({picture})" in text for picture in pictures)
    assert "| DMC | token by token, through the cache | 10.400 ± 0.104 | 4.10 | 10 of 40 |" in text
    assert "10.400, control 10.000: +4.0%" in text
    stored = json.loads((run / "report" / "report.json").read_text())["runs"][0]
    assert [finding["status"] for finding in stored["quality"]] == ["ok", "ok", "ok"]
    assert stored["sha256"] == "abc"


def test_a_run_that_is_still_running(run):
    with open(run / "consolidate" / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5, "sta')
    assert main(["report", str(run)]) == 0
    stored = json.loads((run / "report" / "report.json").read_text())["runs"][0]
    assert {finding["detail"] for finding in stored["quality"]} == {"not measured yet"}


def test_several_runs_are_compared(run, tmp_path, capsys):
    write_stage(tmp_path / "second", "retrofit", "retrofit", 4, measured_cr=2.0, target_cr=2.5)
    runs = [str(run), str(tmp_path / "second")]
    assert main(["report", *runs]) == 1
    assert "--output" in capsys.readouterr().err
    assert main(["report", *runs, "--output", str(tmp_path / "both")]) == 0
    assert {path.name for path in (tmp_path / "both").glob("*.png")} == {"run_training.png", "second_training.png"}
    assert (tmp_path / "both" / "report.md").read_text().startswith("# Runs")


def test_a_single_stage_directory(run):
    assert main(["report", str(run / "retrofit")]) == 0
    assert (run / "retrofit" / "report" / "training.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [("nothing\n", "line 1 is not JSON"), ('{"loss": 1}\n', "has no step and stage"), ("[]\n", "no step")],
)
def test_a_file_that_is_not_ours(tmp_path, content, message, capsys):
    (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_nothing_to_report(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no metrics" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "missing")]) == 1


def test_stages_follow_one_another(run):
    stages = read_stages(run)
    assert [stage.name for stage in stages][:4] == ["base", "zero_out", "retrofit", "consolidate"]
    curve = join([stage for stage in stages if stage.stage != "off"])
    assert curve.borders == [(0, "zero_out"), (3, "retrofit"), (9, "consolidate")]
    assert curve.of("measured_cr")[0] == list(range(4, 14))


def test_titles_say_what_was_found(run):
    assert training_findings(collect(run)) == [
        "The cache shrinks 3.9-fold in training (target 4).",
        "After 13 steps the LM loss is 0.000 nats above the control's.",
    ]
    assert heat_map_title([[1.0, 2.0], [3.0, 12.5]]).startswith("Most compressed: layer 1, KV head 1 (12.5 tokens")
    assert cache_title(128, 40.0) == "After 128 tokens the cache holds 40 entries instead of 128: 3.2 times fewer"


@pytest.mark.parametrize(
    ("ratio", "perplexity", "expected"),
    [
        (4.0, 10.0, ["ok", "ok", "ok"]),
        (3.6, 11.0, ["ok", "ok", "ok"]),
        (3.59, 10.0, ["failed", "ok", "ok"]),
        (4.41, 10.0, ["failed", "ok", "ok"]),
        (4.0, 11.01, ["ok", "failed", "ok"]),
    ],
)
def test_quality(ratio, perplexity, expected):
    evaluations = {"control": result(10), "dmc": result(perplexity, ratio, decode=True)}
    assert [finding.status for finding in quality(evaluations, 4.0)] == expected


def test_disagreeing_paths_fail():
    dmc = result(10, 4.0, decode=True)
    dmc["agreement"]["failures"] = ["log-probabilities differ by 1e-2"]
    assert quality({"control": result(10), "dmc": dmc}, 4.0)[2].status == "failed"


def test_small_things():
    assert smoothed([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]
    assert table(("a", "b"), [("1", "2")]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


@pytest.mark.parametrize("lost", ["NaN", "Infinity", "null"])
def test_a_diverged_run_says_so_in_json_that_every_parser_reads(run, lost):
    """Of this release (null), and of those that wrote NaN."""
    text = "".join(json.dumps(line(step, "retrofit", measured_cr=1.0, target_cr=1.1)) + "\n" for step in range(1, 31))
    head, tail = text[: text.index('{"step": 20,')], text[text.index('{"step": 20,') :]
    (run / "retrofit" / "metrics.jsonl").write_text(head + tail.replace('"lm_loss": 2.0', f'"lm_loss": {lost}'))
    measure(run)
    broken = json.dumps(result(10, 4.1, decode=True)).replace('"perplexity": 10', f'"perplexity": {lost}')
    (run / "evaluation" / "dmc.json").write_text(broken)
    assert main(["report", str(run)]) == 0

    def refuse(word):
        raise AssertionError(word)

    report = json.loads((run / "report" / "report.json").read_text(), parse_constant=refuse)
    (facts,) = report["runs"]
    assert next(stage for stage in facts["stages"] if stage["name"] == "retrofit")["last"]["lm_loss"] is None
    assert "The LM loss of retrofit is not finite from step 20 on." in (run / "report" / "report.md").read_text()
    assert [finding["status"] for finding in facts["quality"]].count("failed") == 1


def write_decisions(run, stage, rank, first_head, layers, shares):
    lines = [
        {"step": step, "layers": {str(layer): {"first_head": first_head, "merged": merged} for layer in layers}}
        for step, merged in enumerate(shares, start=1)
    ]
    (run / stage / "decisions").mkdir(exist_ok=True)
    path = run / stage / "decisions" / f"rank_{rank:04d}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_heads_decide_is_put_together_from_all_ranks_and_stages(run, tmp_path):
    """Two ranks of tensor parallelism times two pipeline stages; one of them has a step less."""
    for rank, (head, layer) in enumerate([(0, 1), (1, 1), (0, 2), (1, 2)]):
        write_decisions(run, "retrofit", rank, head, [layer], [[0.5]] * (6 if rank else 5))
        write_decisions(run, "consolidate", rank, head, [layer], [[0.25 * (rank == 3) + 0.5]])
    facts = collect(run)
    assert facts.decisions.steps == [1, 2, 3, 4, 5, 7]
    assert facts.decisions.shares[-1] == [[0.5, 0.5], [0.5, 0.75]]
    assert main(["report", str(run), "--output", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "ratio_while_training.png").stat().st_size > 10_000
    (run / "retrofit" / "decisions" / "rank_0000.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="rank_0000.jsonl, line 1 holds no decisions of a step"):
        collect(run)
