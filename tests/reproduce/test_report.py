from __future__ import annotations

import json
import math

import numpy as np
import pytest

from helpers.table_runs import asked, fake_run
from redpeft.reproduce.plan import Request
from redpeft.reproduce.published import Column, find_table
from redpeft.reproduce.report import Cell, average, beside_head, cell, finished_runs, make_report, sampling_error

GLUE = find_table("glue-roberta-base")


def cell_of(scores, best=None):
    return Cell(dict(enumerate(scores)), {}, {}, best)


def test_best_five_of_fifteen_and_the_mean_of_all(tmp_path):
    scores = np.random.default_rng(0).uniform(0.1, 0.7, 15)
    for seed, score in enumerate(scores, start=42):
        fake_run(tmp_path, "red", "cola", seed, {"matthews": score}, metric="matthews")
    [(key, runs)] = finished_runs(GLUE, tmp_path).items()
    assert key == ("red", "cola")
    assert [run.seed for run in runs] == list(range(42, 57))
    found = cell(GLUE, Column("cola"), runs, {})
    highest = np.sort(100 * scores)[-5:]
    assert found.headline == pytest.approx(highest.mean())
    assert found.headline_deviation == pytest.approx(highest.std(ddof=1))
    assert found.mean == pytest.approx(100 * scores.mean())
    assert found.deviation == pytest.approx(100 * scores.std(ddof=1))
    assert found.is_chosen


@pytest.mark.parametrize("count", [1, 3, 5])
def test_all_seeds_count_when_there_are_no_more_than_the_best_k(count):
    found = cell_of([float(x) for x in range(count)], best=5)
    assert not found.is_chosen
    assert found.headline == found.mean == pytest.approx((count - 1) / 2)
    assert (found.deviation is None) == (count == 1)


def test_negative_scores_are_the_worst_ones():
    assert cell_of([-0.3, 0.2, -0.1], best=2).chosen == [0.2, -0.1]


def test_a_cell_without_runs_has_no_scores():
    found = cell_of([])
    assert (found.mean, found.headline, found.deviation) == (None, None, None)
    assert average([cell_of([1.0]), found]) is None
    assert average([cell_of([1.0]), cell_of([4.0])]) == 2.5
    assert average([]) is None


def test_a_missing_score_is_an_empty_cell(tmp_path):
    table = find_table("e2e-gpt2-medium")
    fake_run(tmp_path, "red", "e2e", 42, {"loss": 1.0, "bleu": 60.5, "nist": 8.1, "meteor": None}, metric="loss")
    runs = finished_runs(table, tmp_path)["red", "e2e"]
    cells = [cell(table, column, runs, {}).headline for column in table.columns]
    assert cells == [60.5, 8.1, None, None, None]


def test_without_a_test_split_validation_counts(tmp_path):
    fake_run(tmp_path, "red", "sst2", 1, None)
    runs = finished_runs(GLUE, tmp_path)["red", "sst2"]
    assert cell(GLUE, Column("sst2"), runs, {}).headline == 50


def test_unfinished_and_unknown_folders_are_not_runs(tmp_path):
    fake_run(tmp_path, "red", "sst2", 1, {"accuracy": 0.9})
    fake_run(tmp_path, "not-a-row", "sst2", 1, {"accuracy": 0.9})
    (tmp_path / "lora" / "sst2" / "seed-3").mkdir(parents=True)  # not finished
    assert list(finished_runs(GLUE, tmp_path)) == [("red", "sst2")]


def test_scores_of_a_judge_become_cells(tmp_path):
    table = find_table("mt-bench")
    folder = fake_run(tmp_path, "red", "ultrafeedback", 42, None, metric="loss")
    (folder / "mt-bench-scores.json").write_text(json.dumps({"turn_1": 5.5, "turn_2": 3, "average": 4.25}))
    runs = finished_runs(table, tmp_path)["red", "ultrafeedback"]
    assert [cell(table, column, runs, {}).headline for column in table.columns] == [5.5, 3.0, 4.25]


def test_the_standard_error_from_the_number_of_test_rows(tmp_path):
    fake_run(tmp_path, "red", "sst2", 1, {"accuracy": 0.9})
    fake_run(tmp_path, "red", "stsb", 1, {"pearson": 0.8}, metric="pearson")
    fake_run(tmp_path, "red", "cola", 1, {"matthews": 0.8}, metric="matthews")
    runs = {task: found[0] for (_, task), found in finished_runs(GLUE, tmp_path).items()}
    assert sampling_error(runs["sst2"]) == pytest.approx(math.sqrt(0.9 * 0.1 / 101))
    assert sampling_error(runs["stsb"]) == pytest.approx(0.36 / 10)
    assert sampling_error(runs["cola"]) is None


def test_parameters_are_counted_without_the_head():
    result = {"method": "red", "trainable_parameters": 1384, "head_parameters": 1000}
    assert beside_head(result) == 384
    assert beside_head({**result, "method": "full"}) == 1384


def test_all_columns_have_the_printed_average(tmp_path):
    for task in GLUE.tasks:
        fake_run(tmp_path, "red+", task, 42, {"accuracy": 0.8})
    report = make_report(Request(GLUE, tmp_path), [], {})
    [line] = report.lines
    assert line.average() == pytest.approx(80)
    assert line.published_average(GLUE) == 85.0  # as printed; the mean of the columns is 84.99


def test_other_tasks_in_the_folder_are_left_out(tmp_path):
    fake_run(tmp_path, "red", "sst2", 42, {"accuracy": 0.8})
    fake_run(tmp_path, "red", "ag_news", 42, {"accuracy": 0.8})
    shown = make_report(Request(GLUE, tmp_path), [asked(tmp_path, "red", "sst2", 42)], {})
    assert [column.task for column in shown.columns] == ["sst2"]
    both = make_report(Request(GLUE, tmp_path), [asked(tmp_path, "red", "ag_news", 42)], {})
    assert [column.task for column in both.columns] == ["sst2", "ag_news"]
