"""Experiments and their reports, with jobs that train nothing."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from redpeft.errors import RunError, Stopped
from redpeft.fleet.fleet import MustTrainAlone
from redpeft.runs import experiment, reports


@pytest.fixture
def sweep(tmp_path, tiny_encoder_folder):
    """The call of a sweep over three rates with two seeds."""
    fields = [f"base={tiny_encoder_folder}", "data.path=rows.csv"]
    return ["sweep", *fields, "--grid", "lr=0.001,0.01,0.1", "--seeds", "2", "--out", tmp_path / "out"]


def by_rate(recipe):
    """0.5, 0.8 and 0.6 for the three rates, with 0.1 between two seeds."""
    return {0.001: 0.5, 0.01: 0.8, 0.1: 0.6}[recipe.learning_rate] + 0.1 * recipe.seed


def test_a_sweep_gives_means_deviations_and_the_best(fake_fleets, call, sweep, tmp_path):
    fake_fleets(by_rate)
    code, out, err = call(*sweep)
    assert code == 0, err
    line = next(line for line in out.splitlines() if "learning_rate=0.01 " in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "learning_rate=0.01", "accuracy", "0.8500 ± 0.0707", "0.4250 ± 0.0354", "bleu 0.2500", "2", "0", "best",
    ]  # fmt: skip
    assert out.count(" best ") == 1
    assert f"Best on validation: learning_rate=0.01\nReport: {tmp_path}/out/report.html\n" in out
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert data["best"] == "learning_rate=0.01"
    assert [point["validation"]["mean"] for point in data["points"]] == pytest.approx([0.55, 0.85, 0.65])
    assert [point["values"] for point in data["points"]] == [{"learning_rate": rate} for rate in (0.001, 0.01, 0.1)]
    assert data["points"][0]["seeds"] == [0, 1]
    assert {job["name"]: job["validation"] for job in data["jobs"]}["learning_rate=0.1/seed-1"] == pytest.approx(0.7)
    for picture in ("grid.png", "scores.png", "finished.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_lower_loss_is_better(fake_fleets, call, sweep):
    fake_fleets(by_rate)
    code, out, _ = call(*sweep, "metric=loss", "--json")
    last = json.loads(out.splitlines()[-1])
    assert (code, last["best"]) == (0, "learning_rate=0.001")


def test_json_is_an_event_a_line_and_the_summary_last(fake_fleets, call, sweep, tmp_path):
    def scores(recipe):
        return float("nan") if recipe.seed else 0.5

    fake_fleets(scores)
    code, out, err = call(*sweep, "--json")
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert code == 0
    assert [line.get("event") for line in lines] == ["fleet", *["started", "epoch", "finished"] * 6, None]
    assert lines[-1]["totals"]["examples"] == 48
    assert lines[-1]["report"] == f"{tmp_path}/out/report.html"
    assert "6 of 6: learning_rate=0.1/seed-1: " in err
    assert lines[-2]["validation"]["accuracy"] is None
    assert lines[-3]["eval_loss"] is None


def test_failed_jobs_are_told_after_the_report_and_tried_again(fake_fleets, call, sweep, tmp_path):
    def fails(recipe):
        if recipe.learning_rate == 0.1 or (recipe.learning_rate == 0.01 and recipe.seed):
            raise RunError("the loss is not finite | at step 3")
        return by_rate(recipe)

    trained = fake_fleets(fails)
    code, out, err = call(*sweep)
    assert code == 1
    line = "3 of 6 jobs failed: learning_rate=0.1/seed-0: the loss is not finite | at step 3, "
    assert err.splitlines()[-1].startswith(f"redpeft: {line}")
    assert err.splitlines()[-1].endswith("learning_rate=0.1/seed-1: the loss is not finite | at step 3")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if "=0." in line]
    assert [row[2:] for row in rows[:3]] == [
        [
            "0.5500 ± 0.0707",
            "0.2750 ± 0.0354",
            "bleu 0.2500",
            "2",
            "0",
            "best",
        ],  # the others were not measured in full
        ["0.8000", "0.4000", "bleu 0.2500", "1", "1", ""],
        ["-", "-", "-", "0", "2", ""],
    ]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "6: 3 done, 3 failed, 0 not finished" in page
    assert r"[learning_rate=0.1/seed-1](<learning_rate=0.1/seed-1>) | the loss is not finite \| at step 3 |" in page
    assert len(trained) == 6
    fake_fleets(by_rate)
    assert call(*sweep)[0] == 0


def test_what_is_finished_is_not_done_again_and_more_joins_it(fake_fleets, call, sweep, tmp_path):
    fake_fleets(by_rate)
    assert call(*sweep)[0] == 0
    before = json.loads((tmp_path / "out" / "sweep.json").read_text())
    trained = fake_fleets(by_rate)
    code, out, err = call(*sweep)
    assert (code, trained) == (0, [])
    assert "6 of 6 jobs done already" in err
    assert "best" in out
    after = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert after == before
    sweep[sweep.index("2")] = "3"
    code, _, err = call(*sweep)
    assert (code, len(trained)) == (0, 3)
    assert "6 of 9 jobs done already" in err
    more = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert (more["totals"]["examples"], more["totals"]["began"]) == (72, before["totals"]["began"])
    assert more["totals"]["seconds"] > before["totals"]["seconds"]


def test_an_interrupt_leaves_a_report_on_what_is_done(fake_fleets, call, sweep, tmp_path):
    foreign = tmp_path / "out" / "learning_rate=0.1" / "seed-0" / "foreign.txt"

    def stops(recipe):
        if recipe.learning_rate == 0.1:
            foreign.parent.mkdir(parents=True)
            foreign.touch()  # that the folder is refused now must not hide why the work stopped
            raise Stopped("stopped with 1 job under way; run the same command again to continue")
        return by_rate(recipe)

    fake_fleets(stops)
    code, _, err = call(*sweep)
    assert (code, err.splitlines()[-1].startswith("redpeft: stopped with 1 job")) == (130, True)
    assert "6: 2 done, 0 failed, 4 not finished" in (tmp_path / "out" / "report.md").read_text()
    shutil.rmtree(foreign.parent)
    trained = fake_fleets(by_rate)
    assert call(*sweep)[0] == 0
    assert len(trained) == 4


def test_the_time_before_a_kill_is_not_forgotten(fake_fleets, call, sweep, tmp_path, monkeypatch):
    """Nothing is written after a kill: what was done is noted on the way."""
    monkeypatch.setattr(experiment, "SAVE_EVERY", -1.0)
    fake_fleets(by_rate)
    with monkeypatch.context() as killed:
        killed.setattr("redpeft.runs.sweep.write_report", lambda *_: {})
        assert call(*sweep)[0] == 0
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["totals"]["examples"] == 48
    assert call(*sweep)[0] == 0
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["totals"]["examples"] == 48


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--grid": "epochs=1,2"}, "holds runs with another grid: choose another --out, or keep it the same"),
        ({"--halving": None}, "holds runs with another halving"),
        ({"epochs=9": None}, "learning_rate=0.001/seed-0 holds a run of another recipe (epochs differ)"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(fake_fleets, call, sweep, tmp_path, change, message):
    trained = fake_fleets(by_rate)
    assert call(*sweep)[0] == 0
    asked = list(sweep)
    for name, value in change.items():
        if name in asked:
            asked[asked.index(name) + 1] = value
        else:
            asked.append(name)
    code, out, err = call(*asked)
    assert (code, out, len(trained)) == (2, "", 6)
    assert message in err


def test_a_folder_of_something_else_is_refused(fake_fleets, call, sweep, tmp_path):
    trained = fake_fleets(by_rate)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, out, err = call(*sweep)
    assert (code, out, trained) == (2, "", [])
    assert "out is not empty and holds no sweep: choose another --out" in err
    (tmp_path / "out" / "sweep.json").write_text("[]")
    assert "holds runs with another command, grid, halving" in call(*sweep)[2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"notes.txt", "sweep.json"}


@pytest.fixture
def fleet(tmp_path, tiny_encoder_folder):
    """The call of a fleet of these jobs."""

    def make(*jobs):
        (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
        return ["fleet", tmp_path / "jobs.jsonl", f"base={tiny_encoder_folder}", "data.path=a.csv", "--out", tmp_path / "out"]  # fmt: skip # noqa: E501

    return make


def test_the_report_of_a_fleet(fake_fleets, call, fleet, tmp_path):
    fake_fleets(by_rate)
    call_ = fleet({"name": "a|b", "learning_rate": 0.01}, {"learning_rate": 0.1, "metric": "f1_macro"})
    code, out, err = call(*call_, "--slots", "2", "--tokens", "99")
    assert code == 0, err
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.startswith("# redpeft fleet\n")
    assert r"| [a\|b](<a\|b>) | accuracy | 0.8000 | 0.4000 | bleu 0.2500 | 2 | 10 | 194 | 1.5 |" in page
    assert "| [job-2](<job-2>) | f1_macro | 0.6000 | 0.3000 | bleu 0.2500 | 2 | 10 | 194 | 1.5 |" in page
    assert "| last fleet | 2 slots, passes of 99 tokens |" in page
    assert "| its memory | a slot takes nothing |" in page
    assert re.search(r"\| examples in fleets, trained on or scored \| 16, [\d,]+ a second \|", page)
    assert "| redpeft | 0.1.0 |" in page
    assert "| gpu | " in page
    assert '<a href="job-2">job-2</a>' in (tmp_path / "out" / "report.html").read_text()
    data = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [job["name"] for job in data["jobs"]] == ["a|b", "job-2"]
    assert data["totals"]["slots"] == 2
    for text in ("accuracy", "2: 2 done, 0 failed", f"Report: {tmp_path}/out/report.html"):
        assert text in out


def test_a_long_table_is_cut_on_a_terminal_alone(fake_fleets, call, fleet, tmp_path, monkeypatch):
    fake_fleets(lambda recipe: 0.5)
    monkeypatch.setattr(reports, "SHOWN_JOBS", 2)
    code, out, _ = call(*fleet({}, {}, {}, {}, {}))
    assert code == 0
    assert "job-2" in out
    assert "job-3" not in out
    assert "and 3 more" in out
    assert "job-5" in (tmp_path / "out" / "report.md").read_text()


def test_jobs_that_are_added_to_a_list_join_the_others(fake_fleets, call, fleet, tmp_path):
    trained = fake_fleets(lambda recipe: 0.5)
    assert call(*fleet({"name": "a"}))[0] == 0
    assert call(*fleet({"name": "a"}, {"name": "b"}))[0] == 0
    assert [folder.name for folder in trained] == ["a", "b"]


@pytest.mark.parametrize(
    ("jobs", "more", "message"),
    [
        (
            [{}],
            ["--halving"],
            '--halving compares the jobs of a group, but no job has a group: add "group" to some jobs',
        ),
        ([{"epoch": 1}], [], "jobs.jsonl, line 1: unknown key 'epoch'"),
        ([{"method": "lora"}], [], "jobs.jsonl, line 1: method lora cannot be trained in a fleet"),
        ([{}], ["epochs"], "'epochs' is not of the form key=value"),
        ([{}], ["--slots", "0"], "Invalid value for '--slots'"),
        ([{}], ["--recipe", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        ([], [], "is empty: it holds no jobs"),
    ],
)
def test_a_wrong_call_is_one_line_and_nothing_is_written(fake_fleets, call, fleet, tmp_path, jobs, more, message):
    trained = fake_fleets(lambda recipe: 0.5)
    code, out, err = call(*fleet(*jobs), *more)
    assert (code, out, trained) == (2, "", [])
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_many_processes_are_refused(fake_fleets, call, sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = call(*sweep)
    assert (code, out) == (2, "")
    assert "sweeps and fleets run in one process" in err
    assert not (tmp_path / "out").exists()


def test_halving_needs_jobs_that_a_fleet_can_train(fake_fleets, call, sweep, tmp_path):
    sweep[sweep.index("lr=0.001,0.01,0.1")] = "method=red,lora"
    code, out, err = call(*sweep, "--halving")
    assert (code, out) == (2, "")
    assert "--halving needs jobs that a fleet can train, but method lora cannot be trained in one" in err
    assert not (tmp_path / "out").exists()


def test_what_a_fleet_refuses_by_its_model_is_trained_alone(fake_fleets, call, sweep, tmp_path, monkeypatch):
    def refuses(recipe):
        if recipe.learning_rate == 0.1:
            raise MustTrainAlone("a fleet cannot train Smoothed: train it alone")
        return by_rate(recipe)

    fake_fleets(refuses)
    alone = []

    def run_jobs(jobs):
        alone.extend(job.folder.parent.name for job in jobs)
        return [{"folder": str(job.folder), "error": "not tried", "kind": "RunError"} for job in jobs]

    monkeypatch.setattr(experiment, "run_jobs", run_jobs)
    code, _, err = call(*sweep)
    assert (code, alone) == (1, ["learning_rate=0.1"] * 2)
    assert "2 of 6 jobs failed: learning_rate=0.1/seed-0: not tried" in err


def test_the_best_of_halving_is_the_best_jobs_point(fake_fleets, call, sweep, tmp_path):
    """Points have not trained for as long as each other, so that their means say little."""

    def score(recipe):
        return {0.001: (0.7, 0.7), 0.01: (0.6, 0.75), 0.1: (0.0, 0.4)}[recipe.learning_rate][recipe.seed]

    fake_fleets(score)
    code, out, _ = call(*sweep, "--halving")
    assert code == 0
    assert "Best on validation: learning_rate=0.01\n" in out
    assert "stopped early" in (tmp_path / "out" / "report.md").read_text()
    fake_fleets(lambda recipe: 0.0 if recipe.learning_rate == 0.01 else 0.1)
    sweep[-1] = tmp_path / "losses"
    assert "Best on validation: learning_rate=0.01\n" in call(*sweep, "--halving", "metric=loss")[1]
