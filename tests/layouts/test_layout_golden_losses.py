"""The recorded losses of the three stages stand still under the pinned versions."""

import pytest

from tests.layouts import golden_losses

TOLERANCE = 1e-4


def test_layout_golden_losses(laboratory):
    found = golden_losses.measure(laboratory, laboratory.path("golden_stages"))
    recorded = golden_losses.read()
    assert [row[:2] for row in found] == [row[:2] for row in recorded]
    for mine, expected in zip(found, recorded, strict=True):
        assert mine[2:] == pytest.approx(expected[2:], abs=TOLERANCE, rel=0), mine[:2]
