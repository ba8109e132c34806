from __future__ import annotations

from pathlib import Path

import pytest

from redpeft.runs import plots
from redpeft.runs.experiment import JobResult


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figures that are drawn."""
    drawn, make = [], plots.new_figure

    def keep(*size):
        figure, panels = make(*size)
        drawn.append(panels[0, 0])
        return figure, panels

    monkeypatch.setattr(plots, "new_figure", keep)
    return drawn


@pytest.mark.parametrize(
    ("key", "values", "scale"),
    [
        ("learning_rate", (1e-3, 2e-3), "log"),
        ("head_lr", (0, 1e-2), "linear"),
        ("max_length", (16, 160), "log"),
        ("batch_size", (8, 16), "linear"),
        ("epochs", (1, 2), "linear"),
    ],
)
def test_a_grid_has_a_tick_at_each_value_and_rates_a_logarithmic_axis(axes, tmp_path, key, values, scale):
    low, high = values
    curves = {"head=all": [(high, 0.9, 0.1), (low, 0.5, None)], "head=last": [(low, 0.6, None)]}
    assert plots.plot_grid(curves, key, "validation accuracy", tmp_path / "grid.png").is_file()
    [found] = axes
    assert (found.get_xscale(), found.get_xlabel(), found.get_ylabel()) == (scale, key, "validation accuracy")
    assert [label.get_text() for label in found.get_xticklabels()] == [f"{low:g}", f"{high:g}"]
    assert len(found.get_xticklabels(minor=True)) == 0
    line = found.containers[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([low, high], [0.5, 0.9])
    assert line.get_linestyle() == "None"  # two points say nothing of what lies between
    assert [text.get_text() for text in found.get_legend().get_texts()] == ["head=all", "head=last"]


def test_three_points_are_joined(axes, tmp_path):
    plots.plot_grid({"": [(1, 0.5, None), (2, 0.6, None), (3, 0.4, None)]}, "epochs", "accuracy", tmp_path / "a.png")
    assert axes[0].lines[0].get_linestyle() == "-"


def job(number, metric="accuracy"):
    scores = {metric: (number * 7 % 31) / 31}
    return JobResult(
        f"job-{number}", Path(), {"metric": metric, "validation": scores, "test": scores if number % 2 else None}
    )


def test_up_to_thirty_jobs_are_named_with_the_best_on_top(axes, tmp_path):
    rows = [*(job(number) for number in range(30)), JobResult("failed", Path(), None, "why")]
    plots.plot_scores(rows, tmp_path / "a.png")
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == [row.name for row in sorted(rows[:30], key=lambda row: row.score("validation"))]
    assert [line.get_linestyle() for line in axes[0].lines] == ["None", "None"]
    assert [len(line.get_xdata()) for line in axes[0].lines] == [30, 15]
    plots.plot_scores([job(1, "loss"), job(9, "loss")], tmp_path / "a.png")
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["job-1", "job-9"]  # the least loss on top
    long = JobResult("learning_rate=0.001,batch_size=16,head=last/seed-0", Path(), rows[1].result)
    plots.plot_scores([long], tmp_path / "a.png")
    assert [label.get_text() for label in axes[2].get_yticklabels()] == ["learning_rate=0.001,…e=16,head=last/seed-0"]
    plots.plot_scores([job(number) for number in range(31)], tmp_path / "a.png")
    assert (axes[3].get_xlabel(), len(axes[3].lines[0].get_xdata())) == ("jobs, each series sorted", 31)


def test_jobs_over_time_are_counted_from_the_start(axes, tmp_path):
    plots.plot_finished([120.0, 60.0, -5.0], tmp_path / "finished.png")
    [line] = axes[0].lines
    assert list(line.get_xdata()) == [0, 0, 1, 2]
    assert list(line.get_ydata()) == [0, 1, 2, 3]
    assert all(tick == int(tick) for tick in axes[0].get_yticks())


def test_nothing_to_draw_is_no_file(tmp_path):
    assert plots.plot_finished([], tmp_path / "a.png") is None
    assert plots.plot_scores([], tmp_path / "b.png") is None
    assert plots.plot_grid({}, "x", "y", tmp_path / "c.png") is None
    assert not list(tmp_path.iterdir())
