"""What learning from a teacher promises: nothing pulls at first, what is frozen stays, stages find their teacher."""

import json

import numpy as np
import pytest

from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_dmc.cli import main
from tests.layouts.cases import (
    ADAPTER,
    ADAPTER_FROM_PLAIN,
    DISTILLED,
    DISTRIBUTED_OPTIMIZER,
    DMS,
    LAYOUTS,
    TENSOR,
    WHOLE_SEGMENT,
    ZERO_OUT,
)
from tests.layouts.laboratory import SEQUENCE_LENGTH, VOCAB_SIZE
from tests.layouts.ranks import run_ranks

ROUNDING = 1e-6
STEPS = 3


def command(argv):
    """``megatron-dmc train`` on one rank; its exit code."""
    return main(["train", *argv])


@pytest.mark.parametrize("layout", ["one_rank", pytest.param("tp2_sp_pp2", marks=pytest.mark.exhaustive)])
def test_layout_nothing_pulls_where_nothing_is_evicted(laboratory, layout):
    """New adapters decide nothing, with a bias that no noise reaches: student and teacher are one model."""
    where = LAYOUTS.get(layout)
    ranks, switches = (where.ranks, where.switches) if where else (1, ())
    run = laboratory.train(ADAPTER_FROM_PLAIN, ranks, switches, train_iters=1, dmc_decision_bias=1000)
    (step,) = run.steps
    assert abs(step["distillation loss"]) < ROUNDING
    assert step["lm loss"] > 1
    assert step["compression ratio"] == 1


def _tensors(directory):
    (iteration,) = [path for path in directory.iterdir() if path.name.startswith("iter_")]
    return TorchDistCheckpoint(iteration)


@pytest.mark.parametrize(
    ("ranks", "switches"),
    [
        (1, ()),
        pytest.param(4, ("--bf16", *TENSOR, *DISTRIBUTED_OPTIMIZER), marks=pytest.mark.exhaustive),
    ],
    ids=["one_rank", "dp2_tp2_bf16"],
)
def test_layout_what_is_frozen_stays_bit_for_bit(laboratory, tmp_path, ranks, switches):
    """Adapters move, and nobody keeps an optimizer's state of anything else."""
    laboratory.train(ADAPTER, ranks, switches, save=tmp_path / "save", train_iters=STEPS, lr=1e-2, min_lr=1e-2)
    before, after = _tensors(laboratory.base(ADAPTER)), _tensors(tmp_path / "save")
    weights = [name for name in before.tensors if name.startswith(("decoder.", "embedding.", "output_layer."))]
    assert len(weights) == 11
    for name in weights:
        # Layouts pad the vocabulary differently.
        old, new = (checkpoint.read(name)[:VOCAB_SIZE] for checkpoint in (before, after))
        assert old.to(new.dtype).equal(new) == (".decision" not in name), name
    states = {name for name in after.tensors if name.startswith("optimizer.") and ".decoder." in name}
    assert all(".self_attention.decision" in name for name in states)
    assert not any("embedding" in name or "output_layer" in name for name in after.tensors if "optimizer" in name)


def test_layout_losses_are_reported_side_by_side(laboratory, tmp_path):
    """In every step and in validation."""
    flags = {"train_iters": 2, "split": "70,30,0", "eval_iters": 1, "eval_interval": 1, "save": tmp_path / "save"}
    run = laboratory.train(DISTILLED, 1, **flags)
    assert run.validations
    for values in (*run.steps, *run.validations):
        assert values["distillation loss"] > 0
        assert values["lm loss"] > values["distillation loss"]
    lines = [json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()]
    assert [line["distillation_loss"] for line in lines] == [step["distillation loss"] for step in run.steps]


def test_layout_the_lm_loss_is_that_of_a_run_without_a_teacher(laboratory):
    """It is computed beside the divergence, by another way than Megatron's."""
    taught = laboratory.train(DISTILLED, 1, train_iters=1)
    alone = laboratory.reference(WHOLE_SEGMENT, 1)
    assert taught.steps[0]["lm loss"] == pytest.approx(alone.steps[0]["lm loss"], abs=1e-6)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert np.linalg.norm(taught.gradients[name] - alone.gradients[name]) > 0.1 * np.linalg.norm(alone.gradients[name])


@pytest.fixture
def train(laboratory, tmp_path):
    """Train with few words on one rank; its exit code and what it printed."""

    def trained(variant, *switches, **flags):
        flags = {"train_iters": 2, "dmc_teacher": None} | flags
        logs = tmp_path / f"logs{len(list(tmp_path.iterdir()))}"
        (code,) = run_ranks(command, 1, logs, laboratory.arguments(variant, switches, **flags))
        return code, (logs / "rank0.log").read_text()

    return trained


def test_layout_stages_find_the_teacher_of_the_first_one(laboratory, train, tmp_path):
    """DMS from a plain model by a borrowed channel: the second stage and a run that continues know its teacher too."""
    base, first, second = laboratory.base(ZERO_OUT), tmp_path / "zero_out", tmp_path / "retrofit"
    steps = {"dmc_steps_per_unit": 4, "dmc_target_cr": 2}
    code, said = train(DMS, dmc_stage="zero_out", pretrained_checkpoint=base, save=first, **steps)
    assert code == 0
    assert f"--dmc-teacher {base}" in said
    retrofit = {"dmc_stage": "retrofit", "pretrained_checkpoint": first, "save": second, **steps}
    assert train(DMS, exit_interval=1, **retrofit)[0] == 75
    assert train(DMS, **retrofit)[0] == 0
    lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    assert [line["target_cr"] for line in lines] == pytest.approx([1.25, 1.5])
    assert all(line["distillation_loss"] > 0 for line in lines)


def test_layout_adapters_begin_and_go_on(laboratory, train, tmp_path):
    base, save = laboratory.base(ADAPTER_FROM_PLAIN), tmp_path / "save"
    assert train(ADAPTER_FROM_PLAIN, pretrained_checkpoint=base, save=save, exit_interval=1)[0] == 75
    code, said = train(ADAPTER_FROM_PLAIN, pretrained_checkpoint=base, save=save)
    assert code == 0, said
    consolidate = {"dmc_stage": "consolidate", "pretrained_checkpoint": save, "save": tmp_path / "next"}
    assert train(ADAPTER_FROM_PLAIN, **consolidate)[0] == 0


@pytest.mark.parametrize(
    ("variant", "switches", "words"),
    [
        (ADAPTER, f"--dmc-window-size {SEQUENCE_LENGTH - 1}", "no token of a sequence of 32 leaves it"),
        (DISTILLED, "", "needs a teacher: give --dmc-teacher DIR"),
        (DISTILLED, "--dmc-teacher nowhere", "--dmc-teacher nowhere: no such directory"),
        (ADAPTER, "--dmc-teacher nowhere", "the model itself teaches"),
        (ADAPTER, "--dmc-method dmc", "must be neuron with dmc"),
        (ADAPTER, "--dmc-stage zero_out", "must be retrofit with an adapter"),
        (ADAPTER, "--dmc-train all --dmc-decision-source neuron", "was made with --dmc-decision-source adapter"),
    ],
    ids=["window", "no_teacher", "no_directory", "superfluous", "method", "stage", "source"],
)
def test_layout_bad_input_is_one_message(laboratory, train, variant, switches, words):
    code, said = train(variant, *switches.split(), pretrained_checkpoint=laboratory.base(variant))
    assert code == 1
    assert words in said.splitlines()[-1]
    assert "Traceback" not in said
