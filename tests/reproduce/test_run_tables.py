"""`redpeft reproduce` from end to end, with the smoke budget's tiny models and made-up rows."""

from __future__ import annotations

import json
import sys

import pytest

from redpeft.cli.command import run_app
from redpeft.errors import RunError, Stopped
from redpeft.reproduce import run_tables
from redpeft.reproduce.published import tables
from redpeft.runs import runner
from redpeft.training.train import train

SMOKE = ["reproduce", "glue-roberta-base", "--budget", "smoke", "--tasks", "cola,stsb"]


def call(capsys, *arguments):
    code = run_app([*map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A table's folder after two rows with two seeds."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    assert run_app([*SMOKE[:-1], "stsb", "--rows", "red,head", "--seeds", "42,43", "--out", str(out)]) == 0
    return out


@pytest.fixture
def no_estimate(monkeypatch):
    monkeypatch.setattr(run_tables, "estimate", lambda runs, rows: 1.0)


def test_a_table_is_run_and_reported(done, capsys):
    data = json.loads((done / "glue-roberta-base.json").read_text())
    assert list(data["rows"]) == ["red", "head"]
    for row in ("red", "head"):
        cell = data["rows"][row]["columns"]["stsb"]
        results = [json.loads((done / row / "stsb" / f"seed-{s}" / "result.json").read_text()) for s in (42, 43)]
        scores = [100 * result["test"]["pearson"] for result in results]
        assert list(cell["scores"].values()) == pytest.approx(scores)
        assert cell["mean"] == pytest.approx(sum(scores) / 2)
        assert [result["rows"] for result in results] == [{"train": 32, "validation": 4, "test": 4}] * 2
    assert data["rows"]["red"]["trained_parameters"] == 2 * 32 * 6
    assert data["rows"]["head"]["trained_parameters"] == 0
    assert {path.name for path in done.iterdir() if not path.name.startswith(".")} == {
        "reproduce.json", "red", "head", "glue-roberta-base-columns.png", "glue-roberta-base-parameters.png",
        *(f"glue-roberta-base.{kind}" for kind in ("md", "html", "json")),
    }  # fmt: skip


def test_the_same_call_again_reports_every_finished_run(done, capsys, monkeypatch):
    (done / "glue-roberta-base.md").unlink()
    monkeypatch.setattr(run_tables, "run_jobs", lambda jobs: [pytest.fail("trained") for _ in jobs])
    code, text, err = call(capsys, *SMOKE[:-1], "stsb", "--rows", "red", "--seeds", "42", "--out", done, "--json")
    assert code == 0, err
    assert list(json.loads(text)["rows"]) == ["red", "head"]
    assert "1 run (1 method, 1 data set, 1 seed), 1 of them done; about 0 s for the others" in err
    assert (done / "glue-roberta-base.md").is_file()


def test_an_interrupted_call_continues(tmp_path, capsys, monkeypatch, no_estimate):
    trained = []

    def stop_at_the_second(recipe, folder, rollout_func=None):
        trained.append(folder.parent.name)
        if len(trained) == 2:
            raise Stopped("stopped at step 2")
        return train(recipe, folder)

    monkeypatch.setattr(runner, "train", stop_at_the_second)
    asked = [*SMOKE, "--rows", "head", "--out", tmp_path / "out"]
    code, _, err = call(capsys, *asked)
    assert (code, "stopped at step 2" in err) == (130, True)
    cells = json.loads((tmp_path / "out" / "glue-roberta-base.json").read_text())["rows"]["head"]["columns"]
    assert [len(cells[task]["scores"]) for task in ("cola", "stsb")] == [1, 0]
    monkeypatch.setattr(runner, "train", train)
    code, text, err = call(capsys, *asked)
    assert code == 0, err
    assert "2 runs (1 method, 2 data sets, 1 seed), 1 of them done" in err
    assert "job 1 of" not in err  # one job is left
    assert "Report: " in text


def test_a_failed_run_is_a_failed_cell_and_exit_code_1(tmp_path, capsys, monkeypatch, no_estimate):
    def fail_on_cola(recipe, folder, rollout_func=None):
        if recipe.data.path.endswith("cola"):
            raise RunError("the loss is not finite at step 2")
        return train(recipe, folder)

    monkeypatch.setattr(runner, "train", fail_on_cola)
    asked = [*SMOKE, "--rows", "head", "--out", tmp_path / "out"]
    code, text, err = call(capsys, *asked)
    assert code == 1
    assert "failed / -" in text
    assert err.strip().splitlines()[-1].startswith("redpeft: 1 run failed: ")
    assert "the loss is not finite at step 2" in (tmp_path / "out" / "glue-roberta-base.md").read_text()
    monkeypatch.setattr(runner, "train", train)
    assert call(capsys, *asked)[0] == 0  # done again, and the other is kept


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    asked = [*SMOKE[:-1], "stsb", "--rows", "adapter,head", "adapter:method_options.drop_layers=6"]
    code, text, err = call(capsys, *asked, "--out", tmp_path / "out", "--json")
    assert code == 1
    assert "no estimate of the time: method_options: drop_layers 6 leaves no block" in err
    cells = {row: found["columns"]["stsb"] for row, found in json.loads(text)["rows"].items()}
    assert len(cells["head"]["scores"]) == 1
    assert "leaves no block" in cells["adapter"]["failed"]["42"]


def test_missing_data_and_bases_are_errors_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "data" / "cola").mkdir(parents=True)
    asked = ["reproduce", "glue-roberta-base", "--rows", "red", "--out", tmp_path / "out", "--data", tmp_path / "data"]
    code, _, err = call(capsys, *asked)
    assert (code, "holds no train, validation or test file" in err) == (2, True)
    code, _, err = call(capsys, *SMOKE, "--model", tmp_path / "no-model", "--out", tmp_path / "out")
    assert (code, "no such model folder" in err) == (2, True)
    assert not [path for path in (tmp_path / "out").rglob("*") if ".smoke" not in path.parts]


def test_a_plan_shows_runs_and_time_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    code, text, err = call(capsys, *SMOKE, "--rows", "red", "--plan", "--json", "--out", out, "epochs=2")
    assert code == 0, err
    data = json.loads(text)
    assert [run["run"] for run in data["runs"]] == [str(out / "red" / task / "seed-42") for task in ("cola", "stsb")]
    assert data["runs"][0]["recipe"]["epochs"] == 2
    assert 0 < data["seconds"] < 600
    assert data["problem"] is None
    assert not out.exists()


def test_a_plan_without_the_hub_says_why_there_is_no_estimate(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    code, text, _ = call(
        capsys, "reproduce", "glue-roberta-base", "--rows", "red", "--plan", "--out", tmp_path / "out"
    )
    assert code == 0
    assert "48 runs (1 method, 8 data sets, 15 seeds), 0 of them done; no estimate of the time: no file or" in text


def test_the_list_names_every_table(capsys):
    code, text, _ = call(capsys, "reproduce", "--list", "--json")
    assert code == 0
    data = json.loads(text)["tables"]
    assert set(data) == set(tables())
    assert data["glue-roberta-base"]["runs"] == 8 * 48
    assert all(row["needs"] and row["base"] and row["tasks"] for row in data.values())
    assert "glue-t5-base" in call(capsys, "reproduce", "--list")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the name of one table; `redpeft reproduce --list` shows them"),
        (["epochs=3"], "give the name of one table"),
        (["glue-t5"], "there is no table glue-t5: did you mean glue-t5-base?"),
        (["rank-1", "--seeds", "one"], "--seeds takes whole numbers such as 42,43, not 'one'"),
        (["rank-1", "--rows", "adapter"], "did you mean adapter-r1"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message, capsys, tmp_path):
    code, _, err = call(capsys, "reproduce", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_ray_its_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = call(capsys, *SMOKE, "--rows", "head", "--ray", "--out", tmp_path / "out")
    assert (code, err.strip().splitlines()[-1]) == (2, "redpeft: --ray needs Ray: pip install redpeft[ray]")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("table", list(tables()))
def test_the_smoke_budget_of_each_table(table, tmp_path, capsys):
    if table == "open-llm":
        pytest.importorskip("lm_eval")
    code, text, err = call(capsys, "reproduce", table, "--budget", "smoke", "--json", "--out", tmp_path / "out")
    assert code == 0, err
    rows = json.loads(text)["rows"]
    assert set(rows) == {name for name, row in tables()[table].rows.items() if row.is_published}
    finished = list((tmp_path / "out").glob("*/*/seed-42/result.json"))
    tasks = 2 if table.startswith("glue") or table == "ablation" else 1
    assert len(finished) == tasks * len(rows)
