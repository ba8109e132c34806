"""How far many jobs are: counted from the events of `train_fleets`, shown as a live table on a terminal, elsewhere as
a line for each job that ends."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from redpeft.console import Progress, counted, log_main, no_bars
from redpeft.fleet.queue import Report
from redpeft.runs.pages import number
from redpeft.tasks.base import LOWER_IS_BETTER

REFRESH = 2  # times a second
WINDOW = 5.0  # seconds over which the speed is measured


@dataclass
class JobProgress:
    """Counts of jobs and rows; called with each event.

    `names` are those of all jobs by their absolute folders. `competing`: whether one of them can be the best.
    """

    names: Mapping[Path, str]
    competing: bool = False
    running: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # why
    scores: dict[str, tuple[str, float]] = field(default_factory=dict)  # metric and best score so far
    rows: int = 0  # trained or scored
    steps: int = 0  # of training
    planned: dict[str, int] = field(default_factory=dict)  # steps of the jobs that have started
    fleet: dict[str, Any] = field(default_factory=dict)  # slots, tokens and plan of the last one
    began: float = field(default_factory=time.monotonic)
    _passes: deque[tuple[float, int]] = field(default_factory=deque)

    def __call__(self, event: Mapping[str, Any]) -> None:
        name = self.name_of(event)
        match event["event"]:
            case "fleet":
                self.fleet = {key: event[key] for key in ("slots", "tokens", "plan")}
            case "pass":
                self.rows += event["rows"]
                self.steps += event["steps"]
                self._passes.append((time.monotonic(), event["rows"]))
            case "started":
                self.running.add(name)
                self.failed.pop(name, None)  # in a fleet; now it is trained alone
                self.planned.setdefault(name, event.get("steps", 0))
            case "epoch":
                self._score(name, event["metric"], event[f"eval_{event['metric']}"])
            case "paused" | "finished" | "failed" as end:
                self.running.discard(name)
                if end == "finished":
                    self.finished.add(name)
                    self._score(name, event["metric"], event["validation"][event["metric"]])
                elif end == "failed":
                    self.failed[name] = event["error"]

    def name_of(self, event: Mapping[str, Any]) -> str:
        """Of the job that an event is about; empty where it is about none."""
        folder = event.get("folder")
        return self.names.get(Path(folder).resolve(), "") if folder else ""

    @property
    def waiting(self) -> int:
        return len(self.names) - len(self.running) - len(self.finished) - len(self.failed)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def expected_steps(self) -> int:
        """Of all jobs, if those that wait are as long as those that have started."""
        known = sum(self.planned.values())
        return known + known * self.waiting // max(1, len(self.planned))

    def best(self) -> tuple[str, str, float] | None:
        """The best job, its metric and its best score so far; None where jobs cannot be compared."""
        if not self.competing or len({metric for metric, _ in self.scores.values()}) != 1:
            return None
        name = max(self.scores, key=lambda name: sort_score(*self.scores[name]))
        return name, *self.scores[name]

    def rows_a_second(self) -> float:
        """Over the last seconds."""
        now = time.monotonic()
        while self._passes and self._passes[0][0] < now - WINDOW:
            self._passes.popleft()
        return sum(rows for _, rows in self._passes) / min(WINDOW, max(now - self.began, 1e-3))

    def _score(self, name: str, metric: str, score: float | None) -> None:
        if score is None:
            return
        if name not in self.scores or sort_score(metric, score) > sort_score(*self.scores[name]):
            self.scores[name] = metric, score


def sort_score(metric: str, score: float) -> float:
    """A number that is larger for a better score."""
    return -score if metric in LOWER_IS_BETTER else score


@contextmanager
def showing(progress: JobProgress, live: bool, before: Collection[str] = ()) -> Iterator[Report]:
    """Gives a function to call with each event, after `progress`. `live` asks for the table, where standard error is a
    terminal; jobs that were done `before` get no line."""
    noted: set[str] = set()  # notes on rows, which many jobs may share
    lines = Progress()

    def log(event: Mapping[str, Any]) -> None:
        for note in event.get("notes", ()):
            if note not in noted:
                log_main(note)
                noted.add(note)
        if text := event_line(progress, event, before):
            log_main(text)
        if event["event"] == "pass":
            counts = [
                f"{len(progress.finished)} of {len(progress.names)} jobs done",
                f"{len(progress.running)} running",
            ]
            if best := best_line(progress):
                counts.append(f"best {best}")
            lines.show("step", progress.steps, progress.expected_steps, *counts)

    if not (live and sys.stderr.isatty()):
        yield log
        return
    console = Console(stderr=True)
    with no_bars(), Live(get_renderable=lambda: progress_table(progress), console=console, refresh_per_second=REFRESH):
        yield lambda event: log(event) if event["event"] in ("fleet", "started", "failed") else None


@contextmanager
def logging_once() -> Iterator[None]:
    """While inside, a log message on data that comes with each job is shown for the first job alone."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        new = record.msg not in seen
        seen.add(record.msg)
        return new

    # a filter acts on what its own logger is given, not on that of the loggers below it
    loggers = [logging.getLogger(f"redpeft.tasks.{module}") for module in ("data", "rows")]
    for logger in loggers:
        logger.addFilter(is_new)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_new)


def event_line(progress: JobProgress, event: Mapping[str, Any], before: Collection[str] = ()) -> str | None:
    """The line of a log on an event, if it gets one."""
    name = progress.name_of(event)
    ended = f"{len(progress.finished) + len(progress.failed)} of {len(progress.names)}"
    match event["event"]:
        case "fleet":
            slots, tokens = counted(event["slots"], "slot"), counted(event["tokens"], "token")
            return f"a fleet of {slots}, passes of {tokens}: {event['plan']}"
        case "finished" if name not in before:
            metric, splits = event["metric"], [split for split in ("validation", "test") if event[split]]
            scores = ", ".join(f"{split} {number(event[split].get(metric), 4)}" for split in splits)
            return f"{ended}: {name}: {metric} on {scores}"
        case "failed":
            return f"{ended}: {name}: failed: {event['error']}"
    return None


def progress_table(progress: JobProgress) -> Table:
    """The counts of this moment, in one row."""
    seconds = int(progress.seconds)
    cells = {
        "jobs": str(len(progress.names)),
        "done": str(len(progress.finished)),
        "running": str(len(progress.running)),
        "waiting": str(progress.waiting),
        "failed": str(len(progress.failed)),
        "best so far": best_line(progress),
        "examples a second": f"{progress.rows_a_second():,.0f}",
        "GPU memory" if torch.cuda.is_available() else "memory": f"{memory() / 2**30:.1f} GiB",
        "time": f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}",
    }
    shown = {name: cell for name, cell in cells.items() if cell is not None}
    table = Table(*shown)
    table.add_row(*shown.values())
    return table


def best_line(progress: JobProgress) -> str | None:
    """The best score so far, and the job that has it; None where jobs cannot be compared."""
    best = progress.best()
    return f"{best[1]} {best[2]:.4f} ({best[0]})" if best else None


def memory() -> int:
    """Bytes that this process holds, on the GPU where there is one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
