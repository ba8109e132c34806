"""Messages and progress: lines on standard error, from one process for all."""

from __future__ import annotations

import math
import os
import sys
import time

SECONDS, SHARE, SILENCE = 30.0, 0.05, 120.0


def is_first_process() -> bool:
    """Whether this is the main process of a distributed run, which prints and writes for all, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def log_main(line: str) -> None:
    """A line on standard error (standard output is kept for results), from the first process alone."""
    if is_first_process():
        print(line, file=sys.stderr)


class Progress:
    """How far long work is, for logs: where standard error is a terminal, bars and tables show it.

    A line after half a minute, and then for each twentieth of the work, but not more often than every half minute, and
    after two minutes at the latest. `done` is what was done before.
    """

    def __init__(self, done: int = 0) -> None:
        self._began, self._before = time.monotonic(), done
        self._told, self._told_of = self._began, -1

    def show(self, what: str, done: int, total: int, *notes: str) -> None:
        """`tokenising: row 3,000 of 20,000, ..., 2 min left`, where a line is due. `what` is counted."""
        now = time.monotonic()
        quiet = now - self._told
        little = self._told_of >= 0 and done - self._told_of < SHARE * total
        if quiet < SECONDS or (little and quiet < SILENCE) or sys.stderr.isatty():
            return
        self._told, self._told_of = now, done
        new = done - self._before
        left = [f"{in_words((now - self._began) * (total - done) / new)} left"] if new > 0 else []
        log_main(", ".join([f"{what} {done:,} of {total:,}", *notes, *left]))


def in_words(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def counted(number: int, thing: str) -> str:
    """`1 job`, `2 jobs`, `1,000 jobs`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def rounded(number: float) -> str:
    """A number of epochs and the like in a person's digits: 3, 2.5, 0.06."""
    return f"{number:.2f}".rstrip("0").rstrip(".") if number >= 0.01 else f"{number:.1g}"
