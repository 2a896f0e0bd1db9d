"""Each step stands in the file once, whatever happened to the run."""

import json
import math

from megatron_dmc.runs.layout import METRICS_FILE
from megatron_dmc.runs.metrics import MetricsFile, read_stages, steps_logged


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


def test_a_loss_that_is_no_number_is_null_in_the_file_and_nan_again_when_read(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.add({"step": 1, "stage": "retrofit", "lm_loss": math.nan, "measured_cr": math.inf, "grad_norm": None})
    assert json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=None)["lm_loss"] is None
    (stage,) = read_stages(tmp_path)
    (step,) = stage.steps
    assert math.isnan(step["lm_loss"])
    assert math.isnan(step["measured_cr"])
    assert step["grad_norm"] is None
