"""One job of a fleet as it trains: a training loop that requests its forward passes instead of making them.

`ActiveJob._loop` reads as a run on its own does: epochs of batches, an evaluation after each, the best one kept, a
checkpoint. It is a generator: it yields a `BatchRequest`, and is sent a `BatchResult` once the fleet has computed it
together with batches of other jobs.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import EvalPrediction, TrainerState, get_scheduler
from transformers.trainer_pt_utils import nested_concat

from redpeft.errors import RunError
from redpeft.fleet.adamw import Rates
from redpeft.fleet.fleet import Fleet, SlotState
from redpeft.fleet.queue import Job
from redpeft.storage import CHECKPOINTS, append_metrics, save_tensors, write_metrics
from redpeft.training.callbacks import plain_scores
from redpeft.training.learner import save_model
from redpeft.training.recipe import Recipe
from redpeft.training.train import TrainingRun, best_evaluation
from redpeft.training.trainer import EVALUATION_ROWS, epoch_order, metrics_function

CHECKPOINT = "fleet.safetensors"  # in checkpoints/, written after each epoch
LOSS_LINES = 100  # of a run's metrics.jsonl
KEPT = ("global_step", "epoch", "best_metric", "best_global_step", "log_history")  # of a Trainer's state


class JobCheckpoint(NamedTuple):
    """Where a job stands: its slot, its best values so far (None before the first evaluation), counts and scores."""

    state: SlotState
    best: torch.Tensor | None
    progress: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Replace the checkpoint in a run folder."""
        path = folder / CHECKPOINTS / CHECKPOINT
        path.parent.mkdir(exist_ok=True)
        tensors = self.state._asdict() | ({} if self.best is None else {"best": self.best})
        save_tensors(path, tensors, {"progress": json.dumps(self.progress)})

    @classmethod
    def read(cls, folder: Path) -> JobCheckpoint | None:
        """The checkpoint in a run folder; None where there is none that can be read."""
        try:
            with safe_open(folder / CHECKPOINTS / CHECKPOINT, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                progress = json.loads(file.metadata()["progress"])
        except (OSError, SafetensorError):
            return None
        best = tensors.pop("best", None)
        return cls(SlotState(**tensors), best, progress)


@dataclass(frozen=True)
class BatchRequest:
    """A batch that a job wants computed: its rows as the collator takes them, and the rates to train on them with;
    None: to evaluate them."""

    rows: list[dict[str, Any]]
    rates: Rates | None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row["input_ids"]) for row in self.rows)


