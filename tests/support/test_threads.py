"""Threads wait briefly, unless a user says otherwise or a GPU computes."""

from pathlib import Path

import pytest

from megatron_dmc.support import threads


@pytest.fixture
def without_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "_GPU_DRIVER", tmp_path / "absent")


@pytest.mark.parametrize("asked", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
@pytest.mark.usefixtures("without_gpu")
def test_what_a_user_asks_for_stays(asked):
    environment = dict(asked)
    threads.wait_briefly(environment)
    assert environment == asked


@pytest.mark.usefixtures("without_gpu")
def test_threads_wait_briefly():
    environment: dict[str, str] = {}
    threads.wait_briefly(environment)
    assert environment == {"GOMP_SPINCOUNT": str(threads.SPIN_COUNT)}


def test_nothing_changes_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(threads, "_GPU_DRIVER", Path(__file__))
    environment: dict[str, str] = {}
    threads.wait_briefly(environment)
    assert not environment
