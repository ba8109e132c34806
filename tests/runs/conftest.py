"""Small data for many jobs, and a trainer of fleets that computes nothing."""

from __future__ import annotations

import random

import pytest

from helpers.data import sentiment_rows, write_rows
from redpeft.cli.command import run_app


@pytest.fixture(scope="session")
def rows():
    """Write a file of so many rows whose words tell the class."""

    def write(path, count, seed=0):
        write_rows(path, sentiment_rows(count, random.Random(seed), longest=8))
        return path

    return write


@pytest.fixture
def call(capsys):
    """Run a command: (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        code = run_app([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def made_up_result(recipe, score):
    metric = recipe.metric or "accuracy"
    return {
        "task": recipe.task, "base": recipe.base.model, "method": recipe.method, "seed": recipe.seed,
        "metric": metric, "learning_rate": recipe.learning_rate, "steps": 10, "epochs": recipe.epochs,
        "trainable_parameters": 194, "head_parameters": 66, "adapter_bytes": 99, "versions": {"redpeft": "0.1.0"},
        "best_epoch": 2.0, "validation": {metric: score}, "test": {metric: score / 2, "bleu": 0.25},
        "seconds": 1.5, "seconds_per_step": 0.1, "rows": {"train": 8, "validation": 4},
    }  # fmt: skip


@pytest.fixture
def fake_fleets(monkeypatch):
    """Trains nothing: `score(recipe)` is a job's validation score, twice its test score, or the error it raises.

    Returns what to call with `score`, which gives the list of folders as they are "trained".
    """
    from redpeft.errors import RunError, Stopped, UserError
    from redpeft.runs import experiment
    from redpeft.storage import read_result, to_json

    def use(score):
        trained = []

        def run_fleets(jobs, slots, tokens, halving, report):
            failed = {}
            report({"event": "fleet", "slots": slots or 4, "tokens": tokens or 64, "plan": "a slot takes nothing"})
            for job in jobs:
                folder, recipe = job.folder, job.recipe.alone()
                if recipe.result_in(folder):
                    continue
                trained.append(folder)
                report({"event": "started", "folder": str(folder)})
                report({"event": "pass", "rows": 8, "steps": 1, "seconds": 0.1})
                try:
                    result = made_up_result(recipe, score(recipe))
                except Stopped:
                    raise
                except (RunError, UserError) as error:
                    failed[folder] = {"error": str(error), "kind": type(error).__name__}
                    report({"event": "failed", "folder": str(folder), **failed[folder]})
                    continue
                folder.mkdir(parents=True)
                recipe.save(folder / "recipe.yaml")
                (folder / "result.json").write_text(to_json(result))
                report({"event": "epoch", "folder": str(folder), "metric": "loss", "eval_loss": float("nan")})
                report({"event": "finished", "folder": str(folder), **read_result(folder)})
            return failed

        monkeypatch.setattr(experiment, "run_fleets", run_fleets)
        return trained

    return use
