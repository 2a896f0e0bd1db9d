"""After a step: one line of metrics, and one decision to stop on all ranks."""

import json
from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.training import metrics
from megatron_dmc.training.ratio_watch import RunningRatio


@pytest.fixture
def ranks(monkeypatch):
    """This process is the last of its ranks; what another rank wants may be set."""
    other = SimpleNamespace(reason=0)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda reason, op: reason.clamp_(min=other.reason))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    return other


def ratios(*measured):
    running = RunningRatio(2)
    for ratio in measured:
        running.observe(ratio)
    return running


def test_without_a_reason_ranks_do_not_even_speak(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    assert not metrics.StopDecision(ratios(4.0, 4.0), None, None)(1)


@pytest.mark.parametrize(
    ("measured", "file_exists", "other", "stops", "reached"),
    [
        ((4.0, 4.0), False, 0, True, True),
        ((1.0, 1.0), False, 0, False, False),
        ((1.0, 1.0), True, 0, True, False),
        ((4.0, 4.0), True, 0, True, True),
        ((), False, 2, True, True),
        ((), False, 1, True, False),
    ],
)
def test_reasons_to_stop(ranks, tmp_path, measured, file_exists, other, stops, reached):
    """Ranks without losses have seen no ratio, and learn of it from the others."""
    stop = tmp_path / "stop"
    if file_exists:
        stop.touch()
    ranks.reason = other
    decision = metrics.StopDecision(ratios(*measured), str(stop), 2.0)
    assert (decision(7), decision.ratio_reached) == (stops, reached)


def test_a_step_becomes_a_line(ranks, tmp_path, monkeypatch):
    args = SimpleNamespace(dmc_stage="retrofit", consumed_train_samples=32)
    monkeypatch.setattr(metrics, "get_args", lambda: args)
    recorder = metrics.StepRecorder(str(tmp_path))
    losses = {"lm loss": torch.tensor(2.5), "compression ratio": torch.tensor(2.0), "target ratio": torch.tensor(4.0)}
    recorder({"loss_dict": losses, "iteration": 3, "grad_norm": None, "learning_rate": 1e-4})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.pop("step_seconds") >= 0
    assert line == {
        "lm_loss": 2.5,
        "measured_cr": 2.0,
        "target_cr": 4.0,
        "step": 3,
        "stage": "retrofit",
        "learning_rate": 1e-4,
        "grad_norm": None,
        "consumed_samples": 32,
    }
    assert (recorder.iteration, recorder.recent_ratio.ratio) == (3, 2.0)


def test_a_rank_without_losses_knows_how_far_it_came():
    recorder = metrics.StepRecorder(None)
    recorder({"loss_dict": {}, "iteration": 3})
    assert recorder.iteration == 3
