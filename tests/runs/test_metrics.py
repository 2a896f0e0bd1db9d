"""Each step stands in the file once, whatever happened to the run."""

import json

from megatron_dmc.runs.layout import METRICS_FILE
from megatron_dmc.runs.metrics import MetricsFile, steps_logged


def steps(directory):
    return [json.loads(line)["step"] for line in (directory / METRICS_FILE).read_text().splitlines()]


def test_steps_follow_each_other(tmp_path):
    metrics = MetricsFile(tmp_path / "stage")
    for step in (1, 2, 3):
        metrics.add({"step": step, "lm_loss": 1.0})
    assert steps(tmp_path / "stage") == [1, 2, 3]
    assert steps_logged(tmp_path / "stage") == 3
    assert steps_logged(tmp_path) == 0


def test_a_continued_run_replaces_the_steps_it_repeats(tmp_path):
    first = MetricsFile(tmp_path)
    for step in (1, 2, 3, 4):
        first.add({"step": step})
    again = MetricsFile(tmp_path)
    for step in (3, 4, 5):
        again.add({"step": step})
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_line_cut_off_by_a_kill_goes(tmp_path):
    MetricsFile(tmp_path).add({"step": 1})
    with open(tmp_path / METRICS_FILE, "a") as stream:
        stream.write('{"step": 2, "lm_')
    MetricsFile(tmp_path).add({"step": 2})
    assert steps(tmp_path) == [1, 2]
