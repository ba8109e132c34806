"""A job gives the same adapter in a fleet as `redpeft train` gives alone.

Adam turns the rounding noise of a gradient near zero into a full step, so this is shown in float64, without dropout.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from redpeft.fleet import queue as fleet_queue
from redpeft.fleet import template_model, train_fleets
from redpeft.training.train import train

EXACT = 1e-8


def both(jobs, queue_of, assert_same, atol, **options):
    """Train the jobs in fleets and alone, and compare each one's folders."""
    queue = queue_of(jobs)
    train_fleets(queue, **options)
    assert [result for result in queue.results.values() if "error" in result] == []
    assert len(queue.results) == len(jobs)
    for each in jobs:
        alone = each.folder.with_name(f"{each.folder.name}-alone")
        train(each.recipe, alone)
        assert_same(each.folder, alone, atol)
    return queue


@pytest.mark.usefixtures("in_float64")
class TestFloat64:
    def test_jobs_that_differ_in_everything(self, make_job, queue_of, assert_same):
        """Data, lengths, batch sizes, epochs, seeds, rates, schedules, clipping, decay; more jobs than slots."""
        jobs = [
            make_job("a", "small", seed=1),
            make_job("b", "large", seed=2, batch_size=5, learning_rate=0.1, schedule="cosine", epochs=2),
            make_job("c", "short", seed=3, batch_size=1, head_lr=0.01, warmup=0, max_grad_norm=0),
            make_job("d", "tiny", seed=4, epochs=7, weight_decay=0.1, schedule="constant"),
            make_job("e", "large", seed=5, max_steps=11, max_grad_norm=0.05, warmup=4),
            make_job("f", "short", seed=6, epochs=2.5, group_by_length=False, max_length=6, early_stopping=1),
        ]
        both(jobs, queue_of, assert_same, EXACT, slots=4, tokens=200)

    def test_identical_jobs(self, make_job, queue_of, assert_same, adapter_tensors):
        jobs = [make_job(name, "small", seed=3) for name in "abc"]
        both(jobs, queue_of, assert_same, EXACT)
        assert_same(jobs[0].folder, jobs[1].folder, 1e-12)
        moved = [tensor for key, tensor in adapter_tensors(jobs[0].folder).items() if key.endswith(".scale_offset")]
        assert all(0.001 < step.abs().max() < 1 for step in moved)

    def test_jobs_with_the_same_rows_read_them_once(self, make_job, queue_of, assert_same, monkeypatch):
        """Rows are other ones by the seed, which draws the validation rows, and are cut at another length."""
        calls = Counter()

        def counted(module, name):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *given: calls.update([name]) or function(*given))

        jobs = [make_job(f"rate-{rate}", "small", learning_rate=rate, epochs=2) for rate in (0.01, 0.02, 0.03)]
        jobs += [make_job("cut", "small", max_length=5), make_job("seed", "small", seed=1)]
        counted(fleet_queue, "read_task")
        counted(template_model, "prepare")
        counted(template_model, "calibrate")
        both(jobs, queue_of, assert_same, EXACT)
        assert calls == {"read_task": 3, "prepare": 3, "calibrate": 3}

    @pytest.mark.parametrize("tokens", [1, 10**6])
    def test_one_at_a_time_and_all_at_once(self, make_job, queue_of, assert_same, tokens):
        jobs = [make_job(str(seed), "short", seed=seed, epochs=2) for seed in range(4)]
        both(jobs, queue_of, assert_same, EXACT, tokens=tokens)

    def test_heads_of_other_shapes_get_a_fleet_of_their_own(self, make_job, queue_of, assert_same):
        jobs = [make_job("two", "small"), make_job("three", "three"), make_job("more", "tiny", epochs=4)]
        events = []
        both(jobs, queue_of, assert_same, EXACT, report=events.append)
        assert [event["slots"] for event in events if event["event"] == "fleet"] == [3, 1]

    @pytest.mark.parametrize(
        "options",
        [
            {"use_scale": False},
            {"use_bias": False},
            {"unit": 1.0},
            {"sites": "red+"},
            {"layers_to_transform": [1]},
        ],
        ids=str,
    )
    def test_ablations_and_other_sites(self, options, make_job, queue_of, assert_same):
        jobs = [make_job(str(seed), "small", seed=seed, method_options=options) for seed in range(2)]
        both(jobs, queue_of, assert_same, EXACT)

    def test_the_last_layer_of_a_head_alone(
        self, tiny_tokenizer, data_sets, tmp_path, queue_of, assert_same, make_job
    ):
        """RoBERTa's head has two layers; the first, new here, is the same for all jobs and stays as it was drawn."""
        import torch
        from transformers import RobertaConfig, RobertaModel

        config = RobertaConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=70, pad_token_id=0, type_vocab_size=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        torch.manual_seed(1)
        RobertaModel(config).save_pretrained(tmp_path / "roberta")
        tiny_tokenizer.save_pretrained(tmp_path / "roberta")
        jobs = [
            make_job(f"{head}{seed}", "small", seed=seed, base=str(tmp_path / "roberta"), head=head)
            for seed in range(2)
            for head in ("all", "last")
        ]
        both(jobs, queue_of, assert_same, EXACT)
        heads = {job.folder.name: _head_parameters(job.folder) for job in jobs}
        assert heads == {"all0": 32 * 33 + 66, "all1": 32 * 33 + 66, "last0": 66, "last1": 66}

    def test_regression_and_label_sets(self, make_job, queue_of, assert_same, tmp_path):
        for name, values in {"number": [0.5, 1.25, 4.0], "sets": [["a"], ["a", "b"], []]}.items():
            (tmp_path / name).mkdir()
            for split, count in {"train": 14, "validation": 6}.items():
                rows = [{"text": "the film is good " * (1 + i), "label": values[i % 3]} for i in range(count)]
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                (tmp_path / name / f"{split}.jsonl").write_text(lines)
        jobs = [
            make_job(f"{name}-{seed}", tmp_path / name, seed=seed) for name in ("number", "sets") for seed in range(2)
        ]
        both(jobs, queue_of, assert_same, EXACT)


def _head_parameters(folder):
    return json.loads((folder / "result.json").read_text())["head_parameters"]


def test_in_float32_within_what_two_orders_of_summation_give(make_job, queue_of, assert_same):
    jobs = [make_job(data, data, seed=seed) for seed, data in enumerate(("small", "large", "short"))]
    both(jobs, queue_of, lambda one, other, atol: assert_same(one, other, atol, scores=1e-3), 1e-3)
    for job in jobs:
        mine, alone = (
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (job.folder, job.folder.with_name(f"{job.folder.name}-alone"))
        )
        losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (mine, alone)]
        assert len(losses[0]) == len(losses[1]) > 3
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
