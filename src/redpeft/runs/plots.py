"""Pictures of an experiment: their scores, when they were done, and scores over a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from redpeft.runs.progress import sort_score
from redpeft.training.plots import new_figure, whole_numbers

if TYPE_CHECKING:
    from redpeft.runs.experiment import JobResult

Curve = Sequence[tuple[float, float, float | None]]  # x, mean, standard deviation
RATES = ("learning_rate", "head_lr", "weight_decay")
NAMED, LONGEST = 30, 42  # jobs with names in a picture, characters of a name


def plot_scores(results: Sequence[JobResult], path: Path) -> Path | None:
    """The scores of all jobs: up to 30 by name, the best at the top; of more jobs the sorted scores of each metric.
    None, and no file, where there are none."""
    splits = ("validation", "test")
    scored = [job for job in results if job.result and job.score("validation") is not None]
    if not scored:
        return None
    named = len(scored) <= NAMED
    scored.sort(key=lambda job: sort_score(job.metric, job.score("validation") or 0.0))  # the last one is drawn on top
    series: dict[str, list[tuple[int, float]]] = {}
    for place, job in enumerate(scored):
        for split in splits:
            if (score := job.score(split)) is not None:
                series.setdefault(f"{split} {job.metric}", []).append((place, score))
    figure, [[axes]] = new_figure(6, 0.22 * len(scored) + 1.4 if named else 3.6)
    for label, points in series.items():
        places, scores = zip(*points, strict=True)
        if named:
            axes.plot(scores, places, "o", alpha=0.7, label=label)
        else:
            axes.plot(range(1, len(scores) + 1), sorted(scores, reverse=True), marker=".", label=label)
    if named:
        axes.set_yticks(range(len(scored)), [_short(job.name) for job in scored], fontsize="small")
        axes.set(xlabel="score", ylim=(-0.6, len(scored) - 0.4))
    else:
        axes.set(xlabel="jobs, each series sorted", ylabel="score")
        whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _short(name: str) -> str:
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def plot_finished(seconds: Sequence[float], path: Path) -> Path | None:
    """How many jobs were done at each moment. None, and no file, where there are none."""
    if not seconds:
        return None
    minutes = [max(0.0, each) / 60 for each in sorted(seconds)]
    figure, [[axes]] = new_figure(6, 3.6)
    axes.step([0.0, *minutes], range(len(minutes) + 1), where="post")
    axes.set(xlabel="minutes since the start, with pauses between calls", ylabel="jobs finished")
    whole_numbers(axes.yaxis)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def plot_grid(curves: Mapping[str, Curve], key: str, score: str, path: Path) -> Path | None:
    """Mean scores over the values of `key`, with a curve for each combination of the other keys; bars are standard
    deviations. The axis is logarithmic for rates, and where the largest value is 10 times the smallest or more. A
    curve of two points has no line: two points do not show its shape. None, and no file, where there are none."""
    values = sorted({x for curve in curves.values() for x, *_ in curve})
    if not values:
        return None
    figure, [[axes]] = new_figure(6, 3.8)
    for label, curve in curves.items():
        x, means, deviations = zip(*sorted(curve), strict=True)
        bars = [deviation or 0.0 for deviation in deviations] if any(deviations) else None
        axes.errorbar(x, means, yerr=bars, fmt="o-" if len(x) > 2 else "o", capsize=3, label=label or None)
    if values[0] > 0 and (key in RATES or values[-1] >= 10 * values[0]):
        axes.set_xscale("log")
        axes.margins(x=0.1)
    axes.set_xticks(values, [f"{value:g}" for value in values], rotation=90 if len(values) > 6 else 0)
    axes.minorticks_off()
    axes.set(xlabel=key, ylabel=score)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    return path
