"""The queue of jobs, and successive halving on it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redpeft.fleet.queue import HalvingGroup, Job, JobQueue
from redpeft.training.recipe import load_recipe


def job(name, **changes):
    return Job(load_recipe(None, {"base": "m", "data": "d", "epochs": 8, **changes}), Path(name))


def work_off(queue, score):
    """Do what the queue says: the epochs after which each job ended, by name."""
    ended = {}
    while job := queue.take():
        name = job.folder.name
        if job.over or job.until == math.inf:
            done = ended[name] if job.over else job.recipe.epochs
            ended[name] = done
            queue.done(job.folder, {"epochs": done})
        else:
            ended[name] = job.until
            queue.paused(job.folder, score(name))
    return ended


def test_jobs_come_in_order_and_results_are_kept():
    queue = JobQueue([job("a"), job("b")])
    assert (queue.left(), queue.ready()) == (2, 2)
    first = queue.take()
    assert (first.folder, first.until, first.over) == (Path("a"), math.inf, False)
    queue.done(first.folder, {"score": 1})
    assert queue.results == {Path("a"): {"score": 1}}
    assert queue.left() == 1
    assert queue.take().folder == Path("b")
    assert queue.take() is None
    assert queue.left() == 1


def test_what_a_lost_worker_had_is_given_back_and_comes_first():
    queue = JobQueue([job(name) for name in "abcde"])
    for worker in (1, 1, 2, 1):
        queue.take(worker)
    queue.done(Path("a"), {})
    queue.give_back(1)
    assert [queue.take(3).folder.name for _ in range(3)] == ["b", "d", "e"]
    queue.give_back(1)
    assert queue.take(1) is None


def test_the_better_half_goes_on_at_each_rung():
    names = "abcdefgh"
    queue = JobQueue([job(name) for name in names], dict.fromkeys(map(Path, names), "group"))
    assert work_off(queue, ord) == {"h": 8, "g": 4, "f": 2, "e": 2, "d": 1, "c": 1, "b": 1, "a": 1}
    assert queue.left() == 0


def test_groups_do_not_compete_and_others_run_whole():
    groups = {Path("a"): 1, Path("b"): 1, Path("c"): 2, Path("d"): 2}
    queue = JobQueue([job(name) for name in "abcde"], groups)
    assert work_off(queue, ord) == {"a": 4, "b": 8, "c": 4, "d": 8, "e": 8}


def test_one_that_fails_is_not_waited_for():
    queue = JobQueue([job(name) for name in "abc"], dict.fromkeys(map(Path, "abc"), "group"))
    taken = [queue.take() for _ in range(3)]
    queue.paused(taken[0].folder, 1.0)
    queue.paused(taken[1].folder, 2.0)
    assert queue.take() is None
    queue.done(taken[2].folder, {"error": "the loss is not finite"})
    assert [(a.folder.name, a.until, a.over) for a in (queue.take(), queue.take())] == [
        ("b", 4, False),
        ("a", 4, False),
    ]


def test_what_ended_before_an_interruption_counts_as_halved():
    """Eight began, four were ended at the first rung; after a restart none of the other four is ended there again."""
    names = "abcdefgh"
    queue = JobQueue([job(name) for name in names], dict.fromkeys(map(Path, names), "group"))
    for name in names[:4]:
        queue.take()
        queue.done(Path(name), {"epochs": 1})
    assert work_off(queue, ord) == {"h": 8, "g": 4, "f": 2, "e": 2}


@pytest.mark.parametrize(
    ("jobs", "epochs", "rungs"), [(2, 8, [4]), (8, 5, [1, 2]), (4, 1, []), (1, 9, []), (5, 2, [1])]
)
def test_rungs_are_whole_epochs(jobs, epochs, rungs):
    group = HalvingGroup({Path(str(number)): job("x", epochs=epochs).recipe for number in range(jobs)})
    assert group.rungs == [*rungs, math.inf]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.integers(1, 12))
def test_the_best_always_comes_to_the_end(scores, epochs):
    names = [str(number) for number in range(len(scores))]
    queue = JobQueue([job(name, epochs=epochs) for name in names], dict.fromkeys(map(Path, names), "all"))
    ended = work_off(queue, lambda name: scores[int(name)])
    best = max(range(len(scores)), key=scores.__getitem__)
    assert ended[str(best)] == epochs
    assert queue.results.keys() == {Path(name) for name in names}


@pytest.fixture
def group_of(tmp_path):
    """A queue of one group of so many jobs of 8 epochs; those named have finished before."""

    def make(count, finished=()):
        for name in finished:
            (tmp_path / name).mkdir()
            (tmp_path / name / "result.json").write_text("{}")
        jobs = [job(tmp_path / f"{n}") for n in range(count)]
        return JobQueue(jobs, {each.folder: "group" for each in jobs})

    return make


def pauses(queue, finished=()):
    """Work a queue off; the score of a job is its number. The epochs at which each pauses or ends."""
    log: dict[str, list[float]] = {}
    while job := queue.take():
        name = job.folder.name
        if name in finished:
            queue.done(job.folder, {})
            continue
        if job.over or job.until == math.inf:
            log.setdefault(name, []).append(math.inf if not job.over else -1)
            queue.done(job.folder, {})
        else:
            log.setdefault(name, []).append(job.until)
            queue.paused(job.folder, float(Path(name).name))
    assert queue.left() == 0
    return log


def test_after_an_interrupt_no_rung_is_decided_twice(group_of):
    """Jobs 0 and 1 were stopped at the first rung and have their results: the others are compared at the second."""
    assert pauses(group_of(4, finished=["0", "1"]), {"0", "1"}) == {"2": [4, -1], "3": [4, math.inf]}


def test_the_winner_goes_on_alone_after_an_interrupt(group_of):
    assert pauses(group_of(4, finished=["0", "1", "2"]), {"0", "1", "2"}) == {"3": [math.inf]}


def test_a_group_that_is_done_stays_so(group_of):
    assert pauses(group_of(2, finished=["0", "1"]), {"0", "1"}) == {}
