from __future__ import annotations

import pytest

from redpeft import plots


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


def jobs(count):
    """From the worst to the best; every other one has test scores too."""
    scores = [{"validation accuracy": number / 31, "test accuracy": 0.5} for number in range(count)]
    return [(f"job-{number}", dict([*each.items()][: 1 + number % 2])) for number, each in enumerate(scores)]


def test_up_to_thirty_jobs_are_named_with_the_best_on_top(axes, tmp_path):
    plots.plot_scores(jobs(30), tmp_path / "a.png")
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [f"job-{number}" for number in range(30)]
    assert [line.get_linestyle() for line in axes[0].lines] == ["None", "None"]
    assert [len(line.get_xdata()) for line in axes[0].lines] == [30, 15]
    long = "learning_rate=0.001,batch_size=16,head=last/seed-0"
    plots.plot_scores([(long, {"validation accuracy": 0.5})], tmp_path / "a.png")
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["learning_rate=0.001,…e=16,head=last/seed-0"]
    plots.plot_scores(jobs(31), tmp_path / "a.png")
    assert (axes[2].get_xlabel(), len(axes[2].lines[0].get_xdata())) == ("jobs, each series sorted", 31)


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
    assert plots.plot_parameters([plots.MethodScore("RED", 10, None)], "x", "y", tmp_path / "d.png") is None
    assert plots.plot_bars(["RED"], {"rte": [plots.Bar(None)]}, "title", tmp_path / "e.png") is None
    assert not list(tmp_path.iterdir())


def test_scores_against_parameters(axes, tmp_path):
    points = [
        plots.MethodScore("RED", 100, 0.9, 0.1, (110, 0.8)),
        plots.MethodScore("head", 0, 0.5),
        plots.MethodScore("full", 200, None),
    ]
    assert plots.plot_parameters(points, "parameters", "score", tmp_path / "a.png").is_file()
    [found] = axes
    assert (found.get_xscale(), found.get_xlabel(), found.get_ylabel()) == ("log", "parameters", "score")
    assert [text.get_text() for text in found.texts] == ["RED"]
    hollow, dashed = [line for line in found.lines if line.get_label() == "head" or line.get_mfc() == "none"]
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([110], [0.8])
    assert (dashed.get_linestyle(), list(dashed.get_ydata())) == ("--", [0.5, 0.5])


def test_bars_beside_what_was_published(axes, tmp_path):
    panels = {"rte": [plots.Bar(0.9, 0.1, 0.5), plots.Bar(None)], "cola": [plots.Bar(0.4), plots.Bar(0.6)]}
    assert plots.plot_bars(["RED", "LoRA"], panels, "title", tmp_path / "a.png").is_file()
    [found] = axes
    assert found.get_title() == "rte"
    assert [patch.get_height() for patch in found.patches] == [0.9]
    assert [label.get_text() for label in found.get_xticklabels()] == ["RED", "LoRA"]
    assert found.get_ylim() == pytest.approx((0.5 - 0.15 * 0.5, 1.0 + 0.15 * 0.5))


def test_a_picture_of_channels_keeps_outliers_where_many_share_a_dot():
    values = [0.0] * 5000
    values[4321] = -3.0
    figure = plots.channels_figure(
        {"scale": {"0": values, "1": [0.5] * 100}, "bias": {"0": [0.0] * 8, "1": [1.0] * 8}}
    )
    scale, bias = (axes for axes in figure.axes if axes.get_title())
    drawn = scale.images[0].get_array()
    assert drawn.shape == (2, plots.DOTS)
    assert (drawn[0].min(), drawn[0].max()) == (-3, 0)
    assert drawn[0].argmin() == 4321 * plots.DOTS // 5000
    assert bias.images[0].get_array().shape == (2, 8)
    assert [label.get_text() for label in bias.get_yticklabels()] == ["0", "1"]


def test_a_run_without_evaluations_has_a_curve_of_its_loss_alone():
    figures = plots.run_figures([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "accuracy")
    assert list(figures) == ["loss"]
    assert plots.run_figures([], "accuracy") == {}
