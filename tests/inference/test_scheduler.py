"""Who reads next, without a model."""

import random

from megatron_dmc.inference.expectation import Expectation
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.inference.scheduler import Scheduler

MANY = 10**6


def scheduler_of(prefill_tokens=100):
    """For blocks of 4 entries and 2 heads."""
    return Scheduler(Expectation(num_heads=2, block_size=4), prefill_tokens)


def requests(*lengths, max_new_tokens=5):
    return [Request([1] * length, SamplingParams(max_new_tokens=max_new_tokens)) for length in lengths]


def read(batch):
    for request, count in zip(batch.requests, batch.counts, strict=True):
        request.num_read += count
        if not request.num_unread:
            request.receive(7)


def preempt(scheduler, requests):
    for request in requests:
        request.num_read = 0
    scheduler.give_back(requests)


def passes(scheduler, count):
    """Counts of the next passes; there is always room."""
    counts = []
    for _ in range(count):
        batch = scheduler.next(num_free_rows=8, num_free_blocks=MANY)
        counts.append(batch.counts)
        read(batch)
    return counts


def test_prompts_and_one_token_of_each_text_take_turns():
    scheduler = scheduler_of(prefill_tokens=10)
    scheduler.add(requests(4, 6, 1))
    assert passes(scheduler, 5) == [[4, 6], [1, 1], [1], [1, 1, 1], [1, 1, 1]]


def test_a_long_prompt_is_read_in_parts_before_others():
    scheduler = scheduler_of(prefill_tokens=10)
    scheduler.add(requests(25, 3))
    assert passes(scheduler, 6) == [[10], [10], [5], [1], [3], [1, 1]]


def test_texts_go_on_while_a_long_prompt_is_read():
    scheduler = scheduler_of(prefill_tokens=10)
    scheduler.add(requests(3))
    passes(scheduler, 1)
    scheduler.add(requests(25))
    assert passes(scheduler, 6) == [[1], [10], [1], [10], [1], [5]]


def test_rows_limit_admission():
    scheduler = scheduler_of()
    scheduler.add(requests(2, 2, 2))
    assert len(scheduler.next(num_free_rows=2, num_free_blocks=MANY).requests) == 2
    assert len(scheduler.waiting) == 1


def test_who_lost_its_memory_is_first_and_waits_until_somebody_leaves():
    scheduler = scheduler_of()
    first, second, third = requests(2, 2, 2)
    scheduler.add([first, second, third])
    read(scheduler.next(num_free_rows=2, num_free_blocks=MANY))
    preempt(scheduler, [second])
    assert second.num_unread == 3
    assert scheduler.next(num_free_rows=2, num_free_blocks=MANY).requests == [first]
    scheduler.remove(first)
    assert scheduler.next(num_free_rows=2, num_free_blocks=MANY).requests == [second, third]


def test_admission_leaves_room_for_what_runs():
    """Blocks of 4 for 2 heads: a prompt of 8 and 8 more tokens need 8 of them at their end, and 2 stay free."""
    scheduler = scheduler_of()
    scheduler.add(requests(8, 8, 8, max_new_tokens=8))
    read(scheduler.next(num_free_rows=8, num_free_blocks=25))
    assert len(scheduler.running) == 2
    assert scheduler.next(num_free_rows=6, num_free_blocks=17).decodes
    # 8 blocks are held; the running ones are to get 8 more.
    assert scheduler.next(num_free_rows=6, num_free_blocks=17).requests == scheduler.running
    assert scheduler.is_short
    assert len(scheduler.next(num_free_rows=6, num_free_blocks=18).requests) == 1
    assert not scheduler.is_short


def test_what_is_expected_to_survive_counts():
    expectation = Expectation(num_heads=2, block_size=4)
    scheduler = Scheduler(expectation)
    scheduler.add(requests(*[72] * 4, max_new_tokens=8))
    expectation.observe_held(5 * 2, num_tokens=80)
    assert len(scheduler.next(num_free_rows=8, num_free_blocks=40).requests) == 3


