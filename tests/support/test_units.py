"""Bytes and durations in words, and back."""

import pytest

from megatron_dmc.support.units import amount, binary_bytes, byte_count, duration


def test_durations():
    words = [duration(seconds) for seconds in (0.4, 59, 65, 3599, 7800)]
    assert words == ["0 s", "59 s", "1 min 05 s", "59 min 59 s", "2 h 10 min"]


def test_amounts():
    assert [amount(12, "steps"), amount(1500, "B"), amount(2.5e9, "B")] == ["12 steps", "1.5 kB", "2.5 GB"]
    assert [binary_bytes(count) for count in (512, 1536, 3 << 30)] == ["512 B", "1.5 KiB", "3.0 GiB"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("1000", 1000), ("2k", 2000), ("1.5G", 1_500_000_000), ("6GiB", 6 << 30), ("500MB", 500_000_000)],
)
def test_a_number_of_bytes(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1", "1 TB", "3X"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ValueError, match="is not a number of bytes: 8G, 6GiB, 500M"):
        byte_count(text)
