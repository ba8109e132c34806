"""What is known of a batch of jobs while it runs, counted from what `train_fleets` reports."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redpeft.tasks.metrics import LOWER_IS_BETTER

WINDOW = 5.0  # seconds that the speed is taken over


@dataclass
class Tally:
    """Counts of jobs and rows. Called with each event.

    `names` are those of all jobs by their folders, in full; `competing` says whether a best of them means anything.
    """

    names: Mapping[Path, str]
    competing: bool = False
    running: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # why
    scores: dict[str, tuple[str, float]] = field(default_factory=dict)  # the best metric so far
    rows: int = 0  # trained or scored
    steps: int = 0  # of training
    planned: dict[str, int] = field(default_factory=dict)  # steps of the jobs that have started
    fleet: dict[str, Any] = field(default_factory=dict)  # slots, tokens and plan of the last one
    began: float = field(default_factory=time.monotonic)
    _passes: deque[tuple[float, int]] = field(default_factory=deque)

    def __call__(self, event: Mapping[str, Any]) -> None:
        name = self.name_of(event)
        match event["event"]:
            case "fleet":
                self.fleet = {key: event[key] for key in ("slots", "tokens", "plan")}
            case "pass":
                self.rows += event["rows"]
                self.steps += event["steps"]
                self._passes.append((time.monotonic(), event["rows"]))
            case "started":
                self.running.add(name)
                self.failed.pop(name, None)  # in a fleet; it is trained alone
                self.planned.setdefault(name, event.get("steps", 0))
            case "epoch":
                self._score(name, event["metric"], event[f"eval_{event['metric']}"])
            case "paused" | "finished" | "failed" as end:
                self.running.discard(name)
                if end == "finished":
                    self.finished.add(name)
                    self._score(name, event["metric"], event["validation"][event["metric"]])
                elif end == "failed":
                    self.failed[name] = event["error"]

    def name_of(self, event: Mapping[str, Any]) -> str:
        """Of the job that an event is about; empty where it is about none."""
        folder = event.get("folder")
        return self.names.get(Path(folder).resolve(), "") if folder else ""

    @property
    def waiting(self) -> int:
        return len(self.names) - len(self.running) - len(self.finished) - len(self.failed)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def expected_steps(self) -> int:
        """Of all jobs, where those that wait are as long as those that have started."""
        known = sum(self.planned.values())
        return known + known * self.waiting // max(1, len(self.planned))

    def best(self) -> tuple[str, str, float] | None:
        """The best job, its metric and its best score so far; None where the jobs are not of one kind."""
        if not self.competing or len({metric for metric, _ in self.scores.values()}) != 1:
            return None
        name = max(self.scores, key=lambda name: goodness(*self.scores[name]))
        return name, *self.scores[name]

    def rows_a_second(self) -> float:
        """Over the last seconds."""
        now = time.monotonic()
        while self._passes and self._passes[0][0] < now - WINDOW:
            self._passes.popleft()
        return sum(rows for _, rows in self._passes) / min(WINDOW, max(now - self.began, 1e-3))

    def _score(self, name: str, metric: str, score: float | None) -> None:
        if score is not None and (name not in self.scores or goodness(metric, score) > goodness(*self.scores[name])):
            self.scores[name] = metric, score


def goodness(metric: str, score: float) -> float:
    """A number that is larger for a better score."""
    return -score if metric in LOWER_IS_BETTER else score
