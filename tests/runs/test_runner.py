from __future__ import annotations

import json

import pytest

from redpeft.errors import RunError, Stopped, UserError
from redpeft.fleet.queue import Job
from redpeft.runs import runner
from redpeft.runs.runner import jobs_of, run_fleets, run_jobs, run_recipe, summarise
from redpeft.storage import read_result
from redpeft.training.recipe import load_recipe


def recipe(**changes):
    return load_recipe(None, {"base": "m", "data": "d", **changes})


def result(seed, accuracy, **more):
    return {
        "folder": f"seed-{seed}", "task": "classification", "base": "m", "method": "red", "metric": "accuracy",
        "learning_rate": 0.03, "trainable_parameters": 10, "head_parameters": 2, "adapter_bytes": 99, "seed": seed,
        "validation": {"accuracy": accuracy, "loss": None}, "test": None, "best_epoch": 2.0, "seconds": 3.5,
        "seconds_per_step": 0.5, "rows": {"train": 9}, "rows_cut": {"train": seed}, "rows_left_out": {},
        **more,
    }  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """The (seed, folder) that are trained; seed 2 fails, and nothing is computed."""
    seen = []

    def train(recipe, folder, rollout_func=None):
        seen.append((recipe.seed, folder.name))
        if recipe.seed == 2:
            raise RunError("the loss is not finite at step 3")
        if recipe.seed == 9:
            raise KeyboardInterrupt
        if recipe.seed == 8:
            raise Stopped("stopped at step 3")
        return result(recipe.seed, recipe.seed / 10)

    monkeypatch.setattr(runner, "train", train)
    return seen


def test_one_job_for_each_seed(tmp_path):
    assert jobs_of(recipe(seed=4), tmp_path) == [Job(recipe(seed=4), tmp_path)]
    jobs = jobs_of(recipe(seeds=[3, 5, 3]), tmp_path)
    assert [(job.recipe.seed, job.recipe.seeds, job.folder.name) for job in jobs] == [
        (3, None, "seed-3"),
        (5, None, "seed-5"),
    ]


