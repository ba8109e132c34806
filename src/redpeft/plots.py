"""Pictures: plain numbers in, a PNG out, or a figure of matplotlib. Functions that write return the picture's path.
Where there is nothing to draw they write no file and return None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from redpeft.console import rounded

Curve = Sequence[tuple[float, float, float | None]]  # x, mean, standard deviation
RATES = ("learning_rate", "head_lr", "weight_decay")
NAMED, LONGEST = 30, 42  # jobs with names in a picture, characters of a name
PANELS = 4  # side by side
DOTS = 600  # in a row of a picture of channels


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes (rows, columns). It needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers alone, for an axis of counts."""
    axis.get_major_locator().set_params(integer=True)


def save(figure: Any, path: Path) -> Path:
    """Write the picture."""
    figure.savefig(path, dpi=120)
    return path


def plot_run(history: Sequence[dict[str, Any]], metric: str, folder: Path, best_epoch: float) -> list[Path]:
    """Write loss.png, <metric>.png where the run was evaluated, and kl.png where it was held to its start, into
    `folder`; returns their paths.

    `history` holds the Trainer's log entries: `loss`, `<metric>` and `kl` of steps, `eval_loss` and `eval_<metric>` of
    evaluations. That after `best_epoch` is marked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = run_figures(history, metric, best_epoch)
    return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def run_figures(history: Sequence[dict[str, Any]], metric: str, best_epoch: float | None = None) -> dict[str, Any]:
    """The figures of a run by what they show: "loss", its metric, "kl". See `plot_run`."""
    scored = (entry for entry in history if f"eval_{metric}" in entry)
    best = next((entry["step"] for entry in scored if entry["epoch"] == best_epoch), None)
    curves = {name: {"training": name, "validation": f"eval_{name}"} for name in ("loss", metric, "kl")}
    figures = {}
    for name, keys in curves.items():
        series = {label: points for label, key in keys.items() if (points := _points(history, key))}
        if not series:
            continue
        figures[name], [[axes]] = new_figure(6, 3.6)
        for label, points in series.items():
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, marker="o" if label == "validation" else None, label=label)
        if best is not None and best_epoch is not None:
            axes.axvline(best, linestyle=":", color="black", label=f"best epoch: {rounded(best_epoch)}")
        axes.set(xlabel="step", ylabel=name)
        whole_numbers(axes.xaxis)
        axes.grid(alpha=0.3)
        axes.legend()
    return figures


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def channels_figure(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    """A figure with a picture for each title: a row for each site, and its channels from left to right, red above 0
    and blue below. Where channels share a dot, it shows the one that is farthest from 0."""
    rows = max(map(len, panels.values()))
    figure, axes = new_figure(9, len(panels) * (1.2 + 0.11 * max(rows, 6)), len(panels))
    for (title, sites), panel in zip(panels.items(), axes.flat, strict=True):
        width = max(len(values) for values in sites.values())
        dots = min(width, DOTS)
        edges = [dot * width // dots for dot in range(dots + 1)]
        grid = np.full((len(sites), dots), np.nan)
        for row, values in enumerate(map(np.asarray, sites.values())):
            for dot in range(dots):
                if len(shared := values[edges[dot] : edges[dot + 1]]):
                    grid[row, dot] = shared[np.abs(shared).argmax()]
        most = np.nanquantile(np.abs(grid), 0.999) or 1.0  # so that one outlier does not hide the rest
        extent = (-0.5, width - 0.5, len(sites) - 0.5, -0.5)
        image = panel.imshow(
            grid, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest", extent=extent
        )
        figure.colorbar(image, ax=panel, extend="both", pad=0.01)
        step = math.ceil(len(sites) / 16)
        panel.set_yticks(range(0, len(sites), step), list(sites)[::step], fontsize="small")
        panel.set_title(title, fontsize="medium")
    axes.flat[-1].set_xlabel("channel")
    return figure


def plot_scores(jobs: Sequence[tuple[str, Mapping[str, float]]], path: Path) -> Path | None:
    """The scores of jobs, each a name and its scores by what they are ("validation accuracy"), from the worst job to
    the best: up to 30 jobs by name, the best at the top; of more jobs the sorted scores."""
    if not jobs:
        return None
    named = len(jobs) <= NAMED
    series: dict[str, list[tuple[int, float]]] = {}
    for place, (_, scores) in enumerate(jobs):
        for label, score in scores.items():
            series.setdefault(label, []).append((place, score))
    figure, [[axes]] = new_figure(6, 0.22 * len(jobs) + 1.4 if named else 3.6)
    for label, points in series.items():
        places, values = zip(*points, strict=True)
        if named:
            axes.plot(values, places, "o", alpha=0.7, label=label)
        else:
            axes.plot(range(1, len(values) + 1), sorted(values, reverse=True), marker=".", label=label)
    if named:
        axes.set_yticks(range(len(jobs)), [_short(name) for name, _ in jobs], fontsize="small")
        axes.set(xlabel="score", ylim=(-0.6, len(jobs) - 0.4))
    else:
        axes.set(xlabel="jobs, each series sorted", ylabel="score")
        whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, path)


def _short(name: str) -> str:
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def plot_finished(seconds: Sequence[float], path: Path) -> Path | None:
    """How many jobs were done at each moment."""
    if not seconds:
        return None
    minutes = [max(0.0, each) / 60 for each in sorted(seconds)]
    figure, [[axes]] = new_figure(6, 3.6)
    axes.step([0.0, *minutes], range(len(minutes) + 1), where="post")
    axes.set(xlabel="minutes since the start, with pauses between calls", ylabel="jobs finished")
    whole_numbers(axes.yaxis)
    axes.grid(alpha=0.3)
    return save(figure, path)


def plot_grid(curves: Mapping[str, Curve], key: str, score: str, path: Path) -> Path | None:
    """Mean scores over the values of `key`, with a curve for each combination of the other keys; bars are standard
    deviations. The axis is logarithmic for rates, and where the largest value is 10 times the smallest or more. A
    curve of two points has no line: two points do not show its shape."""
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
    return save(figure, path)


class MethodScore(NamedTuple):
    """A method in a picture of scores against trained parameters. `published`: its parameters and score elsewhere."""

    label: str
    parameters: float | None
    score: float | None
    deviation: float | None = None
    published: tuple[float, float] | None = None


def plot_parameters(points: Sequence[MethodScore], xlabel: str, ylabel: str, path: Path) -> Path | None:
    """The score of each method against the parameters that it trains; hollow: published. A method that trains none is
    a dashed line."""
    if all(point.score is None for point in points):
        return None
    figure, [[axes]] = new_figure(7, 4.4)
    for index, point in enumerate(points):
        colour = f"C{index % 10}"
        if point.score is not None and point.parameters == 0:
            axes.axhline(point.score, linestyle="--", color=colour, label=point.label)
            axes.legend()
        elif point.score is not None:
            axes.errorbar(point.parameters, point.score, yerr=point.deviation, fmt="o", capsize=3, color=colour)
            axes.annotate(point.label, (point.parameters, point.score), (6, 6), textcoords="offset points")
        if point.published is not None:
            axes.plot(*point.published, "o", mfc="none", color=colour)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    return save(figure, path)


class Bar(NamedTuple):
    """A method's score in a panel of bars, and what was published of it."""

    score: float | None
    deviation: float | None = None
    published: float | None = None