@dataclass(frozen=True)
class BatchResult:
    """The loss of a job's batch and its share of the time; for an evaluation the logits and labels too."""

    loss: float
    seconds: float
    logits: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class ActiveJob:
    """A job in a slot of a fleet. It begins from its last checkpoint, or else as the model's own adapter is now.

    `run` is prepared on the fleet's model. `lock` holds the run folder while the job is in the fleet.
    """

    def __init__(self, job: Job, run: TrainingRun, fleet: Fleet, slot: int, lock: ExitStack) -> None:
        self.job, self.run, self.fleet, self.slot, self.lock = job, run, fleet, slot, lock
        self.request: BatchRequest | None = None  # what it waits for
        self.state = TrainerState()
        self.best: torch.Tensor | None = None
        self.since_best = 0  # evaluations
        self.reported = 0  # of the evaluations
        self.seconds, self.began = 0.0, time.perf_counter()
        self.step_seconds: list[float] = []
        self.losses: list[float] = []  # since the last line of the log
        recipe, train = run.recipe, run.encoded["train"]
        self.order = epoch_order(recipe, train)
        self.compute_metrics = metrics_function(run.task, run.learner.tokenizer)
        self.steps_per_epoch = math.ceil(len(train) / recipe.batch_size)
        self.max_steps = recipe.max_steps or math.ceil(recipe.epochs * self.steps_per_epoch)
        self.rate_share = _schedule(recipe, self.max_steps)
        self.scores: dict[str, Any] | None = None
        self._generator: Any = self._loop()
        self._resume()

    def advance(self, result: BatchResult | None = None) -> None:
        """Take the result of the last request, and continue to the next `request`. There is none where the job pauses
        or has ended; a job that has ended has `scores`.

        Raises `RunError` for a loss that is not finite.
        """
        try:
            self.request = self._generator.send(result)
        except StopIteration as end:
            self.request, self.scores = None, end.value

    def _loop(self) -> Generator[BatchRequest, BatchResult, dict[str, Any] | None]:
        """Train, and return the scores of the best epoch; None where the job pauses."""
        while True:
            if self._validation_is_due():
                yield from self._validate()
                self.save()
            if self._is_over():
                break
            if self.state.global_step >= self.job.until * self.steps_per_epoch:
                return None
            for rows in self._batches():
                result = yield BatchRequest(rows, self._rates())
                self._count_step(result)
        if self.best is not None:
            self.fleet.state.values[self.slot] = self.best.to(self.fleet.device)
        scores = {**best_evaluation(self.state), "test": None}
        if "test" in self.run.encoded:
            metrics = yield from self._evaluate("test", "test_")
            scores["test"] = plain_scores(metrics, "test_")
        return scores

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The entries of the log with scores of the validation split, in their order."""
        return [entry for entry in self.state.log_history if "eval_loss" in entry]

    def finish(self) -> None:
        """Write the adapter and the result into the run folder."""
        assert self.scores is not None
        self.fleet.copy_to_model(self.slot)
        save_model(self.fleet.model, self.run.learner, self.run.folder)
        step = statistics.median(self.step_seconds) if self.step_seconds else None
        times = {"seconds": round(self._seconds(), 3), "seconds_per_step": step and round(step, 5)}
        self.run.finish(self.state, self.scores, times, plots=False)

    def save(self) -> None:
        """Write a checkpoint, from which the job continues if the process dies."""
        progress = {name: getattr(self.state, name) for name in KEPT}
        progress |= {"since_best": self.since_best, "seconds": self._seconds()}
        JobCheckpoint(self.fleet.read(self.slot), self.best, progress).write(self.run.folder)

    def _resume(self) -> None:
        checkpoint = JobCheckpoint.read(self.run.folder)
        if checkpoint is None:
            self.fleet.fill(self.slot)
        else:
            self.fleet.fill(self.slot, checkpoint.state)
            self.best = checkpoint.best
            self.since_best, self.seconds = checkpoint.progress["since_best"], checkpoint.progress["seconds"]
            for name in KEPT:
                setattr(self.state, name, checkpoint.progress[name])
        write_metrics(self.run.folder, self.state.log_history)

    def _is_over(self) -> bool:
        patience = self.run.recipe.early_stopping
        stopped = patience is not None and self.since_best >= patience
        return self.job.over or stopped or self.state.global_step >= self.max_steps

    def _validation_is_due(self) -> bool:
        """At the end of each epoch and of the last step, once."""
        step = self.state.global_step
        ends = step > 0 and (step % self.steps_per_epoch == 0 or step >= self.max_steps)
        return ends and all(entry["step"] != step for entry in self.evaluations)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """The rest of this epoch."""
        epoch, done = divmod(self.state.global_step, self.steps_per_epoch)
        size = self.run.recipe.batch_size
        self.order.set_epoch(epoch)
        rows = list(self.order)[done * size : (done + self.max_steps - self.state.global_step) * size]
        return _batched(self.run.encoded["train"], rows, size)

    def _rates(self) -> Rates:
        recipe, share = self.run.recipe, self.rate_share(self.state.global_step)
        assert recipe.learning_rate is not None  # of a resolved recipe
        head_rate = recipe.head_lr or recipe.learning_rate
        return Rates(recipe.learning_rate * share, head_rate * share, recipe.weight_decay, recipe.max_grad_norm)

    def _count_step(self, result: BatchResult) -> None:
        """Record a training step that was made."""
        state = self.state
        if not math.isfinite(result.loss):
            raise RunError(
                f"the loss is not finite at step {state.global_step + 1}: try a lower learning_rate or precision: fp32"
            )
        rate = self._rates().edit
        state.global_step += 1
        state.epoch = state.global_step / self.steps_per_epoch
        self.step_seconds.append(result.seconds)
        self.losses.append(result.loss)
        if state.global_step % max(1, self.max_steps // LOSS_LINES) == 0:
            self._log({"loss": statistics.fmean(self.losses), "learning_rate": rate})
            self.losses.clear()
        every = self.run.recipe.save_steps
        if every is not None and state.global_step % every == 0:
            self.save()

    def _validate(self) -> Generator[BatchRequest, BatchResult, None]:
        """Score the validation split, and keep the values of the slot where they are the best so far."""
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

    def _evaluate(self, split: str, prefix: str) -> Generator[BatchRequest, BatchResult, dict[str, float]]:
        """The scores of a split, as a Trainer's `evaluate` gives them."""
        rows, size = self.run.encoded[split], max(self.run.recipe.batch_size, EVALUATION_ROWS)
        losses, logits, labels = [], [], []
        for batch in _batched(rows, range(len(rows)), size):
            result = yield BatchRequest(batch, None)
            losses += [result.loss] * len(batch)
            if self.compute_metrics is not None:
                logits.append(result.logits)
                labels.append(result.labels)
        scores = {"loss": statistics.fmean(losses)}
        if self.compute_metrics is not None:
            scores |= self.compute_metrics(EvalPrediction(predictions=_join(logits), label_ids=_join(labels)))
        return {f"{prefix}{name}": value for name, value in scores.items()}

    def _log(self, entry: dict[str, Any]) -> None:
        entry = {**entry, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(entry)
        append_metrics(self.run.folder, entry)

    def _seconds(self) -> float:
        return self.seconds + time.perf_counter() - self.began


def _batched(rows: Any, order: Sequence[int], size: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of the rows in this order."""
    return (rows.__getitems__(list(order[start : start + size])) for start in range(0, len(order), size))


def _join(parts: Sequence[Any]) -> Any:
    """One array; rows of different lengths (in tokens) are padded with -100, as a Trainer does."""
    return reduce(partial(nested_concat, padding_index=-100), parts).numpy()


def _schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """step -> the share of the learning rate, by transformers' schedules."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = math.ceil(steps * recipe.warmup) if recipe.warmup < 1 else int(recipe.warmup)
    scheduler: Any = get_scheduler(recipe.schedule, optimiser, warmup, steps)
    return scheduler.lr_lambdas[0]
