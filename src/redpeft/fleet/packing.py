"""Which of the waiting batches are computed together: those of like length, so that short rows do not pay for long."""

from __future__ import annotations

from collections.abc import Mapping

from redpeft.fleet.job import Work


def pack(waiting: Mapping[int, Work], tokens: int) -> list[int]:
    """The slots whose batches make the next pass, of those that wait, in the order in which they have waited.

    The first is always among them, however long its batch is. The others, of its kind (to learn or to be scored), are
    the nearest to it in length, as long as all of them, padded to the longest, have at most `tokens` tokens.
    """
    first = next(iter(waiting))
    chosen, rows, longest = [first], len(waiting[first].rows), waiting[first].length
    like = [slot for slot, work in waiting.items() if slot != first and _kind(work) == _kind(waiting[first])]
    for slot in sorted(like, key=lambda slot: abs(waiting[slot].length - longest)):
        more, length = rows + len(waiting[slot].rows), max(longest, waiting[slot].length)
        if more * length > tokens:
            break
        chosen.append(slot)
        rows, longest = more, length
    return chosen


def _kind(work: Work) -> bool:
    return work.rates is None
