"""The pictures of a report: score against trained parameters, and each column's scores as bars."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from redpeft.training.plots import new_figure

if TYPE_CHECKING:
    from redpeft.reproduce.report import Report

COLUMNS = 4  # panels side by side


def plot_parameters(report: Report, path: Path) -> Path | None:
    """The average (or the first column) of each method against the parameters that it trains; hollow: published, where
    that is of the same base model. None, and no file, where there is nothing to draw."""
    first = report.columns[0]
    figure, panels = new_figure(7, 4.4)
    axes = panels[0, 0]
    drawn = False
    for index, line in enumerate(report.lines):
        cell = line.cells[first]
        score, deviation = (line.average(), None) if report.table.average else (cell.headline, cell.headline_deviation)
        published = line.published_average(report.table) if report.table.average else line.row.scores.get(first)
        colour = f"C{index % 10}"
        if score is not None and line.trained == 0:  # nothing beside the head: no place on the axis
            axes.axhline(score, linestyle="--", color=colour, label=line.row.label)
            axes.legend()
            drawn = True
        elif score is not None:
            axes.errorbar(line.trained, score, yerr=deviation, fmt="o", capsize=3, color=colour)
            axes.annotate(line.row.label, (line.trained, score), (6, 6), textcoords="offset points")
            drawn = True
        if report.is_papers_model and published is not None and line.row.parameter_count:
            axes.plot(line.row.parameter_count, published, "o", mfc="none", color=colour)
    if not drawn:
        return None
    name = "average" if report.table.average else report.column_name(first)
    hollow = " (hollow: published)" if report.is_papers_model else ""
    axes.set(xscale="log", xlabel="trained parameters, without the head", ylabel=name + hollow)
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path


def plot_columns(report: Report, path: Path) -> Path | None:
    """A panel for each column with a bar for each method, and a line across it at what was published, where that is of
    the same base model. None, and no file, where there is nothing to draw."""
    lines = [line for line in report.lines if any(cell.headline is not None for cell in line.cells.values())]
    if not lines:
        return None
    wide = min(COLUMNS, len(report.columns))
    high = math.ceil(len(report.columns) / wide)
    figure, panels = new_figure(2.6 * wide + 1, 2.6 * high + 0.6, high, wide)
    figure.suptitle("axes do not begin at 0" + ("; lines: published" if report.is_papers_model else ""), fontsize=9)
    for panel, column in zip(panels.flat, report.columns, strict=False):
        values: list[float] = []
        for index, line in enumerate(lines):
            cell, published = line.cells[column], line.row.scores.get(column)
            if cell.headline is not None:
                panel.bar(index, cell.headline, yerr=cell.headline_deviation, capsize=2, color=f"C{index % 10}")
                spread = cell.headline_deviation or 0
                values += [cell.headline - spread, cell.headline + spread]
            if report.is_papers_model and published is not None:
                panel.plot([index - 0.4, index + 0.4], [published] * 2, color="black", linewidth=2)
                values.append(published)
        if values:
            room = 0.15 * (max(values) - min(values)) or 1
            panel.set_ylim(min(values) - room, max(values) + room)
        panel.set_title(report.column_name(column))
        panel.set_xticks(range(len(lines)), [line.row.label for line in lines], rotation=90)
    for panel in panels.flat[len(report.columns) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=120)
    return path
