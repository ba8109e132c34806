"""Run folders become the cells of a table: scores by seed, their mean, the mean of the best k, their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redpeft.reproduce.published import Column, Table
from redpeft.reproduce.scored import extra_scores
from redpeft.storage import RESULT, read_result

SEED = "seed-"


@dataclass(frozen=True)
class Done:
    """A finished run: what its result.json holds, and the scores of the table's benchmark, if that has one."""

    folder: Path
    result: Mapping[str, Any]
    extra: Mapping[str, float]

    @property
    def seed(self) -> int:
        return self.result["seed"]

    def score(self, metric: str | None) -> float | None:
        """A score (the run's own metric for None) on the test split, or on validation where there is no other."""
        name = metric or self.result["metric"]
        value = self.extra.get(name, (self.result["test"] or self.result["validation"]).get(name))
        return None if value is None else float(value)


@dataclass(frozen=True)
class Cell:
    """One method on one column: scores by seed in the table's unit, and what the failed runs said.

    `best` is k where the paper averages the best k of its seeds.
    """

    scores: Mapping[int, float]
    folders: Mapping[int, Path]
    failed: Mapping[int, str]
    best: int | None = None

    @property
    def mean(self) -> float | None:
        """Of all seeds."""
        return statistics.fmean(self.scores.values()) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation (of the sample) over all seeds."""
        return _deviation(list(self.scores.values()))

    @property
    def chosen(self) -> list[float]:
        """The scores that the paper would average: the k highest test scores, or all."""
        return sorted(self.scores.values(), reverse=True)[: self.best]

    @property
    def is_chosen(self) -> bool:
        """Whether some of the scores are left out of the paper's mean."""
        return len(self.chosen) < len(self.scores)

    @property
    def headline(self) -> float | None:
        """The mean as the paper takes it."""
        return statistics.fmean(self.chosen) if self.scores else None

    @property
    def headline_deviation(self) -> float | None:
        """The standard deviation of the scores in the headline."""
        return _deviation(self.chosen)


def finished_runs(table: Table, out: Path) -> dict[tuple[str, str], list[Done]]:
    """The finished runs of a table in its output folder, by row and task, in the order of their seeds."""
    found: dict[tuple[str, str], list[Done]] = {}
    for path in out.glob(f"*/*/{SEED}*/{RESULT}"):
        row, task, _ = path.relative_to(out).parts[:-1]
        if row in table.rows:
            extra = extra_scores(path.parent, table.scored) if table.scored else {}
            found.setdefault((row, task), []).append(Done(path.parent, read_result(path.parent), extra))
    return {key: sorted(runs, key=lambda run: run.seed) for key, runs in found.items()}


def cell(table: Table, column: Column, runs: Iterable[Done], failed: Mapping[int, str]) -> Cell:
    """The cell of the runs of one row and task."""
    runs = list(runs)
    scores = {run.seed: value * table.unit for run in runs if (value := run.score(column.metric)) is not None}
    return Cell(scores, {run.seed: run.folder for run in runs}, failed, table.best.get(column.task))


def average(cells: Collection[Cell]) -> float | None:
    """The mean of the headlines of one row; None where a cell has none."""
    values = [cell.headline for cell in cells]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def sampling_error(run: Done) -> float | None:
    """The standard error that a score on so many test rows has of itself, as a share of 1.

    Of an accuracy p on n rows sqrt(p (1 - p) / n), of a Pearson correlation r (1 - r^2) / sqrt(n - 1), else None.
    """
    score, rows = run.score(None), run.result.get("rows", {}).get("test", 0)
    if score is None or rows < 2:
        return None
    if run.result["metric"] == "accuracy":
        return math.sqrt(score * (1 - score) / rows)
    return (1 - score**2) / math.sqrt(rows - 1) if run.result["metric"] == "pearson" else None


def beside_head(result: Mapping[str, Any]) -> int:
    """The parameters that a run trained but for the head, as the paper counts them."""
    head = 0 if result["method"] == "full" else result["head_parameters"]
    return result["trainable_parameters"] - head


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
