"""One job in a fleet: a training loop that asks for its forward passes instead of making them.

`Member._live` reads as a run on its own does: epochs of batches, an evaluation after each, the best one kept, a
snapshot. It is a generator: it yields `Work`, a batch of rows, and is sent an `Answer` once the fleet has computed
them together with other jobs' rows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from transformers import EvalPrediction, get_scheduler
from transformers.trainer_pt_utils import nested_concat

from redpeft.errors import RunError
from redpeft.fleet.adamw import Rates
from redpeft.fleet.fleet import Fleet
from redpeft.fleet.snapshot import Snapshot, read_snapshot, write_snapshot
from redpeft.storage import append_metrics, write_metrics
from redpeft.training.run import Run, best_evaluation, plain_scores, save_model

LOGS = 100  # lines of training loss in a run's metrics.jsonl
KEPT = ("global_step", "epoch", "best_metric", "best_global_step", "log_history")  # of a Trainer's state


@dataclass(frozen=True)
class Work:
    """A batch that a job wants computed: its rows as the collator takes them, to learn from at these rates, or (None)
    to answer."""

    rows: list[dict[str, Any]]
    rates: Rates | None

    @property
    def length(self) -> int:
        """Of the longest row, in tokens."""
        return max(len(row["input_ids"]) for row in self.rows)


@dataclass(frozen=True)
class Answer:
    """What a job gets for its work: its loss and its share of the time; for an evaluation logits and labels too."""

    loss: float
    seconds: float
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class Member:
    """A job in a slot of a fleet, as it was when it was last saved.

    `run` is a run on the fleet's model, whose own adapter is as the job begins. `until` says after how many epochs the
    job is to pause; with `over` it trains no more, and only what follows training is left.
    """

    def __init__(self, run: Run, fleet: Fleet, slot: int, until: float = math.inf, over: bool = False) -> None:
        self.run, self.fleet, self.slot, self.until, self.over = run, fleet, slot, until, over
        self.state = run.trainer.state
        self.best: torch.Tensor | None = None
        self.since_best = 0  # evaluations
        self.seconds, self.began = 0.0, time.perf_counter()
        self.shares: list[float] = []  # of the time of each step
        self.losses: list[float] = []  # since the last line of the log
        trainer, recipe = run.trainer, run.recipe
        splits = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
        splits |= {name: rows for name, rows in run.encoded.items() if name == "test"}
        self.rows = {name: trainer._remove_unused_columns(rows) for name, rows in splits.items()}
        self.steps_per_epoch = math.ceil(len(self.rows["train"]) / recipe.batch_size)
        self.max_steps = recipe.max_steps or math.ceil(recipe.epochs * self.steps_per_epoch)
        self.rate_at = _schedule(trainer.args, self.max_steps)
        self.scores: dict[str, Any] | None = None
        self._life: Any = self._live()
        self._resume()

    def go_on(self, answer: Answer | None = None) -> Work | None:
        """The next batch that the job wants computed, after the answer to the last one; None: it has paused, or where
        `scores` are there, come to its end.

        Raises `RunError` for a loss that is not finite.
        """
        try:
            return self._life.send(answer)
        except StopIteration as end:
            self.scores = end.value
            return None

    def _live(self) -> Generator[Work, Answer, dict[str, Any] | None]:
        """Train, and return the scores of the best epoch; None for a job that pauses."""
        while True:
            if self._validation_is_due():
                yield from self._validate()
                self.save()
            if self._is_over():
                break
            if self.state.global_step >= self.until * self.steps_per_epoch:
                return None
            for rows in self._batches():
                answer = yield Work(rows, self._rates())
                self._learned(answer)
        if self.best is not None:
            self.fleet.state.values[self.slot] = self.best.to(self.fleet.device)
        scores = {**best_evaluation(self.state), "test": None}
        if "test" in self.rows:
            metrics = yield from self._evaluate("test", "test_")
            scores["test"] = plain_scores(metrics, "test_")
        return scores

    def finish(self) -> None:
        """Write the adapter and the result into the run folder."""
        assert self.scores is not None
        self.fleet.copy_to_model(self.slot)
        save_model(self.fleet.model, self.run.learner, self.run.folder)
        step = statistics.median(self.shares) if self.shares else None
        times = {"seconds": round(self._seconds(), 3), "seconds_per_step": step and round(step, 5)}
        self.run.finish(self.scores, times, plots=False)

    def save(self) -> None:
        """Write a snapshot: the job goes on from here when the process dies."""
        progress = {name: getattr(self.state, name) for name in KEPT}
        progress |= {"since_best": self.since_best, "seconds": self._seconds()}
        write_snapshot(self.run.folder, Snapshot(self.fleet.read(self.slot), self.best, progress))

    def _resume(self) -> None:
        snapshot = read_snapshot(self.run.folder)
        if snapshot is None:
            self.fleet.fill(self.slot)
        else:
            self.fleet.fill(self.slot, snapshot.state)
            self.best = snapshot.best
            self.since_best, self.seconds = snapshot.progress["since_best"], snapshot.progress["seconds"]
            for name in KEPT:
                setattr(self.state, name, snapshot.progress[name])
        write_metrics(self.run.folder, self.state.log_history)

    def _is_over(self) -> bool:
        patience = self.run.recipe.early_stopping
        stopped = patience is not None and self.since_best >= patience
        return self.over or stopped or self.state.global_step >= self.max_steps

    def _validation_is_due(self) -> bool:
        """At the end of each epoch and of the last step, once."""
        step = self.state.global_step
        ends = step > 0 and (step % self.steps_per_epoch == 0 or step >= self.max_steps)
        return ends and not any(entry["step"] == step and "eval_loss" in entry for entry in self.state.log_history)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """What is left of this epoch."""
        epoch, done = divmod(self.state.global_step, self.steps_per_epoch)
        order, size = self.run.trainer.order, self.run.recipe.batch_size
        order.set_epoch(epoch)
        rows = list(order)[done * size : (done + self.max_steps - self.state.global_step) * size]
        return _cut(self.rows["train"], rows, size)

    def _rates(self) -> Rates:
        recipe, share = self.run.recipe, self.rate_at(self.state.global_step)
        assert recipe.learning_rate is not None  # of a resolved recipe
        head_rate = recipe.head_lr or recipe.learning_rate
        return Rates(recipe.learning_rate * share, head_rate * share, recipe.weight_decay, recipe.max_grad_norm)

    def _learned(self, answer: Answer) -> None:
        """Count a step that was taken."""
        state = self.state
        if not math.isfinite(answer.loss):
            raise RunError(
                f"the loss is not finite at step {state.global_step + 1}: try a lower learning_rate or precision: fp32"
            )
        rate = self._rates().edit
        state.global_step += 1
        state.epoch = state.global_step / self.steps_per_epoch
        self.shares.append(answer.seconds)
        self.losses.append(answer.loss)
        if state.global_step % max(1, self.max_steps // LOGS) == 0:
            self._log({"loss": statistics.fmean(self.losses), "learning_rate": rate})
            self.losses.clear()
        every = self.run.recipe.save_steps
        if every is not None and state.global_step % every == 0:
            self.save()

    def _validate(self) -> Generator[Work, Answer, None]:
        """Score the validation split, and keep what is trained where it is the best so far."""
        metrics = yield from self._evaluate("validation", "eval_")
        self._log(metrics)
        task, state = self.run.task, self.state
        score, best = metrics[f"eval_{task.metric}"], state.best_metric
        if best is None or (score > best if task.greater_is_better else score < best):
            state.best_metric, state.best_global_step = score, state.global_step
            self.best = self.fleet.read(self.slot).values
            self.since_best = 0
        else:
            self.since_best += 1

    def _evaluate(self, split: str, prefix: str) -> Generator[Work, Answer, dict[str, float]]:
        """The scores that a Trainer's `evaluate` gives."""
        rows, trainer = self.rows[split], self.run.trainer
        losses, logits, labels = [], [], []
        for batch in _cut(rows, range(len(rows)), trainer.args.per_device_eval_batch_size):
            answer = yield Work(batch, None)
            losses += [answer.loss] * len(batch)
            if trainer.compute_metrics is not None:
                logits.append(answer.logits)
                labels.append(answer.labels)
        scores = {"loss": statistics.fmean(losses)}
        if trainer.compute_metrics is not None:
            scores |= trainer.compute_metrics(EvalPrediction(predictions=_join(logits), label_ids=_join(labels)))
        return {f"{prefix}{name}": value for name, value in scores.items()}

    def _log(self, entry: dict[str, Any]) -> None:
        entry = {**entry, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(entry)
        append_metrics(self.run.folder, entry)

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.began


def _cut(rows: Any, order: Sequence[int], size: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of the rows in this order."""
    return (rows.__getitems__(list(order[start : start + size])) for start in range(0, len(order), size))


def _join(parts: Sequence[Any]) -> Any:
    """One array; where rows are of several lengths (in tokens), they are filled up with -100, as a Trainer does."""
    return reduce(partial(nested_concat, padding_index=-100), parts).numpy()


def _schedule(args: Any, steps: int) -> Callable[[int], float]:
    """The share of the learning rate at each step, by transformers' schedules."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler: Any = get_scheduler(args.lr_scheduler_type, optimiser, args.get_warmup_steps(steps), steps)
    return scheduler.lr_lambdas[0]