def plot_bars(methods: Sequence[str], panels: Mapping[str, Sequence[Bar]], title: str, path: Path) -> Path | None:
    """A panel for each key of `panels`, with a bar for each method and a line across it at what was published."""
    if all(bar.score is None for bars in panels.values() for bar in bars):
        return None
    wide = min(PANELS, len(panels))
    high = math.ceil(len(panels) / wide)
    figure, axes = new_figure(2.6 * wide + 1, 2.6 * high + 0.6, high, wide)
    figure.suptitle(title, fontsize=9)
    for panel, (name, bars) in zip(axes.flat, panels.items(), strict=False):
        values: list[float] = []
        for index, bar in enumerate(bars):
            if bar.score is not None:
                panel.bar(index, bar.score, yerr=bar.deviation, capsize=2, color=f"C{index % 10}")
                values += [bar.score - (bar.deviation or 0), bar.score + (bar.deviation or 0)]
            if bar.published is not None:
                panel.plot([index - 0.4, index + 0.4], [bar.published] * 2, color="black", linewidth=2)
                values.append(bar.published)
        if values:
            room = 0.15 * (max(values) - min(values)) or 1
            panel.set_ylim(min(values) - room, max(values) + room)
        panel.set_title(name)
        panel.set_xticks(range(len(methods)), methods, rotation=90)
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    return save(figure, path)
