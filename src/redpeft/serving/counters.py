"""What a server has done with each adapter, counted where it is done and read where /metrics is answered.

Those are different processes: a worker loads adapters, an API server sees requests. Each keeps its own counts and
writes them, a moment later, as a file into a folder that all of a server's processes share; who reads adds the files.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections import Counter
from pathlib import Path
from threading import Lock, Timer

from redpeft.storage import write_atomically

# In the environment, which a server's processes inherit: ours, or vLLM's where it runs several API servers
FOLDER, OF_SERVERS = "REDPEFT_METRICS_DIR", "PROMETHEUS_MULTIPROC_DIR"
KEPT = 1024  # adapters that a process keeps counts of: those that it had to do with last
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

_shared: list[tempfile.TemporaryDirectory] = []  # of the process that made it, at whose end it goes


class Counters:
    """This process's counts by adapter and by the names of `COUNTED`."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._counts: dict[str, Counter[str]] = {}  # the latest last
        self._lock = Lock()
        self._writing = Lock()  # the timer and who answers /metrics write the same file
        self._is_due = False

    def add(self, adapter: str, **amounts: int) -> None:
        """Add to an adapter's counts. The adapter that was counted longest ago is forgotten, if there are too many."""
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
        """Put the counts where `read_counts` finds them, which happens by itself a moment after each change."""
        with self._writing:
            with self._lock:
                self._is_due = False
                text = json.dumps(self._counts)
            if (shared := folder()) is None:
                return
            try:
                write_atomically(shared / f"redpeft-{os.getpid()}.json", text)
            except OSError:  # the server is ending and its folder is gone, or the disk is full: the next is in time
                return


def folder() -> Path | None:
    """The folder that this server's processes share; None outside of servers."""
    found = os.environ.get(FOLDER) or os.environ.get(OF_SERVERS)
    return Path(found) if found else None


def share() -> None:
    """Make the folder, in a server's first process. Not in those that it starts: they inherit it."""
    if multiprocessing.parent_process() is None and not _shared:
        _shared.append(tempfile.TemporaryDirectory(prefix="redpeft-metrics-"))
        os.environ[FOLDER] = _shared[0].name


def read_counts() -> dict[str, Counter[str]]:
    """The counts of all processes together, by adapter; of those that have ended too."""
    total: dict[str, Counter[str]] = {}
    shared = folder()
    for file in sorted(shared.glob("redpeft-*.json")) if shared else []:
        for adapter, counts in json.loads(file.read_text(encoding="utf-8")).items():
            total.setdefault(adapter, Counter()).update(counts)
    return total
