"""Shows how far a batch of jobs is: a live table on a terminal, elsewhere a line for each job that ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from redpeft.console import Progress, counted, log_main
from redpeft.fleet.queue import Report
from redpeft.runs.pages import number
from redpeft.runs.tally import Tally
from redpeft.training.callbacks import no_bars

REFRESH = 2  # times a second


@contextmanager
def showing(tally: Tally, live: bool, before: Collection[str] = ()) -> Iterator[Report]:
    """Gives a function to call with each event, after the tally. `live` asks for the table, where standard error is a
    terminal; jobs that were done `before` get no line."""
    said: set[str] = set()  # of the rows of each job, which many may share
    progress = Progress()

    def line(event: Mapping[str, Any]) -> None:
        for note in event.get("notes", ()):
            if note not in said:
                log_main(note)
                said.add(note)
        if text := event_line(tally, event, before):
            log_main(text)
        if event["event"] == "pass":
            notes = [f"{len(tally.finished)} of {len(tally.names)} jobs done", f"{len(tally.running)} running"]
            if best := best_line(tally):
                notes.append(f"best {best}")
            progress.show("step", tally.steps, tally.expected_steps, *notes)

    if not (live and sys.stderr.isatty()):
        yield line
        return
    console = Console(stderr=True)
    with no_bars(), Live(get_renderable=lambda: progress_table(tally), console=console, refresh_per_second=REFRESH):
        yield lambda event: line(event) if event["event"] in ("fleet", "started", "failed") else None


@contextmanager
def saying_once() -> Iterator[None]:
    """While inside, what is logged of the data of each job is logged of the first of them alone."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        new = record.msg not in said
        said.add(record.msg)
        return new

    logger = logging.getLogger("redpeft.tasks.data")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def event_line(tally: Tally, event: Mapping[str, Any], before: Collection[str] = ()) -> str | None:
    """What a log says of an event, if anything."""
    name = tally.name_of(event)
    ended = f"{len(tally.finished) + len(tally.failed)} of {len(tally.names)}"
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


def progress_table(tally: Tally) -> Table:
    """The counts of this moment, in one row."""
    seconds = int(tally.seconds)
    cells = {
        "jobs": str(len(tally.names)),
        "done": str(len(tally.finished)),
        "running": str(len(tally.running)),
        "waiting": str(tally.waiting),
        "failed": str(len(tally.failed)),
        "best so far": best_line(tally),
        "examples a second": f"{tally.rows_a_second():,.0f}",
        memory_kind(): f"{memory() / 2**30:.1f} GiB",
        "time": f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}",
    }
    shown = {name: cell for name, cell in cells.items() if cell is not None}
    table = Table(*shown)
    table.add_row(*shown.values())
    return table


def best_line(tally: Tally) -> str | None:
    """The best score so far, and whose it is; None where the jobs do not compete."""
    best = tally.best()
    return f"{best[1]} {best[2]:.4f} ({best[0]})" if best else None


def memory_kind() -> str:
    return "GPU memory" if torch.cuda.is_available() else "memory"


def memory() -> int:
    """Bytes that this process holds, on the GPU where there is one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
