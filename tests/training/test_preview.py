from __future__ import annotations

import json
import time
from dataclasses import asdict
from itertools import pairwise

import pytest
from rich.console import Console

from helpers.adapters import tree
from helpers.data import write_rows
from helpers.methods import OPTIONS
from redpeft.errors import UserError
from redpeft.training import preview as preview_module
from redpeft.training.baselines import METHODS
from redpeft.training.preview import Example, Part, preview, shown
from redpeft.training.train import train
from redpeft.training.trainer import RunTrainer


def test_a_preview_is_what_the_run_becomes_and_writes_nothing(make_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    step, pause = RunTrainer.training_step, 0.05  # so that the steps take longer than what a run has once

    def slowly(*args, **kwargs):
        time.sleep(pause)
        return step(*args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", slowly)
    found = preview(make_recipe(output="run"), "run")
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.rglob("*")] == ["notes.txt"]
    result = train(make_recipe(output="run"), "run")
    for name in ("steps", "trainable_parameters", "rows", "rows_cut", "rows_left_out"):
        assert getattr(found, name) == result[name], name
    assert found.validations == 3
    # shares of a busy machine differ
    assert result["seconds"] / 8 < found.seconds < 8 * result["seconds"]
    assert found.seconds >= 18 * pause
    assert 0 < found.seconds_to_test < found.seconds
    assert 2**26 < found.peak_bytes < 2**36
    assert sum(rows for _, _, rows in found.lengths) == 48
    assert found.lengths[0][0] >= 4
    assert all(last + 1 == following for (_, last, _), (following, _, _) in pairwise(found.lengths))
    assert "problem type: single_label_classification" in found.notes
    assert "labels: negative 24, positive 24" in found.notes
    assert [example.answer for example in found.examples] == ["negative", "positive", "negative"]
    assert found.examples[0].parts[0].text.startswith("[CLS] ")
    assert not any(part.learned for example in found.examples for part in example.parts)


def test_the_probe_takes_the_batches_of_the_run_the_longest_first_and_ends_early(make_recipe, monkeypatch, tmp_path):
    widths = []
    step = RunTrainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        widths.append(inputs["input_ids"].shape[1])
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", spy)
    monkeypatch.setattr(preview_module, "STEPS", 5)
    found = preview(make_recipe(), "run")
    assert (found.steps, len(widths)) == (18, 5)
    assert widths[0] == max(widths) > min(widths)
    monkeypatch.setattr(preview_module, "STEPS", 6)  # an epoch
    widths.clear()
    preview(make_recipe())
    train(make_recipe(max_steps=6), tmp_path / "run")
    assert sorted(widths[:6]) == sorted(widths[6:12])
    widths.clear()
    monkeypatch.setattr(preview_module, "SECONDS", 0.0)
    preview(make_recipe(), "run")
    assert len(widths) == preview_module.WARM_UP + 1


@pytest.mark.parametrize("method", list(METHODS))
def test_each_method(make_recipe, monkeypatch, tmp_path, method):
    monkeypatch.setattr(preview_module, "STEPS", 2)
    recipe = make_recipe(method=method, method_options=OPTIONS.get(method, {}), max_length=48, max_steps=7)
    found = preview(recipe, tmp_path / "run")
    assert (found.steps, found.validations) == (7, 2)
    assert found.trainable_parameters > 0
    assert list(tmp_path.iterdir()) == []


def learned(example):
    return [part.text for part in example.parts if part.learned]


def test_each_task_marks_what_is_learned(
    make_recipe, tiny_decoder_folder, tiny_gpt2_folder, tiny_t5_folder, e2e_folder, data_folder, tmp_path, monkeypatch
):
    pytest.importorskip("trl")
    monkeypatch.setattr(preview_module, "STEPS", 2)
    asked = [{"prompt": f"say {word}", "response": word} for word in ("good", "bad") * 8]
    write_rows(tmp_path / "asked.jsonl", asked)
    instruction = {"task": "instruction", "base": str(tiny_decoder_folder), "data": str(tmp_path / "asked.jsonl")}
    [first, *_] = preview(make_recipe(**instruction), tmp_path / "run").examples
    assert [(part.text, part.learned) for part in first.parts] == [
        ("<s>Human: say good\n\nAssistant:", False), (" good</s>", True),
    ]  # fmt: skip
    [first, *_] = preview(make_recipe(**instruction, learn_prompt=True), tmp_path / "run").examples
    assert "".join(learned(first)).endswith("Human: say good\n\nAssistant: good</s>")
    packed = preview(make_recipe(**instruction, packing=True), tmp_path / "run")
    assert packed.examples[0].tokens > first.tokens
    assert len(learned(packed.examples[0])) > 1
    assert packed.steps == train(make_recipe(**instruction, packing=True), tmp_path / "packed")["steps"]

    rows = [{"tokens": ["good", "film"], "tags": ["A", "O"]}, {"tokens": ["shop"], "tags": ["B"]}] * 8
    write_rows(tmp_path / "tagged.jsonl", rows)
    tagged = preview(make_recipe(task="token-classification", data=str(tmp_path / "tagged.jsonl")), tmp_path / "run")
    for example in tagged.examples:
        found = [(part.text.strip(), part.label) for part in example.parts if part.learned]
        assert found in ([("good", "A"), ("film", "O")], [("shop", "B")])

    texts = preview(make_recipe(task="text-to-text", base=str(tiny_t5_folder), max_eval_rows=4), tmp_path / "run")
    assert [example.answer for example in texts.examples] == ["negative</s>", "positive</s>", "negative</s>"]

    data = preview(make_recipe(task="e2e", base=str(tiny_gpt2_folder), data=str(e2e_folder)), tmp_path / "run")
    assert learned(data.examples[0]) == ["The Mill serves Thai food in the riverside area.<|endoftext|>"]
    assert data.examples[0].parts[0].text.startswith("name")
    assert not (tmp_path / "run").exists()


def test_several_labels_and_numbers(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(preview_module, "STEPS", 1)
    rows = [{"text": f"good film {at}", "label": ["a", "b"] if at % 2 else ["b"]} for at in range(20)]
    write_rows(tmp_path / "several.jsonl", rows)
    several = preview(make_recipe(data=str(tmp_path / "several.jsonl")), "run")
    assert {example.answer for example in several.examples} <= {"a, b", "b"}
    write_rows(tmp_path / "numbers.jsonl", [{"text": f"good film {at}", "label": at / 8} for at in range(20)])
    numbers = preview(make_recipe(data=str(tmp_path / "numbers.jsonl"), problem_type="regression"), "run")
    assert all(0 <= float(example.answer) < 3 for example in numbers.examples)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__text": "nosuch"},
        {"base": "no/such/folder/"},
        {"method_options": {"nosuch": 1}},
        {"batch_size": 8, "gradient_accumulation": 8, "base__dtype": "fp16"},
        {"init_from": "nowhere"},
        {"max_length": 1},
    ],
)
def test_a_bad_recipe_is_refused_as_training_does(make_recipe, tmp_path, changes):
    with pytest.raises(UserError) as expected:
        train(make_recipe(**changes), tmp_path / "run")
    with pytest.raises(UserError) as found:
        preview(make_recipe(**changes), tmp_path / "run")
    assert str(found.value) == str(expected.value)
    assert "\n" not in str(found.value)


