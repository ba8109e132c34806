"""Works off a queue of jobs with fleets: jobs enter free slots, train side by side, and leave when they are done."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from redpeft.console import counted
from redpeft.errors import RunError, Stopped
from redpeft.fleet.fleet import Fleet
from redpeft.fleet.job import Answer, Member, Work
from redpeft.fleet.memory import plan_memory
from redpeft.fleet.packing import pack
from redpeft.fleet.source import Assignment, Jobs, Ready, Report, Source, silent
from redpeft.fleet.template_model import Mould, autocast_dtype
from redpeft.storage import CHECKPOINTS, explaining_full_disk, locked, read_result
from redpeft.training.callbacks import bars_on_terminals_only, stop_on_signals
from redpeft.training.run import Run

TOKENS, TOKENS_ON_GPU = 512, 16384  # of a pass: enough to keep a CPU, or a GPU, at work
SLOTS = 64  # enough to find batches of like length among


def train_fleets(source: Source, slots: int | None = None, tokens: int | None = None, report: Report = silent) -> None:
    """Train all jobs of a source, one fleet after another for those that cannot share one (another base model, other
    sites, a head of another shape).

    `slots`: jobs side by side, at most (by default as many as help and fit into memory). `tokens`: of one pass,
    padding included. `report` gets what happens: events "fleet", "started", "epoch", "paused", "finished", "failed"
    and "pass".

    A job that fails does not stop the others. Raises `Stopped` on Ctrl-C and SIGTERM, after all jobs under way were
    saved, and `UserError` where the slots asked for do not fit.
    """
    bars_on_terminals_only()
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    control = SimpleNamespace(terminated=False)
    jobs = Jobs(source, report)
    with stop_on_signals(control):
        while ready := jobs.next():
            crew = None
            with jobs.failing(ready.assignment):
                crew = Crew(jobs, ready, slots, tokens, control)
            if crew is not None:
                crew.run()


@dataclass
class Aboard:
    """A job in a slot, what it waits for, and the lock on its folder."""

    assignment: Assignment
    member: Member
    lock: ExitStack
    work: Work | None = None
    evaluations: int = 0


class Crew:
    """One fleet at work: its model, the members in its slots, and passes over what they wait for."""

    def __init__(
        self, jobs: Jobs, first: Ready, slots: int | None, tokens: int | None, control: SimpleNamespace
    ) -> None:
        self.jobs, self.first, self.control = jobs, first, control
        self.mould = Mould(first.assignment.recipe, first.task)
        self.run_of_first = self._prepare(first)  # its Trainer brings the model to its device
        self.tokens = tokens or (TOKENS_ON_GPU if self.mould.device.type != "cpu" else TOKENS)
        self.fleet = self._fleet(slots)
        self.aboard: dict[int, Aboard] = {}  # those that have waited longest come first

    def run(self) -> None:
        """Until the source has no more jobs of this kind and all are done."""
        self._admit(self.first, self.run_of_first)
        while True:
            while not self.control.terminated and self._free() and (ready := self.jobs.next(self.mould.key)):
                self._admit(ready)
            if self.control.terminated:
                self._stop()
            if not self.aboard:
                return
            self._pass()

    def _prepare(self, ready: Ready) -> Run:
        return self.mould.prepare(ready.assignment.recipe, ready.assignment.folder, ready.task, ready.splits)

    def _fleet(self, slots: int | None) -> Fleet:
        """As many slots as are asked for, or as help; `NoRoom` where they do not fit into memory."""
        model, trainer = self.mould.model, self.run_of_first.trainer
        autocast = autocast_dtype(self.first.assignment.recipe)
        batch, rows = _full_batch(self.run_of_first, self.tokens)
        probe = Fleet(model, 1, autocast=autocast)
        probe.check_loss(batch)
        plan = plan_memory(probe, batch, rows)
        count = plan.choose(min(self.jobs.source.left(), slots or SLOTS), slots)
        fleet = Fleet(model, count, autocast=autocast)
        fleet.decay(trainer.get_decay_parameter_names(model))
        self.jobs.report({"event": "fleet", "slots": count, "tokens": self.tokens, **vars(plan), "plan": str(plan)})
        return fleet

    def _free(self) -> list[int]:
        return [slot for slot in range(self.fleet.slots) if slot not in self.aboard]

    def _admit(self, ready: Ready, prepared: Run | None = None) -> None:
        assignment, lock = ready.assignment, ExitStack()
        with self.jobs.failing(assignment), explaining_full_disk(assignment.folder):
            try:
                lock.enter_context(locked(assignment.folder))
                run = prepared or self._prepare(ready)
                run.begin()
                slot = self._free()[0]
                member = Member(run, self.fleet, slot, assignment.until, assignment.over)
            except BaseException:
                lock.close()
                raise
            self.aboard[slot] = Aboard(assignment, member, lock)
            steps = member.max_steps - member.state.global_step
            about = {"folder": str(assignment.folder), "steps": steps, "notes": run.notes}
            self.jobs.report({"event": "started", **about})
            self._send(slot, None)

    def _pass(self) -> None:
        """One forward pass, with a step where it trains, for who has waited longest and those that go well with it."""
        waiting = {slot: each.work for slot, each in self.aboard.items() if each.work is not None}
        slots = pack(waiting, self.tokens)
        began = time.perf_counter()
        try:
            answers = self._compute(slots, [waiting[slot] for slot in slots])
        except torch.OutOfMemoryError:
            if len(slots) > 1:
                self.tokens //= 2
            else:
                self._fail(slots[0], "its batch does not fit into memory: lower batch_size or max_length")
            torch.cuda.empty_cache()
            return
        rows = sum(len(waiting[slot].rows) for slot in slots)
        steps = sum(waiting[slot].rates is not None for slot in slots)
        self.jobs.report({"event": "pass", "rows": rows, "steps": steps, "seconds": time.perf_counter() - began})
        for slot, answer in answers.items():
            self._send(slot, answer)

    def _compute(self, slots: Sequence[int], works: Sequence[Work]) -> dict[int, Answer]:
        began = time.perf_counter()
        rows = [row for work in works for row in work.rows]
        owners = [slot for slot, work in zip(slots, works, strict=True) for _ in work.rows]
        batch = self._collate(slots[0], rows)
        rates = {slot: work.rates for slot, work in zip(slots, works, strict=True) if work.rates is not None}
        if rates:
            losses = self.fleet.step(batch, owners, rates)
            logits, labels = None, None
        else:
            losses, found = self.fleet.evaluate(batch, owners)
            logits, labels = found.to(torch.promote_types(found.dtype, torch.float32)).cpu(), batch["labels"]
        each = (time.perf_counter() - began) / len(rows)
        answers, start = {}, 0
        for slot, work in zip(slots, works, strict=True):
            own = slice(start, start := start + len(work.rows))
            parts = (None, None) if logits is None or labels is None else (logits[own], labels[own])
            answers[slot] = Answer(losses[slot], each * len(work.rows), *parts)
        return answers

    def _collate(self, slot: int, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The rows of several jobs as one batch: they have one tokenizer, and so one way to pad."""
        batch = self.aboard[slot].member.run.trainer.data_collator(rows)
        return {key: value for key, value in batch.items() if torch.is_tensor(value)}

    def _send(self, slot: int, answer: Answer | None) -> None:
        """Let a job go on with what it waited for, to its next batch, a pause or its end."""
        aboard = self.aboard[slot] = self.aboard.pop(slot)  # the last to have its turn
        work = None
        with self.jobs.failing(aboard.assignment), explaining_full_disk(aboard.assignment.folder):
            work = aboard.work = aboard.member.go_on(answer)
            self._tell(aboard)
            if work is None:
                self._leave(aboard)
        if work is None:
            self._remove(slot)

    def _leave(self, aboard: Aboard) -> None:
        """A job is done, or pauses."""
        member, folder = aboard.member, aboard.assignment.folder
        if member.scores is None:
            score = member.state.best_metric * (1 if member.run.task.greater_is_better else -1)
            self.jobs.report({"event": "paused", "folder": str(folder), "epoch": member.state.epoch})
            self.jobs.source.paused(folder, score)
            return
        member.finish()
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        self.jobs.done(aboard.assignment, read_result(folder))

    def _tell(self, aboard: Aboard) -> None:
        """Report an evaluation that has just been made."""
        evaluations = [entry for entry in aboard.member.state.log_history if "eval_loss" in entry]
        if len(evaluations) > aboard.evaluations:
            folder, metric = str(aboard.assignment.folder), aboard.member.run.task.metric
            self.jobs.report({"event": "epoch", "folder": folder, "metric": metric, **evaluations[-1]})
        aboard.evaluations = len(evaluations)

    def _fail(self, slot: int, why: str) -> None:
        with self.jobs.failing(self.aboard[slot].assignment):
            raise RunError(why)
        self._remove(slot)

    def _remove(self, slot: int) -> None:
        self.aboard.pop(slot).lock.close()

    def _stop(self) -> None:
        for aboard in self.aboard.values():
            aboard.member.save()
            aboard.lock.close()
        jobs = counted(len(self.aboard), "job")
        raise Stopped(f"stopped with {jobs} under way; run the same command again to go on from there")


def _full_batch(run: Run, tokens: int) -> tuple[dict[str, Any], int]:
    """The longest training rows of a run, repeated until a pass is full: the batch, and its rows."""
    dataset = run.trainer._remove_unused_columns(run.trainer.train_dataset)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    rows = max(run.recipe.batch_size, tokens // lengths[longest])
    batch = run.trainer.data_collator([dataset[longest]] * rows)
    return {key: value for key, value in batch.items() if torch.is_tensor(value)}, rows
