"""Jobs on a local Ray cluster of two workers."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from redpeft.errors import UserError
from redpeft.fleet.queue import Job
from redpeft.runs.on_ray import run_fleets_on_ray, run_on_ray
from redpeft.training.recipe import load_recipe


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--ray needs Ray: pip install redpeft\[ray\]"):
        run_on_ray([])


def test_a_cluster_that_cannot_be_reached_is_one_line(monkeypatch):
    def init(**_):
        raise ConnectionError("Could not find any running Ray instance at nowhere:6379.\nMore.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(UserError, match=r"no Ray cluster can be reached or started: Could not find .*6379\.$"):
        run_on_ray([])


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def recipe(tmp_path, tiny_encoder_folder):
    lines = [
        json.dumps({"text": f"the film is {word} {n}", "label": word}) for n in range(40) for word in ("good", "bad")
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    base = {"base": str(tiny_encoder_folder), "data.train": str(tmp_path / "train.jsonl"), "epochs": 2}
    return lambda **changes: load_recipe(None, {**base, **changes})


def holder(folder, stop):
    """The worker that holds the lock of a run folder, once the run has a checkpoint."""
    while not stop.is_set():
        written = (folder / "checkpoints").glob("*")
        if any(path.name == "fleet.safetensors" or (path / "trainer_state.json").exists() for path in written):
            for process in psutil.Process().children(recursive=True):
                try:
                    if any(file.path == str(folder / ".lock") for file in process.open_files()):
                        return process
                except psutil.Error:
                    continue
        time.sleep(0.02)
    return None


@pytest.mark.slow
def test_jobs_are_spread_and_a_killed_workers_run_goes_on(cluster, recipe, tmp_path, capsys):
    long = Job(recipe(epochs=40, save_steps=5, seed=1), tmp_path / "long")
    jobs = [long, *(Job(recipe(seed=seed), tmp_path / f"short-{seed}") for seed in (2, 3))]
    jobs.append(Job(recipe(**{"data.text": "no-column"}), tmp_path / "wrong"))
    killed, stop = [], threading.Event()

    def kill():
        if process := holder(long.folder, stop):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        results = run_on_ray(jobs)
    finally:
        stop.set()
        killer.join()
    assert killed
    assert [result["seed"] for result in results] == [1, 2, 3, 0]
    assert results[0]["epochs"] == 40
    logged = [json.loads(line) for line in (long.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in logged if "loss" in line]
    assert steps == sorted(set(steps))  # what was done after the last checkpoint is done, and told, once
    assert [result.get("kind") for result in results] == [None, None, None, "UserError"]
    assert "has no column 'no-column'" in results[3]["error"]
    assert "job 4 of 4: " in capsys.readouterr().err
    again = run_on_ray(jobs[:3])  # finished ones are not trained again
    assert [result["seconds"] for result in again] == [result["seconds"] for result in results[:3]]


@pytest.mark.slow
def test_a_folder_of_another_recipe_is_found_out_before_anything_runs(cluster, recipe, tmp_path):
    recipe(epochs=1).save(tmp_path / "recipe.yaml")
    (tmp_path / "run").mkdir()
    recipe(epochs=9).save(tmp_path / "run" / "recipe.yaml")
    with pytest.raises(UserError, match="holds a run of another recipe"):
        run_on_ray([Job(recipe(), tmp_path / "other"), Job(recipe(), tmp_path / "run")])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_fleets_pull_from_one_queue_and_a_killed_one_loses_no_job(cluster, recipe, tmp_path):
    """Two workers; the one with the long job is killed after its first snapshot, and with it all that it had taken."""
    jobs = [
        Job(recipe(epochs=60 if seed == 0 else 3, seed=seed, batch_size=8), tmp_path / f"job-{seed}")
        for seed in range(8)
    ]
    jobs.append(Job(recipe(**{"data.text": "no-column"}), tmp_path / "wrong"))
    killed, stop, events = [], threading.Event(), []

    def kill():
        if process := holder(jobs[0].folder, stop):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)

    watch = threading.Thread(target=kill)
    watch.start()
    try:
        results = run_fleets_on_ray(jobs, slots=3, report=events.append)
    finally:
        stop.set()
        watch.join()
    assert killed, "the long job came to its end before its worker could be killed"
    assert results.keys() == {job.folder for job in jobs}
    assert "no column" in results[tmp_path / "wrong"]["error"]
    assert [results[job.folder]["epochs"] for job in jobs[:-1]] == [60, *[3] * 7]
    log = [json.loads(line) for line in (jobs[0].folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log if "eval_loss" in entry] == list(range(1, 61))
    done = [event["folder"] for event in events if event["event"] in ("finished", "failed")]
    assert sorted(done) == sorted(str(job.folder) for job in jobs)
    assert len({event["slots"] for event in events if event["event"] == "fleet"}) == 1
