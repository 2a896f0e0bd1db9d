"""Stage ``off`` on a CPU: torch's kernel where it computes what Megatron's attention does, and nowhere else."""

import numpy as np
import pytest
import torch

from tests.layouts.ranks import run_ranks
from tests.seam.megatron_attention import answers
from tests.tolerances import GRADIENT, GRADIENT_FLOOR, OUTPUT, gradient_error, output_error


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", {}), ("bfloat16", {"bf16": True, "params_dtype": torch.bfloat16, "attention_softmax_in_fp32": True})],
)
def test_the_kernel_gives_megatrons_output_and_gradients(tmp_path, dtype, settings):
    found = run_ranks(answers, 1, tmp_path, dtype, settings)[0]
    assert found["called"]
    ours, theirs = ([torch.from_numpy(x) for x in found[name]] for name in ("adapted", "original"))
    tolerance = getattr(torch, dtype)
    assert output_error(ours[0], theirs[0]) <= OUTPUT[tolerance]
    for mine, expected in zip(ours[1:], theirs[1:], strict=True):
        assert gradient_error(mine, expected, GRADIENT_FLOOR) <= GRADIENT[tolerance]


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({}, {"with_mask": True}),
        ({}, {"kind": "no_mask"}),
        ({"attention_dropout": 0.5}, {}),
        ({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, {}),
        ({"window_size": (4, 0)}, {}),
        ({"softmax_type": "off-by-one"}, {}),
    ],
)
def test_what_the_kernel_does_not_compute_is_left_to_megatron(tmp_path, settings, others):
    found = run_ranks(answers, 1, tmp_path, "float32", settings, **others)[0]
    assert not found["called"]
    for mine, expected in zip(found["adapted"], found["original"], strict=True):
        np.testing.assert_array_equal(mine, expected)
