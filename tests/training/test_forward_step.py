"""What one micro-batch reports, and where its documents begin."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.training.forward_step import _documents, _loss
from megatron_dmc.training.model.microbatch import Microbatch, Statistics


def test_documents_begin_where_the_padded_lengths_say():
    cu_seqlens = torch.tensor([[0, 3, 8, 8, 8], [0, 8, 8, 8, 8]])
    assert _documents(cu_seqlens, 8) == [[0, 3], [0]]
    assert _documents(None, 8) is None


def test_ratios_are_pairs_that_sum_over_microbatches():
    """Tokens over entries: the mean of (0.5, 0.75) gives 2 / (0.5 + 0.25), not the mean of the ratios."""
    microbatch = Microbatch(
        Geometry(2, 2), target_fraction=0.75, statistics=Statistics(fraction_B=torch.tensor([0.5, 0.75]))
    )
    config = SimpleNamespace(dmc=SimpleNamespace(loss_weight=2.0))
    loss_BS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    total, count, logged = _loss(torch.ones(2, 2), microbatch, config, loss_BS)
    assert (total.item(), count.item()) == (10.0, 4)
    assert logged["lm loss"].tolist() == [10.0, 4.0]
    assert logged["compression loss"].tolist() == [0.5, 2.0]
    assert logged["compression ratio"].tolist() == [2.0, 0.75]
    sums, counts = logged["target ratio"].tolist()
    assert sums / counts == pytest.approx(4.0)


def test_an_uncompressed_stage_reports_its_loss_alone():
    _, _, logged = _loss(torch.ones(1, 2), None, None, torch.ones(1, 2))
    assert logged.keys() == {"lm loss"}
