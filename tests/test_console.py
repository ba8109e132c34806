from __future__ import annotations

import pytest

from redpeft import console
from redpeft.console import Progress, in_words


@pytest.fixture
def clock(monkeypatch):
    time = {"now": 1000.0}
    monkeypatch.setattr(console.time, "monotonic", lambda: time["now"])
    return time


def lines_of(clock, capsys, *, total, seconds, before=0):
    """When lines come of work that takes so many seconds a step: the step and the line."""
    progress, found = Progress(before), []
    for step in range(before + 1, total + 1):
        clock["now"] += seconds
        progress.show("step", step, total, "loss 0.500")
        found += [(step, line) for line in capsys.readouterr().err.splitlines()]
    return found


def test_a_line_every_half_minute(clock, capsys):
    found = lines_of(clock, capsys, total=100, seconds=7)
    assert [step for step, _ in found] == [5, *range(10, 101, 5)]
    assert found[1] == (10, "step 10 of 100, loss 0.500, 11 min left")
    assert found[-1] == (100, "step 100 of 100, loss 0.500, 0 s left")


def test_a_line_for_each_twentieth_of_long_work_and_every_two_minutes_of_very_long_work(clock, capsys):
    steps = [step for step, _ in lines_of(clock, capsys, total=1000, seconds=1)]
    assert steps == [30, *range(80, 1001, 50)]
    steps = [step for step, _ in lines_of(clock, capsys, total=100_000, seconds=1)]
    assert steps == [30, *range(150, 100_001, 120)]


def test_short_work_and_terminals_get_none(clock, capsys, monkeypatch):
    assert lines_of(clock, capsys, total=29, seconds=1) == []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert lines_of(clock, capsys, total=100, seconds=10) == []


def test_what_was_done_before_took_no_time(clock, capsys):
    assert lines_of(clock, capsys, total=1000, seconds=30, before=990)[0] == (
        991,
        "step 991 of 1,000, loss 0.500, 5 min left",
    )


def test_one_process_speaks_for_all(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert lines_of(clock, capsys, total=100, seconds=10) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (59, "59 s"), (61, "2 min"), (3600, "1 h 0 min"), (12000, "3 h 20 min")],
)
def test_durations(seconds, words):
    assert in_words(seconds) == words
