"""Stages follow each other in one order."""

import pytest

from megatron_dmc.stages import check_start, clears_borrowed_rows

ORDER = ["off", "zero_out", "retrofit", "consolidate"]


@pytest.mark.parametrize("before", ORDER)
@pytest.mark.parametrize("stage", ORDER[1:])
def test_a_stage_starts_only_from_the_one_before_it(stage, before):
    if ORDER.index(before) == ORDER.index(stage) - 1:
        check_start(stage, before, "BASE")
    else:
        with pytest.raises(ValueError, match=f"{stage} was started from BASE, a checkpoint of stage {before}"):
            check_start(stage, before, "BASE")


def test_only_retrofit_clears_the_borrowed_rows():
    assert [stage for stage in ORDER if clears_borrowed_rows(stage, "zero_out")] == ["retrofit"]