def test_small_batches_are_trained_side_by_side(monkeypatch, trained, tmp_path):
    """Those that a fleet can train, of one kind, and not begun alone; results come in the order of the jobs."""
    seen = []

    def run_fleets(jobs, report):
        seen.extend(job.folder.name for job in jobs)
        return {job.folder: result(job.recipe.seed, 0.5) for job in jobs}

    monkeypatch.setattr(runner, "run_fleets", run_fleets)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    small = {"batch_size": 4}
    jobs = [
        Job(recipe(seed=1, **small), tmp_path / "one"),
        Job(recipe(seed=3, batch_size=32), tmp_path / "large"),
        Job(recipe(seed=4, **small, method="lora"), tmp_path / "lora"),
        Job(recipe(seed=5, **small), tmp_path / "two"),
        Job(recipe(seed=6, **small, base="other"), tmp_path / "other base"),
        Job(recipe(seed=7, **small), tmp_path / "begun"),
    ]
    (tmp_path / "begun" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoints" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    results = run_jobs(jobs)
    assert seen == ["one", "two"]
    assert [name for _, name in trained] == ["large", "lora", "other base", "begun"]
    assert [each["seed"] for each in results] == [1, 3, 4, 5, 6, 7]
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen.clear()
    run_jobs(jobs)
    assert seen == []


def test_what_no_fleet_can_train_is_refused(tmp_path):
    for changes, reason in [
        ({"method": "lora"}, "method lora"),
        ({"task": "e2e"}, "task e2e"),
        ({"task": "text-to-text"}, "task text-to-text"),
        ({"task": "instruction", "packing": True}, "packing"),
        ({"gradient_accumulation": 2}, "gradient_accumulation"),
        ({"base.load_in": "8bit"}, r"base\.load_in"),
        ({"precision": "fp16"}, "precision fp16"),
        ({"init_from": "x"}, "init_from"),
        ({"report_to": "wandb"}, "report_to"),
    ]:
        with pytest.raises(UserError, match=f"job: {reason} cannot be trained in a fleet; use redpeft train"):
            run_fleets([Job(recipe(**changes), tmp_path / "job")])


def test_what_a_fleet_refuses_by_its_model_is_trained_alone(monkeypatch, trained, tmp_path):
    def run_fleets(jobs, report):
        refused = {"error": "a fleet cannot train Smoothed", "kind": "MustTrainAlone", "seed": 3}
        failed = {"error": "no such file", "kind": "UserError", "seed": 1}
        return {job.folder: refused if job.recipe.seed == 3 else failed for job in jobs}

    monkeypatch.setattr(runner, "run_fleets", run_fleets)
    jobs = [Job(recipe(seed=seed, batch_size=4), tmp_path / f"seed-{seed}") for seed in (1, 3)]
    results = run_jobs(jobs)
    assert [seed for seed, _ in trained] == [3]
    assert [each.get("error") for each in results] == ["no such file", None]


def test_a_failed_job_does_not_stop_the_others(trained, tmp_path, capsys):
    summary = run_recipe(recipe(seeds=[1, 2, 3]), tmp_path)
    assert trained == [(1, "seed-1"), (2, "seed-2"), (3, "seed-3")]
    assert summary["seeds"] == [1, 3]
    assert summary["failed"] == {str(tmp_path / "seed-2"): "the loss is not finite at step 3"}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    errors = capsys.readouterr().err
    assert "job 2 of 3" in errors
    assert "seed-2: the loss is not finite" in errors


def test_if_every_job_fails_that_is_the_error(trained, tmp_path):
    with pytest.raises(RunError, match="not finite at step 3"):
        run_recipe(recipe(seeds=[2]), tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(("seed", "signal"), [(9, KeyboardInterrupt), (8, Stopped)])
def test_an_interrupt_or_sigterm_stops_the_list(trained, tmp_path, seed, signal):
    with pytest.raises(signal):
        run_recipe(recipe(seeds=[1, seed, 3]), tmp_path)
    assert [done for done, _ in trained] == [1, seed]


def test_folders_are_checked_before_the_first_job(trained, tmp_path):
    (tmp_path / "seed-3").mkdir()
    recipe(seed=3, epochs=1).save(tmp_path / "seed-3" / "recipe.yaml")
    with pytest.raises(UserError, match="seed-3 holds a run of another recipe"):
        run_jobs(jobs_of(recipe(seeds=[1, 3]), tmp_path))
    assert trained == []


def test_the_summary_is_mean_and_standard_deviation():
    summary = summarise([result(0, 0.5), result(1, 0.9), {"folder": "x", "error": "failed", "seed": 2}])
    assert summary["validation"]["accuracy"] == pytest.approx({"mean": 0.7, "standard_deviation": 0.08**0.5})
    assert summary["validation"]["loss"] == {"mean": None, "standard_deviation": None}
    assert (summary["seconds"], summary["seconds_per_step"]) == (7, 0.5)
    assert (summary["seeds"], summary["best_epoch"], summary["rows_cut"]) == ([0, 1], [2, 2], {"train": 0})
    assert summarise([result(0, 0.5)])["validation"]["accuracy"]["standard_deviation"] is None


def test_seeds_for_real_are_resumed_and_not_repeated(still_encoder, tmp_path):
    rows = [{"text": f"the film is {word}", "label": word} for word in ("good", "bad") * 8]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = recipe(base=str(still_encoder), data=str(tmp_path), seeds=[0, 1], max_steps=2, batch_size=4)
    tmp_path = tmp_path / "runs"
    summary = run_recipe(chosen, tmp_path)
    results = [read_result(tmp_path / f"seed-{seed}") for seed in (0, 1)]
    assert summary["test"]["loss"]["mean"] == pytest.approx(sum(r["test"]["loss"] for r in results) / 2)
    (tmp_path / "seed-1" / "result.json").unlink()
    stamp = (tmp_path / "seed-0" / "result.json").stat().st_mtime_ns
    again = run_recipe(chosen, tmp_path)
    assert again["validation"] == summary["validation"]
    assert (tmp_path / "seed-0" / "result.json").stat().st_mtime_ns == stamp
