from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from redpeft import console
from redpeft.runs import progress
from redpeft.runs.progress import JobProgress, event_line, logging_once, progress_table, showing

NAMES = {Path(f"runs/{name}").resolve(): name for name in ("a", "b", "c", "d")}
PLAN = {"event": "fleet", "slots": 4, "tokens": 64, "plan": "a slot takes 1 MiB", "slot": 1}


def epoch(name, score, metric="accuracy"):
    return {"event": "epoch", "folder": f"runs/{name}", "metric": metric, f"eval_{metric}": score, "epoch": 1.0}


def done(name, score, metric="accuracy", test=None):
    scores = {"validation": {metric: score}, "test": test and {metric: test}}
    return {"event": "finished", "folder": f"runs/{name}", "metric": metric, **scores}


def failed(name):
    return {"event": "failed", "folder": f"runs/{name}", "error": "the loss is not finite"}


def progress_of(*events, competing=True):
    found = JobProgress(NAMES, competing)
    for event in events:
        found(event)
    return found


def started(*names):
    return [{"event": "started", "folder": f"runs/{name}"} for name in names]


def test_jobs_are_counted_where_they_stand():
    found = progress_of(*started("a", "b", "c"), {"event": "paused", "folder": "runs/c", "epoch": 1.0})
    assert (found.running, found.waiting, len(found.finished)) == ({"a", "b"}, 2, 0)
    for event in [*started("c"), failed("b"), done("a", 0.5), done("d", 0.5)]:  # d was done before
        found(event)
    assert (found.running, found.waiting, found.finished) == ({"c"}, 0, {"a", "d"})
    assert found.failed == {"b": "the loss is not finite"}


@pytest.mark.parametrize(("metric", "best"), [("accuracy", ("b", 0.8)), ("loss", ("a", 0.2)), ("mse", ("a", 0.2))])
def test_the_best_so_far_goes_by_the_metric(metric, best):
    events = [epoch("a", 0.3, metric), epoch("b", 0.8, metric), epoch("b", 0.7, metric), done("a", 0.2, metric)]
    name, found, score = progress_of(*events).best()
    assert (name, found) == (best[0], metric)
    assert score == best[1]


def test_there_is_no_best_of_jobs_that_do_not_compete_or_have_several_metrics():
    assert progress_of(epoch("a", 0.3), competing=False).best() is None
    assert progress_of(epoch("a", 0.3), epoch("b", 0.8, "loss")).best() is None
    assert progress_of(epoch("a", None)).best() is None


def test_speed_is_that_of_the_last_seconds(monkeypatch):
    clock = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    found = JobProgress(NAMES, began=100.0)
    for clock["now"] in (101.0, 102.0):
        found({"event": "pass", "rows": 30, "steps": 1, "seconds": 1.0})
    assert found.rows_a_second() == 30.0
    clock["now"] = 106.5
    assert found.rows_a_second() == 30 / progress.WINDOW
    assert (found.rows, found.seconds) == (60, 6.5)


def test_a_log_has_the_plan_and_a_line_for_each_job_that_ends():
    found = progress_of(PLAN, *started("a", "b"), failed("b"), done("a", 0.75, test=0.5))
    assert event_line(found, PLAN) == "a fleet of 4 slots, passes of 64 tokens: a slot takes 1 MiB"
    assert event_line(found, done("a", 0.75, test=0.5)) == "2 of 4: a: accuracy on validation 0.7500, test 0.5000"
    assert event_line(found, failed("b")) == "2 of 4: b: failed: the loss is not finite"
    assert event_line(found, done("a", 0.75), before={"a"}) is None
    assert event_line(found, epoch("a", 0.75)) is None


def shown(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_the_table_has_counts_speed_and_memory(monkeypatch):
    monkeypatch.setattr(progress, "memory", lambda: 3 * 2**29)
    text = shown(progress_table(progress_of(*started("a", "b"), epoch("b", 0.8), failed("a"))))
    head, row = [line for line in text.splitlines() if "job" in line or "GiB" in line]
    assert [cell.strip() for cell in head.strip("┃").split("┃")][:6] == [
        "jobs", "done", "running", "waiting", "failed", "best so far",
    ]  # fmt: skip
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "4", "0", "1", "2", "1", "accuracy 0.8000 (b)", "0", "1.5 GiB", "0:00:00",
    ]  # fmt: skip
    assert "best so far" not in shown(progress_table(progress_of(competing=False)))


def test_a_terminal_gets_the_live_table_and_a_file_lines(monkeypatch, capsys):
    found = progress_of()
    with showing(found, live=True) as show:
        for event in (PLAN, *started("a"), done("a", 0.5)):
            found(event)
            show(event)
    assert capsys.readouterr().err.splitlines() == [
        "a fleet of 4 slots, passes of 64 tokens: a slot takes 1 MiB",
        "1 of 4: a: accuracy on validation 0.5000",
    ]

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    found = progress_of()
    with showing(found, live=True) as show:
        for event in (PLAN, *started("a"), failed("b"), done("a", 0.5)):
            found(event)
            show(event)
    text = terminal.getvalue()
    assert "a slot takes 1 MiB" in text
    assert "b: failed: the loss is not finite" in text
    assert "examples a second" in text
    assert "1 of 4: a" not in text


def test_a_log_has_lines_of_progress_and_what_was_cut_once(monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS", 0.0)
    monkeypatch.setattr(console, "SHARE", 0.0)
    found = progress_of()
    note = "train.csv: 3 of 9 rows (33.3 %) are longer than max_length 8 and are cut"
    with showing(found, live=True) as show:
        for name in ("a", "b"):
            started = {"event": "started", "folder": f"runs/{name}", "steps": 10, "notes": [note]}
            for event in (started, epoch(name, 0.5), {"event": "pass", "rows": 8, "steps": 2, "seconds": 0.1}):
                found(event)
                show(event)
        for event in (done("b", 0.75), {"event": "pass", "rows": 8, "steps": 1, "seconds": 0.1}):
            found(event)
            show(event)
    lines = [re.sub(r"\d+ s left", "1 s left", line) for line in capsys.readouterr().err.splitlines()]
    best = "best accuracy 0.5000 (a)"
    assert lines == [
        note,
        f"step 2 of 40, 0 of 4 jobs done, 1 running, {best}, 1 s left",
        f"step 4 of 40, 0 of 4 jobs done, 2 running, {best}, 1 s left",
        "1 of 4: b: accuracy on validation 0.7500",
        "step 5 of 40, 1 of 4 jobs done, 1 running, best accuracy 0.7500 (b), 1 s left",
    ]


@pytest.mark.parametrize("module", ["data", "rows"])
def test_what_is_said_of_each_jobs_data_is_said_once(caplog, module):
    logger = logging.getLogger(f"redpeft.tasks.{module}")
    with logging_once():
        for name in ("a", "b"):
            logger.warning("no validation split in %s", name)
        logger.warning("something else in %s", "b")
    logger.warning("no validation split in %s", "c")
    assert caplog.messages == ["no validation split in a", "something else in b", "no validation split in c"]
