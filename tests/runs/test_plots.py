from __future__ import annotations

import pytest

from redpeft.runs import plots


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
    ("values", "scale"), [((1e-3, 2e-2), "log"), ((1e-3, 1e-2), "linear"), ((8, 16), "linear"), ((0, 100), "linear")]
)
def test_a_grid_is_drawn_on_a_logarithmic_axis_where_it_spans_more_than_ten_times(axes, tmp_path, values, scale):
    low, high = values
    curves = {"batch_size=8": [(high, 0.9, 0.1), (low, 0.5, None)], "batch_size=16": [(low, 0.6, None)]}
    assert plots.plot_grid(curves, "learning_rate", "validation accuracy", tmp_path / "grid.png").is_file()
    [found] = axes
    assert (found.get_xscale(), found.get_xlabel(), found.get_ylabel()) == (
        scale,
        "learning_rate",
        "validation accuracy",
    )
    line = found.containers[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([low, high], [0.5, 0.9])
    assert [text.get_text() for text in found.get_legend().get_texts()] == ["batch_size=8", "batch_size=16"]


def test_jobs_over_time_are_counted_from_the_start(axes, tmp_path):
    plots.plot_finished([120.0, 60.0, -5.0], tmp_path / "finished.png")
    [line] = axes[0].lines
    assert list(line.get_xdata()) == [0, 0, 1, 2]
    assert list(line.get_ydata()) == [0, 1, 2, 3]


def test_nothing_to_draw_is_no_file(tmp_path):
    assert plots.plot_finished([], tmp_path / "a.png") is None
    assert plots.plot_scores([], tmp_path / "b.png") is None
    assert plots.plot_grid({}, "x", "y", tmp_path / "c.png") is None
    assert not list(tmp_path.iterdir())
