"""Runs of a table that were asked for, and run folders with a result.json and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from redpeft.fleet.queue import Job
from redpeft.reproduce.plan import TableRun, recipe_for


def fake_run(out: Path, row: str, task: str, seed: int, test: dict | None, metric: str = "accuracy", **more) -> Path:
    folder = out / row / task / f"seed-{seed}"
    folder.mkdir(parents=True)
    result = {
        "task": "classification", "base": "m", "method": row, "seed": seed, "metric": metric, "learning_rate": 0.03,
        "steps": 9, "epochs": 3.0, "best_epoch": 2.0, "seconds_per_step": 0.5, "seconds": 90.0,
        "trainable_parameters": 1384, "head_parameters": 1000, "adapter_bytes": 99, "test": test,
        "validation": {metric: 0.5}, "rows": {"train": 64, "validation": 100, "test": 101},
        "versions": {"redpeft": "0.1", "torch": "2.9"}, **more,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def asked(out: Path, row: str, task: str, seed: int) -> TableRun:
    recipe = recipe_for("roberta-base", row, task, "paper", {"seed": seed})
    return TableRun(row, task, Job(recipe, out / row / task / f"seed-{seed}"))
