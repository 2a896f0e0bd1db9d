"""What requests are expected to need."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dmc.inference.expectation import Expectation, ExpectedText, most_blocks
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams


def request(length, max_new_tokens=8, num_written=0, num_read=0):
    made = Request([1] * length, SamplingParams(max_new_tokens=max_new_tokens))
    made.output, made.num_read = [2] * num_written, num_read
    return made


def at_end(expectation, request):
    text = expectation.text(request)
    return text.at_once + text.later


def test_at_first_nothing_is_merged_and_texts_get_their_full_length():
    expectation = Expectation(num_heads=6, block_size=4)
    assert expectation.blocks(0) == 0
    assert expectation.blocks(9) == 6 * 3
    assert expectation.text(request(10, max_new_tokens=5)) == (5, 6 * 3, 6, 6 * 3)
    assert expectation.text(request(10, max_new_tokens=5, num_read=5)) == (5, 6, 6, 6 * 3)
    assert expectation.text(request(10, max_new_tokens=5, num_read=12, num_written=3)) == (2, 6, 0, 6 * 4)


def test_what_texts_held_and_wrote_is_expected_of_others():
    expectation = Expectation(num_heads=6, block_size=4)
    for _ in range(200):
        expectation.observe_held(6 * 10, num_tokens=80)
        expectation.observe_written(request(10, max_new_tokens=100, num_written=20))
    assert expectation.blocks(80) == 6 * 10
    assert expectation.text(request(60, max_new_tokens=100)) == (20, 45, 15, 45)
    assert at_end(expectation, request(60, max_new_tokens=100, num_written=60, num_read=119)) < 6, "a token"
    assert expectation.blocks(1) == 6, "every head has a block"


def test_the_latest_count_most():
    expectation = Expectation(num_heads=1, block_size=1)
    for _ in range(50):
        expectation.observe_held(10, num_tokens=100)
    for _ in range(50):
        expectation.observe_held(50, num_tokens=100)
    assert expectation.blocks(1000) == pytest.approx(500, rel=0.1)
    expectation.forget()
    assert expectation.blocks(1000) == 1000


def test_what_cannot_be_read_again_is_expected_by_the_most_that_it_keeps():
    expectation = Expectation(num_heads=6, block_size=4, most_entries=lambda count: min(count, 16), learns=False)
    for _ in range(10):
        expectation.observe_held(6, num_tokens=80)
        expectation.observe_written(request(10, max_new_tokens=100, num_written=1))
    assert expectation.blocks(80) == 6 * 4
    assert expectation.text(request(10, max_new_tokens=100)) == (100, 6 * 4, 0, 6 * 4)
    assert expectation.blocks(9) == 6 * 3


def test_more_samples_share_the_prompt_but_its_last_blocks():
    sample = request(40, max_new_tokens=8)
    expectation = Expectation(num_heads=6, block_size=4)
    assert expectation.text(sample) == (8, 6 * 10, 6 * 2, 6 * 10)
    assert expectation.sample(sample) == (8, 6, 6 * 2, 6)
    assert Expectation(num_heads=6, block_size=4, shares=False).sample(sample) == (8, 60, 12, 60)


@given(
    st.lists(
        st.builds(ExpectedText, st.integers(1, 12), st.integers(0, 9), st.integers(0, 12), st.integers(0, 20)),
        max_size=6,
    )
)
def test_the_most_is_that_of_a_run_step_by_step(texts):
    texts = [text._replace(held=max(text.held, text.at_once)) for text in texts]
    most = 0.0
    for step in range(max((text.num_steps for text in texts), default=0) + 1):
        needed = sum(
            text.at_once + text.later * step / text.num_steps if step <= text.num_steps else text.at_once - text.held
            for text in texts
        )
        most = max(most, needed)
    assert most_blocks(texts) == pytest.approx(most)
