"""How many jobs fit into memory at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from redpeft.console import counted
from redpeft.errors import UserError
from redpeft.fleet.adamw import Rates
from redpeft.fleet.fleet import Fleet
from redpeft.models import keep_modes_and_rng

COPIES = 4  # of a job's numbers: values, two moments, and the best values
SHARE = 0.8  # of the free memory may be used
MIB = 2**20
SAMPLING = 0.002  # seconds between two measurements of a process on a CPU


class NoRoom(UserError):
    """The slots asked for do not fit into memory."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a slot and a pass take, bytes that are free, and the parts of a slot's numbers."""

    slot: int
    step: int
    free: int
    edit_numbers: int
    head_numbers: int

    @property
    def fits(self) -> int:
        """The most slots."""
        return max(0, int((SHARE * self.free - self.step) / self.slot))

    def choose(self, jobs: int, asked: int | None) -> int:
        """The number of slots for so many jobs: as many as asked for, or as fit. `NoRoom` where they do not fit."""
        slots = min(jobs, asked or jobs, max(1, self.fits))
        if self.fits < 1 or (asked is not None and min(asked, jobs) > self.fits):
            raise NoRoom(
                f"{counted(min(jobs, asked or 1), 'slot')} cannot fit into memory: {self}; "
                f"ask for at most {self.fits} (--slots), or for smaller passes (--tokens)"
            )
        return slots

    def __str__(self) -> str:
        return (
            f"a slot takes {self.slot / MIB:.2f} MiB ({self.edit_numbers:,} numbers of the edit and "
            f"{self.head_numbers:,} of the head, {COPIES} times with AdamW's moments and the best values), a pass "
            f"{self.step / MIB:,.0f} MiB, and {self.free / MIB:,.0f} MiB are free"
        )


def plan_memory(fleet: Fleet, batch: dict[str, Any], rows: int) -> MemoryPlan:
    """Measure a training pass. `fleet` has one slot, which is overwritten; `batch` is as large as a pass will be, and
    has so many rows. The model's modes and the random numbers are left as they were."""
    fleet.fill(0)
    with keep_modes_and_rng(fleet.model), _peak(fleet.device) as peak:
        fleet.step(batch, [0] * rows, {0: Rates(0.0, 0.0)})
    numbers = fleet.state.values.shape[1]
    return MemoryPlan(
        slot=COPIES * numbers * fleet.state.values.element_size(),
        step=max(peak),
        free=free_memory(fleet.device),
        edit_numbers=fleet.edit_numbers,
        head_numbers=numbers - fleet.edit_numbers,
    )


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return psutil.virtual_memory().available


@contextmanager
def _peak(device: torch.device) -> Iterator[Sequence[int]]:
    """Gives a list; afterwards its largest number is the memory in bytes that was added on the device inside."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(SAMPLING):
            found.append(process.memory_info().rss - before)

    found.append(0)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found.append(process.memory_info().rss - before)
