"""The watch speaks once per window, and only when the ratio stays off its target."""

import pytest

from megatron_dmc.training.ratio_watch import RatioWatch, RunningRatio


def messages(measured: float, target: float, steps: int = 10, window: int = 5) -> list[str]:
    watch = RatioWatch(window)
    return [message for _ in range(steps) if (message := watch.observe(measured, target))]


def test_silent_within_the_tolerance():
    assert messages(3.9, 4.0) == []


def test_an_open_hinge_names_what_to_raise():
    spoken = messages(2.0, 4.0)
    assert len(spoken) == 2
    assert "2.00" in spoken[0]
    assert "4.00" in spoken[0]
    assert "--dmc-loss-weight" in spoken[0]


def test_an_overshoot_names_what_to_lower():
    assert "exceeds" in messages(6.0, 4.0)[0]


def test_ratio_is_tokens_over_entries_not_the_mean_of_ratios():
    running = RunningRatio(2)
    running.observe(2.0)
    running.observe(4.0)
    assert running.ratio == pytest.approx(2 / (1 / 2 + 1 / 4))


def test_a_ratio_is_reached_by_a_whole_window():
    running = RunningRatio(2)
    assert not running.reached(1.0)
    running.observe(4.0)
    assert not running.reached(2.0)
    running.observe(4.0)
    assert running.reached(4.0)
    running.observe(1.0)
    assert not running.reached(2.0)
