"""Jobs that fail, pause, are stopped or killed: each alone, and none is lost."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpeft.errors import Stopped, UserError
from redpeft.fleet import scheduler, train_fleets
from redpeft.fleet.adamw import Rates
from redpeft.fleet.fleet import Fleet
from redpeft.fleet.job import BatchRequest
from redpeft.fleet.queue import Job
from redpeft.fleet.scheduler import choose_batch
from redpeft.fleet.template_model import TemplateModel
from redpeft.training.train import train


@pytest.mark.usefixtures("in_float64")
def test_a_job_whose_loss_is_not_finite_is_evicted_alone(make_job, queue_of, assert_same):
    jobs = [
        make_job("good", "small", seed=1),
        make_job("broken", "short", seed=2, learning_rate=1e200, max_grad_norm=0, warmup=0, schedule="constant"),
        make_job("other", "large", seed=3),
    ]
    queue = queue_of(jobs)
    train_fleets(queue)
    failed = queue.results["broken"]
    assert failed["kind"] == "RunError"
    assert "the loss is not finite at step" in failed["error"]
    assert "try a lower learning_rate" in failed["error"]
    for job in (jobs[0], jobs[2]):
        alone = job.folder.with_name(f"{job.folder.name}-alone")
        train(job.recipe, alone)
        assert_same(job.folder, alone, 1e-8)


def test_a_job_that_cannot_begin_fails_alone(make_job, queue_of, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "good", "label": "x"}\n{"text": "bad", "label": "x"}\n')
    queue = queue_of(
        [make_job("none", tmp_path / "nowhere"), make_job("good", "tiny"), make_job("one", tmp_path / "data")]
    )
    events = []
    train_fleets(queue, report=events.append)
    assert "no such file or folder" in queue.results["none"]["error"]
    assert "every row has the label 'x'" in queue.results["one"]["error"]
    assert "error" not in queue.results["good"]
    assert [event["event"] for event in events if event["event"] != "pass"] == [
        "failed", "fleet", "started", "failed", *["epoch"] * 3, "finished",
    ]  # fmt: skip


def test_columns_that_nobody_reads_are_named_once(make_job, queue_of, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    rows = [{"text": f"good {number}", "label": number % 2, "source": "web"} for number in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_fleets(queue_of([make_job(name, str(data), max_steps=1) for name in ("one", "two")]))
    assert capsys.readouterr().err.count("rows.jsonl: columns not read: source\n") == 1


def test_a_model_that_adds_a_loss_of_its_own_is_refused(make_job, queue_of, monkeypatch):
    from transformers import BertForSequenceClassification

    forward = BertForSequenceClassification.forward

    @functools.wraps(forward)
    def smoothed(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + 0.01 * output.logits.abs().mean()
        return output

    monkeypatch.setattr(BertForSequenceClassification, "forward", smoothed)
    loaded = []
    monkeypatch.setattr(scheduler, "TemplateModel", lambda *args: loaded.append(TemplateModel(*args)) or loaded[-1])
    queue = queue_of([make_job("job", "tiny"), make_job("other", "tiny", seed=1)])
    train_fleets(queue)
    assert [result["kind"] for result in queue.results.values()] == ["MustTrainAlone"] * 2
    assert len(loaded) == 1
    assert "a fleet cannot train BertForSequenceClassification: its loss of a batch" in queue.results["job"]["error"]


def test_what_is_finished_is_not_trained_again(make_job, queue_of, monkeypatch):
    job = make_job("job", "tiny")
    train_fleets(queue_of([job]))
    monkeypatch.setattr(scheduler, "TemplateModel", lambda *_: pytest.fail("loaded the model"))
    queue = queue_of([job])
    train_fleets(queue)
    assert queue.results["job"]["steps"] == 3


def test_a_folder_in_use_is_left_alone(make_job, queue_of):
    from redpeft.storage import locked

    jobs = [make_job("used", "tiny"), make_job("free", "tiny")]
    queue = queue_of(jobs)
    with locked(jobs[0].folder):
        train_fleets(queue)
    assert "another process is at work" in queue.results["used"]["error"]
    assert "error" not in queue.results["free"]


@pytest.mark.usefixtures("in_float64")
def test_after_sigterm_every_job_goes_on_from_its_last_step(make_job, queue_of, assert_same, monkeypatch):
    jobs = [make_job("a", "small", seed=1), make_job("b", "large", seed=2), make_job("c", "short", seed=3)]
    steps, step = [], Fleet.step

    def stopping(self, batch, slots, rates):
        steps.append(len(rates) if self.slots > 1 else 0)  # not the probe of the memory
        if self.slots > 1 and sum(steps) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, slots, rates)

    monkeypatch.setattr(Fleet, "step", stopping)
    with pytest.raises(Stopped, match="stopped with 3 jobs under way; run the same command again"):
        train_fleets(queue_of(jobs), tokens=1)
    queue = queue_of(jobs)
    train_fleets(queue, tokens=1)
    assert sum(steps) == sum(result["steps"] for result in queue.results.values())
    for job in jobs:
        alone = job.folder.with_name(f"{job.folder.name}-alone")
        train(job.recipe, alone)
        assert_same(job.folder, alone, 1e-8)
        assert not (job.folder / "checkpoints").exists()


def test_a_killed_process_loses_at_most_an_epoch_of_each_job(make_job, queue_of, tmp_path):
    """Killed without a word after the first results; what is left ends as if nothing had been."""
    jobs = [make_job(f"job{seed}", "small", seed=seed, epochs=30) for seed in range(3)]
    jobs.append(make_job("first", "tiny", epochs=1))
    code = "\n".join(
        [
            "import sys; sys.path[:0] = sys.argv[2:]",
            "import json, pathlib",
            "from conftest import ListQueue",
            "from redpeft.fleet import train_fleets",
            "from redpeft.fleet.queue import Job",
            "from redpeft.training.recipe import Recipe",
            "jobs = [Job(Recipe(**r), pathlib.Path(f)) for r, f in json.loads(sys.argv[1])]",
            "train_fleets(ListQueue(jobs))",
        ]
    )
    listed = json.dumps([[job.recipe.model_dump(), str(job.folder)] for job in jobs])
    here = Path(__file__).parent
    process = subprocess.Popen([sys.executable, "-c", code, listed, str(here), str(here.parent)])
    snapshots = [job.folder / "checkpoints" / "fleet.safetensors" for job in jobs[:3]]
    deadline = time.monotonic() + 120
    while not ((jobs[3].folder / "result.json").exists() and all(path.exists() for path in snapshots)):
        assert process.poll() is None, "it came to its end before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = [job for job in jobs if not (job.folder / "result.json").exists()]
    assert left, "all had come to their end"
    queue = queue_of(jobs)
    train_fleets(queue)
    assert {result["steps"] for name, result in queue.results.items() if name != "first"} == {90}
    for job in jobs[:3]:
        log = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        assert [entry["epoch"] for entry in log if "eval_loss" in entry] == list(range(1, 31))


@pytest.mark.usefixtures("in_float64")
def test_a_job_pauses_and_goes_on_or_ends(make_job, queue_of, assert_same):
    long, short = make_job("long", "small", epochs=5), make_job("short", "small", epochs=5, seed=1)
    queue = queue_of([Job(job.recipe, job.folder, until=2) for job in (long, short)])
    train_fleets(queue)
    assert queue.scores.keys() == {"long", "short"}
    assert queue.results == {}
    queue = queue_of([long, Job(short.recipe, short.folder, over=True)])
    train_fleets(queue)
    assert queue.results["short"]["epochs"] == 2
    assert queue.results["long"]["epochs"] == 5
    alone = long.folder.with_name("alone")
    train(long.recipe, alone)
    assert_same(long.folder, alone, 1e-8)


def test_slots_that_do_not_fit_are_refused(make_job, queue_of, monkeypatch):
    monkeypatch.setattr("redpeft.fleet.memory.free_memory", lambda device: 3_000)
    queue = queue_of([make_job("a", "tiny"), make_job("b", "tiny")])
    with pytest.raises(
        UserError, match=r"2 slots cannot fit into memory: a slot takes .* ask for at most 0 \(--slots\)"
    ):
        train_fleets(queue, slots=2)
    assert queue.results == {}


def test_a_pass_that_does_not_fit_is_made_smaller(make_job, queue_of, monkeypatch):
    """What a GPU does when it is full."""
    step, sizes = Fleet.step, []

    def full(self, batch, slots, rates):
        sizes.append(len(rates))
        if self.slots > 1 and len(rates) > 2:
            raise torch.OutOfMemoryError
        return step(self, batch, slots, rates)

    monkeypatch.setattr(Fleet, "step", full)
    queue = queue_of([make_job(str(seed), "small", seed=seed, epochs=1) for seed in range(6)])
    train_fleets(queue)
    assert max(sizes) > 2
    assert all("error" not in result for result in queue.results.values())


def test_the_first_pass_is_made_smaller_until_it_fits(make_job, queue_of, monkeypatch):
    step, most = Fleet.step, 6

    def full(self, batch, slots, rates):
        if len(slots) > most:
            raise torch.OutOfMemoryError
        return step(self, batch, slots, rates)

    monkeypatch.setattr(Fleet, "step", full)
    events, queue = [], queue_of([make_job("job", "tiny", batch_size=2)])
    train_fleets(queue, report=events.append)
    assert "error" not in queue.results["job"]
    assert [event["tokens"] for event in events if event["event"] == "fleet"] < [scheduler.TOKENS]
    most = 0
    queue = queue_of([make_job("other", "tiny")])
    train_fleets(queue)
    assert "its batch does not fit into memory: lower batch_size or max_length" in queue.results["other"]["error"]


def test_a_fleet_of_one_batch_that_does_not_fit(make_job, queue_of, monkeypatch):
    step = Fleet.step

    def full(self, batch, slots, rates):
        if self.slots > 1 and len(slots) > 4:
            raise torch.OutOfMemoryError
        return step(self, batch, slots, rates)

    monkeypatch.setattr(Fleet, "step", full)
    queue = queue_of([make_job("big", "large", batch_size=16), make_job("good", "small")])
    train_fleets(queue)
    assert "its batch does not fit into memory: lower batch_size or max_length" in queue.results["big"]["error"]
    assert "error" not in queue.results["good"]


def request(rows, length, training=True):
    return BatchRequest([{"input_ids": [1] * length}] * rows, Rates(0.1, 0.1) if training else None)


def test_batches_of_like_length_go_together():
    waiting = {0: request(4, 10), 1: request(4, 60), 2: request(4, 12), 3: request(4, 9), 4: request(4, 11)}
    assert choose_batch(waiting, tokens=200) == [0, 3, 4, 2]
    assert choose_batch(waiting, tokens=100) == [0, 3]
    assert choose_batch({1: waiting[1], **waiting}, tokens=200) == [1]


def test_learning_and_scoring_do_not_mix():
    waiting = {5: request(2, 8, training=False), 6: request(2, 8), 7: request(2, 8, training=False)}
    assert choose_batch(waiting, tokens=10**6) == [5, 7]


def test_a_batch_that_is_too_long_goes_alone():
    assert choose_batch({3: request(8, 500), 1: request(1, 499)}, tokens=64) == [3]


requests = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 80), st.booleans()), min_size=1, max_size=12)


@given(requests=requests, tokens=st.integers(1, 2000))
def test_everyone_has_a_turn_and_no_pass_is_too_large(requests, tokens):
    waiting = {slot: request(*each) for slot, each in enumerate(requests)}
    passes = 0
    while waiting:
        chosen = choose_batch(waiting, tokens)
        assert chosen[0] == next(iter(waiting))
        assert len({waiting[slot].rates for slot in chosen}) == 1
        rows = sum(len(waiting[slot].rows) for slot in chosen)
        assert len(chosen) == 1 or rows * max(waiting[slot].length for slot in chosen) <= tokens
        for slot in chosen:
            del waiting[slot]
        passes += 1
    assert passes <= len(requests)