def test_who_is_alone_may_try():
    scheduler = scheduler_of()
    scheduler.add(requests(80, 4))
    assert [len(request.prompt) for request in scheduler.next(num_free_rows=8, num_free_blocks=10).requests] == [80]


def test_a_small_request_does_not_overtake_a_large_one():
    scheduler = scheduler_of()
    scheduler.add(requests(4, 400, 4))
    read(scheduler.next(num_free_rows=8, num_free_blocks=60))
    assert len(scheduler.running) == 1
    assert [len(request.prompt) for request in scheduler.waiting] == [400, 4]


def test_samples_wait_for_their_prompt_and_others_do_not():
    scheduler = scheduler_of()
    (first, other) = requests(3, 4)
    group = first.samples(3)
    scheduler.add([*group, other])
    batch = scheduler.next(num_free_rows=8, num_free_blocks=MANY)
    assert batch.requests == [first, other]
    read(batch)
    samples = scheduler.take_samples(first)
    assert samples == group[1:]
    for sample in samples[:1]:
        sample.num_read = 3
        sample.receive(7)
    scheduler.start(samples[:1], first)
    assert scheduler.running == [first, group[1], other]
    assert scheduler.next(num_free_rows=5, num_free_blocks=MANY).requests == scheduler.running
    assert scheduler.next(num_free_rows=5, num_free_blocks=MANY).requests == [group[2]], "found no room and reads alone"


def test_samples_of_a_request_that_is_gone_read_on_their_own():
    scheduler = scheduler_of()
    group = requests(3)[0].samples(3)
    scheduler.add(group)
    scheduler.next(num_free_rows=8, num_free_blocks=MANY)
    scheduler.remove(group[0])
    assert scheduler.next(num_free_rows=8, num_free_blocks=MANY).requests == group[1:]


def test_a_group_takes_the_rows_of_all_its_samples():
    scheduler = scheduler_of()
    first, second = requests(3, 3)
    scheduler.add([*first.samples(3), *second.samples(2)])
    assert scheduler.next(num_free_rows=4, num_free_blocks=MANY).requests == [first]
    scheduler = scheduler_of()
    scheduler.add(requests(3)[0].samples(9))
    assert len(scheduler.next(num_free_rows=4, num_free_blocks=MANY).requests) == 1, "more than rows: some read later"


def test_random_traces_end_every_request():
    draw = random.Random(0)
    for _ in range(50):
        scheduler = scheduler_of(draw.randint(1, 20))
        groups = [one.samples(draw.choice((1, 1, 3))) for one in requests(*draw.choices(range(1, 30), k=8))]
        every = [request for group in groups for request in group]
        scheduler.add(every)
        rows, blocks, forgotten = draw.randint(1, 4), draw.randint(10, 80), []
        for _ in range(5000):
            if not scheduler.is_busy:
                break
            batch = scheduler.next(rows - len(scheduler.running), blocks)
            assert batch.requests
            assert len(scheduler.running) <= rows
            if len(scheduler.running) > 1 and draw.random() < 0.1:
                preempt(scheduler, [scheduler.running[-1]])
                continue
            if draw.random() < 0.02:
                forgotten.append(draw.choice([*scheduler.running, *scheduler.waiting]))
                forgotten[-1].finish_reason = "aborted"
                scheduler.remove(forgotten[-1])
                continue
            read(batch)
            for request in batch.requests:
                if len(request.output) == 1 and request.num_read == len(request.prompt):
                    fork(scheduler, request, rows - len(scheduler.running))
                if request.finish_reason:
                    scheduler.remove(request)
        assert {request.finish_reason for request in every if request not in forgotten} <= {"length"}
        assert all(request.finish_reason for request in every)


def fork(scheduler, source, num_free_rows):
    """What the engine does when a prompt was read."""
    samples = scheduler.take_samples(source)[:num_free_rows]
    for sample in samples:
        sample.num_read = source.num_read
        sample.receive(7)
    scheduler.start(samples, source)