def test_a_folder_of_another_run_is_refused(make_recipe, tmp_path):
    (tmp_path / "letter.txt").write_text("dear diary")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        preview(make_recipe(), tmp_path)


def test_learned_parts_are_green_or_in_brackets(make_recipe):
    example = Example([Part("Say yes. ", False), Part("Yes.", True), Part("!", True, "MARK")], 7, "good")

    def printed(**options):
        console = Console(width=80, record=True, file=None, **options)
        with console.capture() as capture:
            console.print(example)
        return capture.get()

    assert "Say yes. [[Yes.]][[!]]/MARK → [[good]]" in printed(color_system=None)
    colours = printed(color_system="standard", force_terminal=True)
    assert "\x1b[1;32mYes.\x1b[0m" in colours
    assert "[[" not in colours
    long = Example([Part("x" * 5000, False)], 5000, None)
    assert len("".join(part.text for part in long.parts)) == 5000
    with (console := Console(width=80, color_system=None)).capture() as capture:
        console.print(long)
    assert capture.get().count("x") == preview_module.LONGEST


def test_what_is_shown(make_recipe, tmp_path):
    found = preview(make_recipe(max_steps=2), tmp_path / "run")
    with (console := Console(width=120, color_system=None)).capture() as capture:
        for part in shown(found):
            console.print(part, markup=False, highlight=False)
    text = capture.get()
    assert "labels: negative 24, positive 24" in text
    assert "│ [CLS] " in text
    assert "→ [[negative]]" in text
    assert f"Trains {found.trainable_parameters:,} parameters.\nTime: about 1 s: 2 steps of " in text
    assert "Memory: " in text
    assert json.loads(json.dumps(asdict(found)))["steps"] == 2
