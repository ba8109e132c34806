from __future__ import annotations

from pathlib import Path

from redpeft.runs.experiment import JobResult
from redpeft.runs.reports import scores_by_job


def job(name, metric, validation, test=None):
    return JobResult(name, Path(), {"metric": metric, "validation": {metric: validation}, "test": test})


def test_the_best_job_comes_last():
    failed = JobResult("failed", Path(), None, "why")
    by_accuracy = [job("good", "accuracy", 0.9, {"accuracy": 0.8}), job("bad", "accuracy", 0.1), failed]
    assert scores_by_job(by_accuracy) == [
        ("bad", {"validation accuracy": 0.1}),
        ("good", {"validation accuracy": 0.9, "test accuracy": 0.8}),
    ]
    by_loss = [job("good", "loss", 0.1), job("bad", "loss", 0.9)]
    assert [name for name, _ in scores_by_job(by_loss)] == ["bad", "good"]
