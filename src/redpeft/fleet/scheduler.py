"""Trains the jobs of a queue in fleets: jobs enter free slots, train side by side, and leave when they have ended."""

from __future__ import annotations

import shutil
import time
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import Trainer

from redpeft.console import bars_on_terminals_only, counted
from redpeft.errors import RunError, Stopped
from redpeft.fleet.fleet import Fleet, MustTrainAlone
from redpeft.fleet.job import ActiveJob, BatchRequest, BatchResult
from redpeft.fleet.memory import MemoryPlan, plan_memory
from redpeft.fleet.queue import JobLoader, LoadedJob, Queue, Report, silent
from redpeft.fleet.template_model import TemplateModel
from redpeft.storage import CHECKPOINTS, explaining_full_disk, locked, read_result
from redpeft.training.callbacks import stop_on_signals
from redpeft.training.train import TrainingRun

TOKENS, TOKENS_ON_GPU = 512, 16384  # of a pass: enough to keep a CPU, or a GPU, busy
OUT_OF_MEMORY = "its batch does not fit into memory: lower batch_size or max_length"
SLOTS = 64  # enough to find batches of similar length among them


def train_fleets(queue: Queue, slots: int | None = None, tokens: int | None = None, report: Report = silent) -> None:
    """Train all jobs of a queue, one fleet after another for those that cannot share one (another base model, other
    sites, a head of another shape).

    `slots`: jobs side by side, at most (by default as many as help and fit into memory). `tokens`: of one pass,
    padding included. `report` gets what happens: events "fleet", "started", "epoch", "paused", "finished", "failed"
    and "pass".

    A job that fails does not stop the others. Raises `Stopped` on Ctrl-C and SIGTERM, after all active jobs were
    saved, and `UserError` where the slots asked for do not fit into memory.
    """
    bars_on_terminals_only()
    control = SimpleNamespace(terminated=False)
    loader = JobLoader(queue, report)
    refused: dict[Hashable, MustTrainAlone] = {}  # by kind: the model is not loaded again for each job
    with stop_on_signals(control):
        while loaded := loader.next():
            scheduler = None
            with loader.failing(loaded.job):
                if loaded.kind in refused:
                    raise refused[loaded.kind]
                try:
                    scheduler = Scheduler(loader, loaded, slots, tokens, control)
                except MustTrainAlone as error:
                    refused[loaded.kind] = error
                    raise
            if scheduler is not None:
                scheduler.run()


def choose_batch(waiting: Mapping[int, BatchRequest], tokens: int) -> list[int]:
    """The slots whose requests make the next pass. In `waiting` the longest-waiting slot comes first.

    That slot is always chosen, however long its batch is. The others have the same purpose (to train or to evaluate)
    and the lengths nearest to it, so that short rows are not padded to long ones. All together, padded to the
    longest, have at most `tokens` tokens.
    """
    first, *others = waiting
    training = waiting[first].rates is not None
    chosen, rows, longest = [first], len(waiting[first].rows), waiting[first].length
    similar = [slot for slot in others if (waiting[slot].rates is not None) == training]
    for slot in sorted(similar, key=lambda slot: abs(waiting[slot].length - longest)):
        more, length = rows + len(waiting[slot].rows), max(longest, waiting[slot].length)
        if more * length > tokens:
            break
        chosen.append(slot)
        rows, longest = more, length
    return chosen


