"""Flags come from the settings, once."""

import argparse
import dataclasses

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.training.arguments import (
    add_dmc_arguments,
    dmc_config_from_args,
    with_defaults,
)


def parse(*argv: str) -> DMCConfig:
    return dmc_config_from_args(add_dmc_arguments(argparse.ArgumentParser()).parse_args(argv))


def test_every_setting_has_a_flag_with_its_default():
    assert parse() == DMCConfig()


def test_flags_set_their_settings():
    assert parse("--dmc-stage", "zero_out", "--dmc-window-size", "12", "--dmc-stop-at-cr", "3") == DMCConfig(
        stage="zero_out", window_size=12, stop_at_cr=3.0
    )


def test_every_flag_has_help_with_its_source():
    help_text = " ".join(add_dmc_arguments(argparse.ArgumentParser()).format_help().split())
    for field in dataclasses.fields(DMCConfig):
        assert field.metadata["help"].split(";")[0][:40] in help_text
    assert help_text.count("source:") == len(dataclasses.fields(DMCConfig))


@pytest.mark.parametrize(
    ("flag", "value"), [("--dmc-target-cr", "0.5"), ("--dmc-window-size", "-2"), ("--dmc-temperature", "0")]
)
def test_a_value_out_of_range_names_itself(flag, value):
    with pytest.raises(ValueError, match=flag[2:].replace("-", "_")):
        parse(flag, value)


def test_the_window_is_the_methods_own_where_none_is_given():
    assert (parse().window_size, parse("--dmc-method", "dms").window_size) == (0, 256)
    assert parse("--dmc-method", "dms", "--dmc-window-size", "0").window_size == 0


@pytest.mark.parametrize(
    "flags",
    [
        ("--dmc-decision-source", "adapter"),
        ("--dmc-decided-by", "next"),
        ("--dmc-method", "dms", "--dmc-decisions-per", "layer"),
        ("--dmc-method", "dms", "--dmc-train", "decisions"),
    ],
)
def test_settings_that_exclude_each_other_are_named(flags):
    with pytest.raises(ValueError, match=flags[-2][2:].replace("-", "_")):
        parse(*flags)


def test_defaults_yield_to_flags_that_are_given():
    assert with_defaults(["--lr", "1"], {"--lr": "2", "--swiglu": None}, {"--seed": "3"}) == [
        "--swiglu",
        "--seed",
        "3",
        "--lr",
        "1",
    ]
