"""What every KV head decides, logged once per step."""

import json

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.methods import dmc
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.training import decision_log
from megatron_dmc.training.decision_log import DecisionLog, both
from megatron_dmc.training.model.microbatch import Microbatch

GEOMETRY = Geometry(10, 2)


@pytest.fixture(autouse=True)
def first_rank(monkeypatch):
    monkeypatch.setattr(decision_log.parallel_state, "get_data_parallel_rank", lambda with_context_parallel: 0)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)


def microbatch(step, sequences=(0, 1)):
    return Microbatch(GEOMETRY, step=step, sequence_B=None if sequences is None else torch.tensor(sequences))


def decisions(threshold):
    logits = torch.arange(10.0).view(10, 1, 1).expand(10, 2, 2) - threshold
    return dmc.decide(logits, logits, GEOMETRY.first_SB, DMCConfig())


def read(path):
    return [json.loads(line) for line in (path / "decisions" / "rank_0003.jsonl").read_text().splitlines()]


def test_one_line_per_step_with_means_over_its_micro_batches(tmp_path):
    log = DecisionLog(tmp_path)
    log(microbatch(0), 1, 4, decisions(4.5))
    log(microbatch(0), 2, 4, decisions(1.5))
    log(microbatch(0), 1, 4, decisions(6.5))
    log(microbatch(0, sequences=None), 1, 4, decisions(0.5))  # evaluation
    assert not (tmp_path / "decisions").exists()
    log(microbatch(1), 1, 4, decisions(8.5))
    log.write()
    first, second = read(tmp_path)
    layers = {"1": {"first_head": 4, "merged": [0.4, 0.4]}, "2": {"first_head": 4, "merged": [0.8, 0.8]}}
    assert first == {"step": 1, "layers": layers}
    assert second["layers"]["1"]["merged"] == [0.1, 0.1]


def test_a_run_that_continues_repeats_no_step(tmp_path):
    for _ in range(2):
        log = DecisionLog(tmp_path)
        for step in (3, 4):
            log(microbatch(step), 1, 0, decisions(4.5))
        log.write()
    assert [line["step"] for line in read(tmp_path)] == [4, 5]


def test_ranks_with_the_same_heads_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(decision_log.parallel_state, "get_data_parallel_rank", lambda with_context_parallel: 1)
    log = DecisionLog(tmp_path)
    log(microbatch(0), 1, 0, decisions(4.5))
    log.write()
    assert not list(tmp_path.iterdir())


def test_two_observers_are_both_told():
    told = []
    tell = both(lambda *_: told.append("first"), lambda *_: told.append("second"))
    tell(microbatch(0), 1, 0, decisions(4.5))
    assert told == ["first", "second"]
    assert both(None, None) is None
