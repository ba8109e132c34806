"""How many jobs fit into memory at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from redpeft.console import counted
from redpeft.errors import UserError
from redpeft.fleet.adamw import Rates
from redpeft.fleet.fleet import Fleet
from redpeft.models import free_memory, keep_modes_and_rng, peak_memory

COPIES = 4  # of a job's numbers: values, two moments, and the best values
SHARE = 0.8  # of the free memory may be used
MIB = 2**20


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
    with keep_modes_and_rng(fleet.model), peak_memory(fleet.device) as peak:
        fleet.step(batch, [0] * rows, {0: Rates(0.0, 0.0)})
    numbers = fleet.state.values.shape[1]
    return MemoryPlan(
        slot=COPIES * numbers * fleet.state.values.element_size(),
        step=max(peak) - peak[0],
        free=free_memory(fleet.device),
        edit_numbers=fleet.edit_numbers,
        head_numbers=numbers - fleet.edit_numbers,
    )
