"""A stage costs one object: one that lives here alone is trained, refused, continued from and measured."""

import json

import pytest

from megatron_dmc.stages import STAGES
from tests.layouts import toy_stage
from tests.layouts.cases import PIPELINE
from tests.layouts.laboratory import TARGET_CR, VOCAB_SIZE, Variant
from tests.layouts.ranks import RanksFailedError
from tests.layouts.whole_run import assemble


@pytest.fixture
def hold(monkeypatch):
    """The stage, known to this test."""
    monkeypatch.setattr("megatron_dmc.stages.STAGES", STAGES.copy())
    toy_stage.know_hold()
    return Variant(stage="hold")


def train(laboratory, variant, ranks=1, switches=(), **flags):
    argv = laboratory.arguments(variant, switches, train_iters=3, **flags)
    return assemble(laboratory.run(toy_stage.train_hold, ranks, argv), VOCAB_SIZE)


def test_layout_toy_stage(laboratory, hold):
    """Its own target and learning rate hold in every step, on one rank and on two."""
    save, base = laboratory.path("hold"), laboratory.base(hold)
    run = train(laboratory, hold, pretrained_checkpoint=base, save=save, lr=None, min_lr=None, lr_decay_style=None)
    assert [step["target ratio"] for step in run.steps] == pytest.approx([1.1 * TARGET_CR] * 3)
    assert all(step["compression ratio"] > 1 for step in run.steps)
    lines = (save / "metrics.jsonl").read_text().splitlines()
    assert {(json.loads(line)["stage"], json.loads(line)["learning_rate"]) for line in lines} == {("hold", 3e-6)}
    pair = train(laboratory, hold, 2, PIPELINE, pretrained_checkpoint=base)
    assert pair.steps[0]["lm loss"] == pytest.approx(run.steps[0]["lm loss"], abs=1e-5)
    whole, decoded = laboratory.run(toy_stage.measure_hold, 1, save)[0]
    assert whole == pytest.approx(decoded)
    assert decoded > 1


def test_layout_toy_stage_starts_from_its_predecessor_alone(laboratory, hold):
    base = laboratory.base(Variant(stage="consolidate"))
    with pytest.raises(RanksFailedError, match=r"--dmc-stage hold was started from .*, a checkpoint of stage retrofit"):
        train(laboratory, hold, pretrained_checkpoint=base)
