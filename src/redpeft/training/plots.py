"""The curves of one run as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redpeft.console import rounded


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes (rows, columns). It needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers alone, for an axis of counts."""
    axis.get_major_locator().set_params(integer=True)


def plot_run(history: Sequence[dict[str, Any]], metric: str, folder: Path, best_epoch: float) -> list[Path]:
    """Write loss.png and, where the run was evaluated, <metric>.png into `folder`; returns their paths.

    `history` holds the Trainer's log entries: `loss` of steps, `eval_loss` and `eval_<metric>` of evaluations. That
    after `best_epoch` is marked.
    """
    best = next((entry["step"] for entry in history if "eval_loss" in entry and entry["epoch"] == best_epoch), None)
    mark = (best, f"best epoch: {rounded(best_epoch)}")
    folder.mkdir(parents=True, exist_ok=True)
    curves = {"loss": {"training": "loss", "validation": "eval_loss"}}
    if metric != "loss":
        curves[metric] = {"validation": f"eval_{metric}"}
    return [
        _plot(folder / f"{name}.png", name, series, *mark)
        for name, keys in curves.items()
        if (series := {label: points for label, key in keys.items() if (points := _points(history, key))})
    ]


def _points(history: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def _plot(
    path: Path, name: str, series: dict[str, list[tuple[float, float]]], best: float | None, label_of_best: str
) -> Path:
    figure, [[axes]] = new_figure(6, 3.6)
    for label, points in series.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="o" if label == "validation" else None, label=label)
    if best is not None:
        axes.axvline(best, linestyle=":", color="black", label=label_of_best)
    axes.set(xlabel="step", ylabel=name)
    whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