class Scheduler:
    """One fleet at work: its template model, the active jobs in its slots, and the passes that they ask for."""

    def __init__(
        self, loader: JobLoader, first: LoadedJob, slots: int | None, tokens: int | None, control: SimpleNamespace
    ) -> None:
        self.loader, self.first, self.control = loader, first, control
        self.template = TemplateModel(first.job.recipe, first.task)
        self.first_run = self._prepare(first)
        self.tokens = tokens or (TOKENS_ON_GPU if self.template.device.type != "cpu" else TOKENS)
        self.fleet = self._make_fleet(slots)
        self.jobs: dict[int, ActiveJob] = {}  # by slot; the longest-waiting first

    def run(self) -> None:
        """Until the queue has no more jobs of this kind and all have ended or paused."""
        self._start(self.first, self.first_run)
        while True:
            while self._free_slots() and not self.control.terminated:
                loaded = self.loader.next(self.first.kind)
                if loaded is None:
                    break
                self._start(loaded)
            if self.control.terminated:
                self._stop()
            if not self.jobs:
                return
            self._pass()

    def _prepare(self, loaded: LoadedJob) -> TrainingRun:
        return self.template.prepare(loaded.job.recipe, loaded.job.folder, loaded.task, loaded.splits)

    def _make_fleet(self, slots: int | None) -> Fleet:
        """With as many slots as are asked for, or as help; `NoRoom` where they do not fit into memory."""
        model, autocast = self.template.model, self.template.autocast
        plan = self._measure(Fleet(model, 1, autocast=autocast))
        count = plan.choose(min(self.loader.queue.left(), slots or SLOTS), slots)
        fleet = Fleet(model, count, autocast=autocast)
        fleet.decay(Trainer.get_decay_parameter_names(cast("Trainer", None), model))  # it needs no Trainer
        self.loader.report({"event": "fleet", "slots": count, "tokens": self.tokens, **vars(plan), "plan": str(plan)})
        return fleet

    def _measure(self, fleet: Fleet) -> MemoryPlan:
        """Try a full pass with a fleet of one slot; on a GPU, passes are made smaller until one fits."""
        while True:
            batch, rows = self._full_batch()
            try:
                fleet.check_loss(batch)
                return plan_memory(fleet, batch, rows)
            except torch.OutOfMemoryError:
                if rows <= self.first.job.recipe.batch_size:
                    raise RunError(OUT_OF_MEMORY) from None
                self.tokens //= 2
            torch.cuda.empty_cache()

    def _full_batch(self) -> tuple[dict[str, Any], int]:
        """The longest training row of the first run, repeated until a pass is full: the batch, and its rows. Of text
        every token is learned, as in a pass with a row that has no prompt."""
        dataset = self.first_run.encoded["train"]
        lengths = [len(ids) for ids in dataset["input_ids"]]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        rows = max(self.first.job.recipe.batch_size, self.tokens // lengths[longest])
        batch = self.template.collate([dataset[longest]] * rows)
        if self.first.task.task_type == "CAUSAL_LM":
            batch["labels"] = batch["input_ids"]
        return batch, rows

    def _free_slots(self) -> list[int]:
        return [slot for slot in range(self.fleet.slots) if slot not in self.jobs]

    def _start(self, loaded: LoadedJob, prepared: TrainingRun | None = None) -> None:
        """Put a job into a free slot, and let it run to its first request."""
        folder, lock = loaded.job.folder, ExitStack()
        with self.loader.failing(loaded.job), explaining_full_disk(folder):
            try:
                lock.enter_context(locked(folder))
                run = prepared or self._prepare(loaded)
                run.begin()
                active = ActiveJob(loaded.job, run, self.fleet, self._free_slots()[0], lock)
            except BaseException:
                lock.close()
                raise
            self.jobs[active.slot] = active
            steps = active.max_steps - active.state.global_step
            self.loader.report({"event": "started", "folder": str(folder), "steps": steps, "notes": run.notes})
            self._advance(active)

    def _pass(self) -> None:
        """One forward pass for the longest-waiting job plus jobs of similar length; with a step, where they train."""
        waiting = {slot: active.request for slot, active in self.jobs.items() if active.request is not None}
        slots = choose_batch(waiting, self.tokens)
        began = time.perf_counter()
        try:
            results = self._compute({slot: waiting[slot] for slot in slots})
        except torch.OutOfMemoryError:
            if len(slots) > 1:
                self.tokens //= 2
            else:
                active = self.jobs[slots[0]]
                with self.loader.failing(active.job):
                    raise RunError(OUT_OF_MEMORY) from None
                self._remove(active)
            torch.cuda.empty_cache()
            return
        rows = sum(len(waiting[slot].rows) for slot in slots)
        steps = sum(waiting[slot].rates is not None for slot in slots)
        seconds = time.perf_counter() - began
        self.loader.report({"event": "pass", "rows": rows, "steps": steps, "seconds": seconds})
        for slot, result in results.items():
            self._advance(self.jobs[slot], result)

    def _compute(self, requests: Mapping[int, BatchRequest]) -> dict[int, BatchResult]:
        """The results by slot, of one pass over the rows of all requests."""
        began = time.perf_counter()
        rows = [row for request in requests.values() for row in request.rows]
        owners = [slot for slot, request in requests.items() for _ in request.rows]
        batch = self.template.collate(rows)
        rates = {slot: request.rates for slot, request in requests.items() if request.rates is not None}
        logits = labels = None
        if rates:
            losses = self.fleet.step(batch, owners, rates)
        else:
            losses, found = self.fleet.evaluate(batch, owners)
            logits, labels = found.to(torch.promote_types(found.dtype, torch.float32)).cpu(), batch["labels"]
        seconds_per_row = (time.perf_counter() - began) / len(rows)
        results, start = {}, 0
        for slot, request in requests.items():
            own = slice(start, start := start + len(request.rows))
            parts = (None, None) if logits is None or labels is None else (logits[own], labels[own])
            results[slot] = BatchResult(losses[slot], seconds_per_row * len(request.rows), *parts)
        return results

    def _advance(self, active: ActiveJob, result: BatchResult | None = None) -> None:
        """Let a job run to its next request, to a pause or to its end."""
        self.jobs[active.slot] = self.jobs.pop(active.slot)  # now the last to have its turn
        active.request = None  # also where going on fails
        with self.loader.failing(active.job), explaining_full_disk(active.job.folder):
            active.advance(result)
            if len(active.evaluations) > active.reported:
                active.reported = len(active.evaluations)
                about = {"folder": str(active.job.folder), "metric": active.run.task.metric}
                self.loader.report({"event": "epoch", **about, **active.evaluations[-1]})
            if active.request is None:
                self._end(active)
        if active.request is None:
            self._remove(active)

    def _end(self, active: ActiveJob) -> None:
        """A job has ended, or pauses."""
        folder = active.job.folder
        if active.scores is None:
            score = active.state.best_metric * (1 if active.run.task.greater_is_better else -1)
            self.loader.report({"event": "paused", "folder": str(folder), "epoch": active.state.epoch})
            self.loader.queue.paused(folder, score)
            return
        active.finish()
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        self.loader.done(active.job, read_result(folder))

    def _remove(self, active: ActiveJob) -> None:
        del self.jobs[active.slot]
        active.lock.close()

    def _stop(self) -> None:
        for active in self.jobs.values():
            active.save()
            active.lock.close()
        jobs = counted(len(self.jobs), "job")
        raise Stopped(f"stopped with {jobs} under way; run the same command again to continue")
