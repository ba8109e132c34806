"""Pictures of a batch of jobs: their scores, when they were done, and scores over a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redpeft.training.plots import new_figure

if TYPE_CHECKING:
    from redpeft.runs.batch import Row

Curve = Sequence[tuple[float, float, float | None]]  # x, mean, standard deviation


def plot_scores(rows: Sequence[Row], path: Path) -> Path | None:
    """The scores of all jobs from the best to the worst, metric by metric. None, and no file, without any."""
    series: dict[str, list[float]] = {}
    for row in rows:
        for split in ("validation", "test"):
            if row.result and (score := row.score(split)) is not None:
                series.setdefault(f"{split} {row.result['metric']}", []).append(score)
    if not series:
        return None
    figure, [[axes]] = new_figure(6, 3.6)
    for label, scores in series.items():
        axes.plot(range(1, len(scores) + 1), sorted(scores, reverse=True), marker=".", label=label)
    axes.set(xlabel="jobs, each series sorted", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def plot_finished(seconds: Sequence[float], path: Path) -> Path | None:
    """How many jobs were done at each moment. None, and no file, without any."""
    if not seconds:
        return None
    minutes = [max(0.0, each) / 60 for each in sorted(seconds)]
    figure, [[axes]] = new_figure(6, 3.6)
    axes.step([0.0, *minutes], range(len(minutes) + 1), where="post")
    axes.set(xlabel="minutes since the start, with pauses between calls", ylabel="jobs finished")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def plot_grid(curves: Mapping[str, Curve], key: str, score: str, path: Path) -> Path | None:
    """Mean scores over the values of `key`, a curve for each combination of the others; the bars are standard
    deviations. The axis is logarithmic where the values span more than 10 times. None, and no file, without any."""
    values = [x for curve in curves.values() for x, *_ in curve]
    if not values:
        return None
    figure, [[axes]] = new_figure(6, 3.8)
    for label, curve in curves.items():
        x, means, deviations = zip(*sorted(curve), strict=True)
        bars = [deviation or 0.0 for deviation in deviations]
        axes.errorbar(x, means, yerr=bars, marker="o", capsize=3, label=label or None)
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
    axes.set(xlabel=key, ylabel=score)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    return path
