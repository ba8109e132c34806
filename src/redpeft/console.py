"""Messages and progress: lines on standard error, from one process for all; and what machine this is, for reports."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, SHARE, SILENCE = 30.0, 0.05, 120.0  # between two lines of progress: at least, of the work, at most


def is_first_process() -> bool:
    """Whether this is the main process of a distributed run, which prints and writes for all, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def log_main(line: str) -> None:
    """Print a line on standard error, from the main process alone. Standard output is for results."""
    if is_first_process():
        print(line, file=sys.stderr)


class Progress:
    """Log lines about the progress of long work. On a terminal nothing is logged: bars and tables show it there.

    The first line comes after half a minute. Then there is a line for each twentieth of the work, but at most one
    every half minute and at least one every two minutes. `done`: what was done before.
    """

    def __init__(self, done: int = 0) -> None:
        self._began, self._before = time.monotonic(), done
        self._logged_at, self._logged_done = self._began, -1

    def show(self, what: str, done: int, total: int, *notes: str) -> None:
        """Log `tokenising: row 3,000 of 20,000, ..., 2 min left`, if a line is due. `what` is what is counted."""
        now = time.monotonic()
        quiet = now - self._logged_at
        little = self._logged_done >= 0 and done - self._logged_done < SHARE * total
        if quiet < SECONDS or (little and quiet < SILENCE) or sys.stderr.isatty():
            return
        self._logged_at, self._logged_done = now, done
        new = done - self._before
        left = [f"{in_words((now - self._began) * (total - done) / new)} left"] if new > 0 else []
        log_main(", ".join([f"{what} {done:,} of {total:,}", *notes, *left]))


def bars_on_terminals_only() -> None:
    """Turn off the progress bars of datasets (tokenising) and transformers (loading weights), unless standard error is
    a terminal."""
    if not sys.stderr.isatty():
        import datasets  # slow to import, as is transformers
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


@contextmanager
def no_bars() -> Iterator[None]:
    """While inside, datasets shows no progress bars. They would mix with the answers."""
    import datasets  # slow to import

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


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
    """A number for people, such as one of epochs: 3, 2.5, 0.06."""
    return f"{number:.2f}".rstrip("0").rstrip(".") if number >= 0.01 else f"{number:.1g}"


def machine() -> dict[str, str]:
    """Processor, memory, graphics cards and system of this machine."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": ", ".join(gpus) or "none",
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
