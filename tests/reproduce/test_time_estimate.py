from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from redpeft.errors import UserError
from redpeft.fleet.queue import Job
from redpeft.reproduce import time_estimate
from redpeft.reproduce.plan import TableRun
from redpeft.reproduce.time_estimate import Speed, count_rows, estimate
from redpeft.training.recipe import load_recipe


def run(folder, data, **changes):
    recipe = load_recipe(None, {"base": "m", "data": str(data), "batch_size": 10, "epochs": 4, **changes})
    return TableRun("red", Path(data).name, Job(recipe, folder))


@pytest.fixture
def data(tmp_path):
    for task in ("one", "two"):
        (tmp_path / task).mkdir()
        for split, rows in (("train", 95), ("validation", 30), ("test", 50)):
            lines = [json.dumps({"text": f"a {row}", "label": row % 2}) for row in range(rows)]
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_an_estimate_is_steps_and_rows_of_each_run(data, monkeypatch):
    tried = []
    monkeypatch.setattr(
        time_estimate, "_try_steps", lambda recipe: tried.append(recipe.data.path) or Speed(2.0, 0.1, 0.3, 5.0)
    )
    whole = 5 + 4 * 10 * 2 + 4 * 30 * 0.1 + 50 * 0.3
    monkeypatch.setattr(time_estimate, "load_config", lambda *_: None)

    def seconds(runs):
        return estimate(runs, count_rows(runs))

    assert seconds([run(data, data / "one")]) == pytest.approx(whole)
    cut = 5 + 15 * 2 + 2 * 30 * 0.1 + 50 * 0.3  # in the second epoch
    few = 5 + 4 * 2 * 2 + 4 * 30 * 0.1 + 50 * 0.3
    tried.clear()
    runs = [run(data, data / "one"), run(data, data / "one", max_steps=15), run(data, data / "two")]
    runs.append(run(data, data / "two", **{"data.path": str(data / "two"), "data.max_train_rows": 20}))
    assert seconds(runs[:3]) == pytest.approx(2 * whole + cut)
    assert tried == [str(data / "one"), str(data / "two")]  # one of each task
    assert seconds(runs[3:]) == pytest.approx(few)
    assert seconds([]) == 0


def test_equal_questions_count_once(tmp_path):
    pytest.importorskip("sacrebleu")
    for split, rows in (("train", 9), ("validation", 4), ("test", 12)):
        lines = [json.dumps({"mr": f"name[{row % 3}]", "ref": f"It is {row}."}) for row in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    assert time_estimate._rows(run(tmp_path, tmp_path, task="e2e").job.recipe) == {
        "train": 9,
        "validation": 4,
        "test": 3,
    }


def test_a_trial_is_a_preview_of_a_few_steps_and_rows(data, monkeypatch):
    seen, clock = [], iter((100.0, 110.0))
    found = {"seconds_per_step": 0.5, "seconds": 4.6, "seconds_per_validation": 1.6, "seconds_to_test": 2.0}

    def preview(recipe):
        seen.append(recipe)
        return SimpleNamespace(**found, rows={"train": 60, "validation": 16, "test": 8})

    monkeypatch.setattr(time_estimate, "preview", preview)
    monkeypatch.setattr(time_estimate.time, "perf_counter", lambda: next(clock))
    speed = time_estimate._try_steps(run(data, data / "one").job.recipe)
    assert (speed.step, speed.validation, speed.test) == (0.5, pytest.approx(0.1), pytest.approx(0.25))
    assert speed.rest == pytest.approx(10 - 4.6 - 2)
    assert (seen[0].max_steps, seen[0].data.max_train_rows, seen[0].data.max_eval_rows) == (6, 60, 16)


def test_missing_data_and_bases_are_errors(data, tiny_encoder_folder):
    with pytest.raises(UserError, match="no such model folder: ./none"):
        count_rows([run(data, data / "one", base="./none")])
    with pytest.raises(UserError, match="no such file or folder"):
        count_rows(
            [
                run(data, data / "one", base=str(tiny_encoder_folder)),
                run(data, data / "none", base=str(tiny_encoder_folder)),
            ]
        )
