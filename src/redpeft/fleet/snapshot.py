"""Where a job of a fleet stands, on disk: one file in its run folder's checkpoints/, written after each epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from redpeft.fleet.fleet import SlotState
from redpeft.storage import CHECKPOINTS, save_tensors

SNAPSHOT = "fleet.safetensors"


class Snapshot(NamedTuple):
    """The slot, its best values so far (None before the first evaluation), and counts and scores for people."""

    state: SlotState
    best: torch.Tensor | None
    progress: dict[str, Any]


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """Replace a run folder's snapshot, by a temporary file and a rename."""
    path = folder / CHECKPOINTS / SNAPSHOT
    path.parent.mkdir(exist_ok=True)
    tensors = snapshot.state._asdict() | ({} if snapshot.best is None else {"best": snapshot.best})
    save_tensors(path, tensors, {"progress": json.dumps(snapshot.progress)})


def read_snapshot(folder: Path) -> Snapshot | None:
    """What `write_snapshot` wrote there last; None where there is none that can be read."""
    try:
        with safe_open(folder / CHECKPOINTS / SNAPSHOT, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress = json.loads(file.metadata()["progress"])
    except (OSError, SafetensorError):
        return None
    best = tensors.pop("best", None)
    return Snapshot(SlotState(**tensors), best, progress)
