"""A tensor that is sent to the next stage arrives whole, though its memory is given up right after the call.

On a GPU the order of the stream protects it. On the CPU gloo's threads read it until the send has been waited for.
"""

import pytest

from tests.layouts.pipeline_sends import send_and_give_up


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "single"])
def test_layout_sends_arrive_whole(laboratory, batched):
    assert laboratory.run(send_and_give_up, 2, batched) == [0, 0]
