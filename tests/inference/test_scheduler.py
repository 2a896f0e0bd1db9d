"""Who reads next, without a model."""

import random

from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.inference.scheduler import Scheduler


def requests(*lengths):
    return [Request([1] * length, SamplingParams(max_new_tokens=5)) for length in lengths]


def read(batch):
    for request, count in zip(batch.requests, batch.counts, strict=True):
        request.num_read += count
        if not request.num_unread:
            request.receive(7)


def test_prompts_first_then_one_token_of_each():
    scheduler = Scheduler(prefill_tokens=10)
    scheduler.add(requests(4, 6, 1))
    first = scheduler.next(num_free_rows=8)
    assert first.counts == [4, 6]
    read(first)
    second = scheduler.next(num_free_rows=6)
    assert second.counts == [1]
    read(second)
    assert scheduler.next(num_free_rows=5).counts == [1, 1, 1]


def test_a_long_prompt_is_read_in_parts_before_others():
    scheduler = Scheduler(prefill_tokens=10)
    scheduler.add(requests(25, 3))
    counts = []
    for _ in range(4):
        batch = scheduler.next(num_free_rows=2)
        counts.append(batch.counts)
        read(batch)
    assert counts == [[10], [10], [5], [3]]
    assert scheduler.next(num_free_rows=0).counts == [1, 1]


def test_rows_limit_admission():
    scheduler = Scheduler()
    scheduler.add(requests(2, 2, 2))
    assert len(scheduler.next(num_free_rows=2).requests) == 2
    assert len(scheduler.waiting) == 1


def test_who_lost_its_memory_is_first_and_waits_until_somebody_leaves():
    scheduler = Scheduler()
    first, second, third = requests(2, 2, 2)
    scheduler.add([first, second, third])
    read(scheduler.next(num_free_rows=2))
    scheduler.give_back([second])
    assert second.num_unread == 3
    assert scheduler.next(num_free_rows=2).requests == [first]
    scheduler.remove(first)
    assert scheduler.next(num_free_rows=2).requests == [second, third]


def test_random_traces_end_every_request():
    draw = random.Random(0)
    for _ in range(50):
        scheduler = Scheduler(prefill_tokens=draw.randint(1, 20))
        all_requests = requests(*(draw.randint(1, 30) for _ in range(draw.randint(1, 12))))
        scheduler.add(all_requests)
        rows = draw.randint(1, 4)
        for _ in range(5000):
            if not scheduler.is_busy:
                break
            batch = scheduler.next(rows - len(scheduler.running))
            assert batch.requests
            assert len(scheduler.running) <= rows
            if len(scheduler.running) > 1 and draw.random() < 0.1:
                scheduler.give_back([scheduler.running[-1]])
                continue
            read(batch)
            for request in batch.requests:
                if request.finish_reason:
                    scheduler.remove(request)
        assert {request.finish_reason for request in all_requests} == {"length"}
