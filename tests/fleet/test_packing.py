from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from redpeft.fleet.adamw import Rates
from redpeft.fleet.job import Work
from redpeft.fleet.packing import pack

RATES = Rates(0.1, 0.1)


def work(rows, length, training=True):
    return Work([{"input_ids": [1] * length}] * rows, RATES if training else None)


def test_batches_of_like_length_go_together():
    waiting = {0: work(4, 10), 1: work(4, 60), 2: work(4, 12), 3: work(4, 9), 4: work(4, 11)}
    assert pack(waiting, tokens=200) == [0, 3, 4, 2]
    assert pack(waiting, tokens=100) == [0, 3]
    assert pack({1: waiting[1], **waiting}, tokens=200) == [1]


def test_learning_and_scoring_do_not_mix():
    waiting = {5: work(2, 8, training=False), 6: work(2, 8), 7: work(2, 8, training=False)}
    assert pack(waiting, tokens=10**6) == [5, 7]


def test_a_batch_that_is_too_long_goes_alone():
    assert pack({3: work(8, 500), 1: work(1, 499)}, tokens=64) == [3]


works = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 80), st.booleans()), min_size=1, max_size=12)


@given(works=works, tokens=st.integers(1, 2000))
def test_everyone_has_a_turn_and_no_pass_is_too_large(works, tokens):
    waiting = {slot: work(*each) for slot, each in enumerate(works)}
    passes = 0
    while waiting:
        chosen = pack(waiting, tokens)
        assert chosen[0] == next(iter(waiting))
        assert len({waiting[slot].rates for slot in chosen}) == 1
        rows = sum(len(waiting[slot].rows) for slot in chosen)
        assert len(chosen) == 1 or rows * max(waiting[slot].length for slot in chosen) <= tokens
        for slot in chosen:
            del waiting[slot]
        passes += 1
    assert passes <= len(works)
