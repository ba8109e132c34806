"""Groups of which the better half goes on, and what an interrupt leaves of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from redpeft.runs.queue import Job, JobQueue
from redpeft.training.recipe import load_recipe


@pytest.fixture
def queue(tmp_path):
    """A queue of one group of so many jobs of 8 epochs; those named have finished before."""

    def make(count, finished=()):
        for name in finished:
            (tmp_path / name).mkdir()
            (tmp_path / name / "result.json").write_text("{}")
        jobs = [
            Job(load_recipe(None, {"base": "m", "data": "d", "epochs": 8}), tmp_path / f"{n}") for n in range(count)
        ]
        return JobQueue(jobs, {job.folder: "group" for job in jobs})

    return make


def run(queue, finished=()):
    """Work a queue off; the score of a job is its number. The epochs at which each pauses or ends."""
    log: dict[str, list[float]] = {}
    while assignment := queue.take():
        name = assignment.folder.name
        if name in finished:
            queue.done(assignment.folder, {})
            continue
        if assignment.over or assignment.until == math.inf:
            log.setdefault(name, []).append(math.inf if not assignment.over else -1)
            queue.done(assignment.folder, {})
        else:
            log.setdefault(name, []).append(assignment.until)
            queue.paused(assignment.folder, float(Path(name).name))
    assert queue.left() == 0
    return log


def test_the_better_half_goes_on_at_each_rung(queue):
    stopped = -1
    assert run(queue(4)) == {
        "0": [2, stopped],
        "1": [2, stopped],
        "2": [2, 4, stopped],
        "3": [2, 4, math.inf],
    }


def test_after_an_interrupt_no_rung_is_decided_twice(queue):
    """Jobs 0 and 1 were stopped at the first rung and have their results: the others are compared at the second."""
    assert run(queue(4, finished=["0", "1"]), {"0", "1"}) == {"2": [4, -1], "3": [4, math.inf]}


def test_the_winner_goes_on_alone_after_an_interrupt(queue):
    assert run(queue(4, finished=["0", "1", "2"]), {"0", "1", "2"}) == {"3": [math.inf]}


def test_a_group_that_is_done_stays_so(queue):
    assert run(queue(2, finished=["0", "1"]), {"0", "1"}) == {}
