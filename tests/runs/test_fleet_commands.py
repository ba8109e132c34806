"""`redpeft sweep` and `redpeft fleet` from end to end."""

from __future__ import annotations

import json

import pytest

from redpeft.storage import read_result


@pytest.fixture(scope="module")
def base(tiny_encoder_folder):
    return [f"base={tiny_encoder_folder}", "batch_size=8", "learning_rate=0.1"]


def test_a_sweep_of_two_rates_and_two_seeds_ends_in_a_table(call, base, rows, tmp_path):
    for split, count in {"train": 24, "validation": 8, "test": 8}.items():
        rows(tmp_path / "data" / f"{split}.jsonl", count)
    asked = ["sweep", *base, f"data={tmp_path / 'data'}", "epochs=2", "--grid", "lr=1e-3,0.1", "--seeds", "3,4"]
    code, out, err = call(*asked, "--out", tmp_path / "out")
    assert code == 0, err
    results = {
        (rate, seed): read_result(tmp_path / "out" / f"learning_rate={rate}" / f"seed-{seed}")
        for rate in (0.001, 0.1)
        for seed in (3, 4)
    }
    assert {(result["learning_rate"], result["seed"]) for result in results.values()} == results.keys()
    for rate in (0.001, 0.1):
        mean = sum(results[rate, seed]["validation"]["accuracy"] for seed in (3, 4)) / 2
        line = next(line for line in out.splitlines() if f"learning_rate={rate} " in line)
        assert f"{mean:.4f} ± " in line
    assert "a fleet of 4 slots" in err
    assert (tmp_path / "out" / "grid.png").is_file()


def test_a_sweep_with_what_no_fleet_can_train(call, base, rows, tmp_path):
    rows(tmp_path / "data.jsonl", 20)
    asked = ["sweep", *base, f"data={tmp_path / 'data.jsonl'}", "max_steps=2", "--grid", "method=red,lora"]
    code, out, err = call(*asked, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events[:-1]].count("finished") == 2
    assert {job["name"]: job["steps"] for job in events[-1]["jobs"]} == {
        "method=red/seed-0": 2,
        "method=lora/seed-0": 2,
    }


def test_halving_stops_the_worse_half_early(call, base, rows, tmp_path):
    for split in ("train", "validation"):
        rows(tmp_path / "data" / f"{split}.jsonl", 16)
    asked = ["sweep", *base, f"data={tmp_path / 'data'}", "epochs=4", "--grid", "lr=1e-5,0.1", "--seeds", "2"]
    code, out, err = call(*asked, "--halving", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    epochs = sorted(job["epochs"] for job in summary["jobs"])
    assert epochs == [1, 1, 2, 4]
    longest = next(job for job in summary["jobs"] if job["epochs"] == 4)
    assert summary["best"] == longest["name"].partition("/")[0]
    assert longest["validation"] == max(job["validation"] for job in summary["jobs"])


@pytest.fixture(scope="module")
def customers(tmp_path_factory, rows):
    """Six files of uneven length."""
    folder = tmp_path_factory.mktemp("work") / "customers"
    for number in range(6):
        rows(folder / f"customer-{number}.jsonl", 12 + 8 * number, seed=number)
    return folder


@pytest.fixture
def asked(customers, base):
    """The call that makes six adapters of them."""
    return ["fleet", customers, *base, "epochs=2", "--out", customers.parent / "out"]


def test_a_folder_of_six_files_becomes_six_adapters_that_predict(call, asked, customers):
    code, out, err = call(*asked)
    assert code == 0, err
    assert "6: 6 done, 0 failed, 0 not finished" in out
    folders = sorted(path for path in (customers.parent / "out").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == [f"customer-{number}" for number in range(6)]
    for folder in folders:
        code, out, err = call("predict", folder, customers / f"{folder.name}.jsonl")
        answers = [json.loads(line) for line in out.splitlines()]
        assert (code, len(answers)) == (0, 12 + 8 * int(folder.name[-1]))
        assert {answer["label"] for answer in answers} <= {"negative", "positive"}
    log = (folders[5] / "metrics.jsonl").read_text()
    assert log.count("eval_accuracy") == 2


def test_the_same_call_trains_nothing_again(call, asked, customers, monkeypatch):
    monkeypatch.setattr("redpeft.fleet.scheduler.Scheduler.run", lambda *_: pytest.fail("trained"))
    stamps = {path: path.stat().st_mtime_ns for path in customers.parent.glob("out/*/adapter/*")}
    assert len(stamps) >= 12
    code, out, err = call(*asked)
    assert code == 0, err
    assert "6 of 6 jobs done already" in err
    assert "6: 6 done" in out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_new_customer_and_a_lost_result_are_all_that_is_trained(call, asked, customers, rows):
    rows(customers / "customer-6.jsonl", 16)
    (customers.parent / "out" / "customer-2" / "result.json").unlink()
    code, out, _ = call(*asked, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    started = [event["folder"].rpartition("/")[2] for event in events if event.get("event") == "started"]
    assert sorted(started) == ["customer-2", "customer-6"]


def test_one_broken_file_fails_alone(call, base, rows, tmp_path):
    for name in ("a", "c"):
        rows(tmp_path / "customers" / f"{name}.jsonl", 16)
    (tmp_path / "customers" / "b.jsonl").write_text('{"text": "the film", "label": "x"}\n{"text": \n')
    asked = ["fleet", tmp_path / "customers", *base, "max_steps=2", "--out", tmp_path / "out"]
    code, out, err = call(*asked)
    assert code == 1
    assert "3: 2 done, 1 failed, 0 not finished" in out
    why = "b.jsonl, line 2: broken JSON (Expecting value at column 10)"
    assert err.splitlines()[-1].startswith("redpeft: 1 of 3 jobs failed: b: ")
    assert err.splitlines()[-1].endswith(why)
    assert why in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "b").exists()
    rows(tmp_path / "customers" / "b.jsonl", 16)
    code, out, _ = call(*asked)
    assert (code, "3: 3 done, 0 failed" in out) == (0, True)


def test_jobs_of_a_list_with_a_group(call, base, rows, tmp_path):
    for split in ("train", "validation"):
        rows(tmp_path / "data" / f"{split}.jsonl", 16)
    jobs = [
        {"name": "slow", "learning_rate": 1e-6, "group": "rates"},
        {"name": "fast", "learning_rate": 0.2, "group": "rates"},
        {"name": "other", "seed": 3},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    (tmp_path / "recipe.yaml").write_text(f"data: {tmp_path / 'data'}\nepochs: 4\n")
    asked = ["fleet", tmp_path / "jobs.jsonl", *base, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "out"]
    code, _, err = call(*asked, "--halving", "--slots", "2")
    assert code == 0, err
    epochs = {name: read_result(tmp_path / "out" / name)["epochs"] for name in ("slow", "fast", "other")}
    assert epochs["other"] == 4
    assert sorted((epochs["slow"], epochs["fast"])) == [2, 4]
