"""``--dmc-stage off`` is Megatron's own run of the same command, bit for bit."""

import numpy as np
import pytest

from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from tests.layouts import stock
from tests.layouts.cases import OFF

STEPS = 3


@pytest.fixture(scope="module")
def runs(laboratory):
    """Run and directory of its checkpoint, ours and Megatron's."""
    made = {}
    for name, function in (("ours", stock.train_off), ("stock", stock.train_stock)):
        save = laboratory.path(f"off_{name}")
        argv = laboratory.arguments(OFF, train_iters=STEPS, save=save, dmc_total_samples=None)
        made[name] = laboratory.run(function, 1, argv)[0], save
    return made


def test_layout_off_logits_and_losses(runs):
    ours, theirs = runs["ours"][0], runs["stock"][0]
    assert len(ours.logits) == len(theirs.logits) == STEPS * 4
    for mine, stocks in zip(ours.logits, theirs.logits, strict=True):
        np.testing.assert_array_equal(mine, stocks)


def test_layout_off_gradients(runs):
    ours, theirs = runs["ours"][0].run.gradients, runs["stock"][0].run.gradients
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)
        assert np.isfinite(expected).all()


def test_layout_off_checkpoint(runs):
    ours, theirs = (TorchDistCheckpoint(runs[name][1] / f"iter_{STEPS:07d}") for name in ("ours", "stock"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert len(ours.tensors) > 20
    for name in theirs.tensors:
        assert ours.read(name).equal(theirs.read(name)), name
    assert ours.common_state().keys() == theirs.common_state().keys()
