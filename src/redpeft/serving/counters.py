"""Counts of what a server has done with each adapter.

Different processes count: a worker loads adapters, an API server sees requests. Each process writes its counts, a
moment after they change, to a file of its own in a folder that all of a server's processes share. `/metrics` adds the
files.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections import Counter
from pathlib import Path
from threading import Lock, Timer

from redpeft.storage import read_json, write_atomically

# Environment variables with the shared folder, inherited by all processes: ours, or vLLM's with several API servers
FOLDER, OF_SERVERS = "REDPEFT_METRICS_DIR", "PROMETHEUS_MULTIPROC_DIR"
KEPT = 1024  # adapters that a process keeps counts of: the latest ones
DELAY = 1.0  # seconds
COUNTED = {
    "requests": "Requests that this adapter has begun to answer.",
    "prompt_tokens": "Prompt tokens of these requests.",
    "generation_tokens": "Tokens that this adapter has generated.",
    "adapter_loads": "How often this adapter was read from disk into the CPU's memory.",
    "adapter_evictions": "How often it was dropped from the CPU's memory to make room for another.",
    "adapter_slot_loads": "How often it was put into a slot, which a batch needs it to have.",
    "adapter_slot_evictions": "How often it lost its slot to another.",
}

_shared: list[tempfile.TemporaryDirectory] = []  # in the process that made it; removed at its end


class Counters:
    """This process's counts, by adapter and by the names of `COUNTED`."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._counts: dict[str, Counter[str]] = {}  # the latest last
        self._lock = Lock()
        self._writing = Lock()  # the timer and /metrics write the same file
        self._is_due = False

    def add(self, adapter: str, **amounts: int) -> None:
        """Add to an adapter's counts. With too many adapters, the one that was counted longest ago is forgotten."""
        with self._lock:
            counts = self._counts.pop(adapter, None) or Counter()
            counts.update(amounts)
            self._counts[adapter] = counts
            if len(self._counts) > self.kept:
                del self._counts[next(iter(self._counts))]
            if self._is_due or folder() is None:
                return
            self._is_due = True
        timer = Timer(DELAY, self.write)
        timer.daemon = True
        timer.start()

    def write(self) -> None:
        """Write the counts to where `read_counts` finds them. Each change does so itself after a moment."""
        with self._writing:
            with self._lock:
                self._is_due = False
                text = json.dumps(self._counts)
            if (shared := folder()) is None:
                return
            try:
                write_atomically(shared / f"redpeft-{os.getpid()}.json", text)
            except OSError:  # the folder is gone as the server ends, or the disk is full: the next write may work
                return


def folder() -> Path | None:
    """The folder that this server's processes share; None outside of servers."""
    found = os.environ.get(FOLDER) or os.environ.get(OF_SERVERS)
    return Path(found) if found else None


def share() -> None:
    """Make the shared folder, in a server's first process only: the processes that it starts inherit it."""
    if multiprocessing.parent_process() is None and not _shared:
        _shared.append(tempfile.TemporaryDirectory(prefix="redpeft-metrics-"))
        os.environ[FOLDER] = _shared[0].name


def read_counts() -> dict[str, Counter[str]]:
    """The sums over all processes, by adapter, including processes that have ended."""
    total: dict[str, Counter[str]] = {}
    shared = folder()
    for file in sorted(shared.glob("redpeft-*.json")) if shared else []:
        for adapter, counts in read_json(file).items():
            total.setdefault(adapter, Counter()).update(counts)
    return total
