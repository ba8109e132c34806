"""Recipes with preferences: where they begin, what they are compared with, what they leave behind."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from helpers.data import write_rows
from redpeft.adapters.folder import read_adapter
from redpeft.errors import Stopped, UserError
from redpeft.evaluation.language_model import prompt_form
from redpeft.fleet.template_model import why_alone
from redpeft.training.predict import evaluate, load_run, predict
from redpeft.training.preview import preview
from redpeft.training.recipe import load_recipe
from redpeft.training.train import check_recipe, set_up, train
from redpeft.training.trainer import RunTrainer

pytest.importorskip("trl", reason="needs the extra [trl]")

PAIRS = [
    {"prompt": f"spell {word}", "chosen": word[::-1], "rejected": word}
    for word in ("good", "film", "shop", "tree") * 4
]


@pytest.fixture(scope="module")
def make(tiny_decoder_folder, make_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation", "test"):
        write_rows(folder / f"{split}.jsonl", PAIRS)
    # a random model's outputs are small
    fields = {"task": "preference", "base": str(tiny_decoder_folder), "data": str(folder), "learning_rate": 0.3}
    return lambda **changes: make_recipe(**{**fields, "epochs": 2, **changes})


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """A run of a new adapter: (folder, result)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, train(make(), folder)


def first_loss(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(entry for entry in entries if "loss" in entry)["loss"]


def edits(model, name):
    return {key: value.clone() for key, value in model.state_dict().items() if f".{name}." in key}


def test_a_new_adapter_begins_at_the_base(trained):
    folder, result = trained
    assert first_loss(folder) == pytest.approx(math.log(2), abs=1e-4)
    assert result["validation"]["loss"] < math.log(2)
    assert result["test"].keys() == result["validation"].keys()
    assert result["validation"]["rewards/accuracies"] == 1
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja"}
    assert result["trainable_parameters"] == sum(
        tensor.numel()
        for edit in read_adapter(folder / "adapter").edits.values()
        for tensor in (edit.scale, edit.bias)
    )


def test_a_finished_run_is_scored_against_the_same_start(trained, make):
    recipe = trained[0] / "recipe.yaml"  # as before it named TRL's defaults
    recipe.write_text(re.sub(r"(?m)^beta: .*", "beta: null", recipe.read_text()))
    run = load_run(trained[0])
    scores = evaluate(run, f"{make().data.path}/test.jsonl")
    assert scores == pytest.approx(trained[1]["test"], rel=1e-3)
    assert prompt_form(trained[0], run.tokenizer)[0].template == run.task.template
    [answer] = predict(run, ["spell good"], max_new_tokens=4)
    assert answer["prompt"] == "spell good"
    assert isinstance(answer["text"], str)


def test_preferences_continue_a_run_of_instructions(make, make_recipe, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS])
    fields = {"task": "instruction", "base": make().base.model, "data": str(tmp_path / "rows.jsonl")}
    train(make_recipe(**fields, learning_rate=0.1, max_steps=2), tmp_path / "first")
    train(make(init_from=str(tmp_path / "first"), max_steps=1, epochs=1), tmp_path / "run")
    assert first_loss(tmp_path / "run") == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_continued_adapter_begins_at_itself_which_does_not_change(loss, trained, make, tmp_path):
    recipe = make(init_from=str(trained[0]), loss=loss, max_steps=4)
    _, trainer = set_up(recipe.alone(), tmp_path / "run")
    model = trainer.model
    start, reference = edits(model, "default"), edits(model, "ref")
    assert len(start) == len(reference) > 0
    for name, value in start.items():
        assert torch.equal(reference[name.replace(".default.", ".ref.")], value), name
    trainer.train()
    assert all(torch.equal(value, reference[name]) for name, value in edits(model, "ref").items())
    assert not all(torch.equal(value, start[name]) for name, value in edits(model, "default").items())
    if loss == "dpo":
        result = train(recipe, tmp_path / "whole")
        assert first_loss(tmp_path / "whole") == pytest.approx(math.log(2), abs=1e-4)
        again = evaluate(load_run(tmp_path / "whole"), f"{recipe.data.path}/test.jsonl")
        assert again == pytest.approx(result["test"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("loss", ["ipo", "kto"])
def test_the_other_losses_learn(loss, make, tmp_path):
    result = train(make(loss=loss, beta=0.5, learning_rate=0.1), tmp_path / "run")
    first = first_loss(tmp_path / "run")
    assert first == pytest.approx({"ipo": 1.0, "kto": 0.5}[loss], abs=1e-4)
    assert result["validation"]["loss"] < first
    assert evaluate(load_run(tmp_path / "run"), f"{make().data.path}/test.jsonl")["loss"] < first


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(make, trained, tmp_path, monkeypatch):
    recipe = make(init_from=str(trained[0]), learning_rate=0.1, save_steps=1)
    whole = train(recipe, tmp_path / "whole")
    step = RunTrainer.training_step

    def stopping(self, *args, **kwargs):
        self.terminated = self.state.global_step == 2
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped")
    resumed = train(recipe, tmp_path / "stopped")
    assert resumed["test"] == whole["test"]


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_methods_of_peft(method, make, tmp_path):
    options = {"num_virtual_tokens": 4} if method == "prompt" else {}
    train(make(method=method, method_options=options, learning_rate=None, max_steps=2), tmp_path / "run")
    if method == "lora":
        assert first_loss(tmp_path / "run") == pytest.approx(math.log(2), abs=1e-4)


def test_a_preview_shows_both_answers(make, tmp_path):
    found = preview(make(batch_size=4), tmp_path / "run")
    shown = ["".join(part.text for part in example.parts if part.learned) for example in found.examples[:2]]
    assert shown == [" doog</s>", " good</s>"]
    assert [example.answer for example in found.examples[:2]] == ["chosen", "rejected"]
    assert found.steps == 8


def test_defaults():
    recipe = load_recipe(None, {"base": "b", "data": "d", "task": "preference"}).resolved()
    assert (recipe.loss, recipe.learning_rate, recipe.max_length) == ("dpo", 3e-3, 2048)
    assert why_alone(recipe) == "task preference"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "orpo"}, "no loss is called 'orpo': choose dpo, ipo, kto"),
        ({"method": "full"}, "the task preference compares the model with its start, which method full does not keep"),
        ({"task": "instruction", "beta": 0.1}, "beta is for the task preference and reward, not instruction"),
        ({"trainer_options": {"label_smoothin": 0.1}}, "DPOConfig has no 'label_smoothin'; did you mean 'label_"),
        ({"trainer_options": {"label_smoothing": 0.1}}, "label_smoothing has no effect on the losses of a recipe"),
        ({"loss": "kto", "batch_size": 4, "gradient_accumulation": 4}, "each process needs at least 2 rows at a time"),
    ],
)  # fmt: skip
def test_wrong_fields(changes, message, make, tmp_path):
    with pytest.raises(UserError, match=message):
        check_recipe(make(**changes).alone())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.1}, "trainer_options: learning_rate is decided by the recipe's"),
        ({"dataloader_prefetch_factor": 2}, "trainer_options: --dataloader"),
    ],
)
def test_trainer_options_that_the_recipe_decides_or_trl_refuses(options, message, make, tmp_path):
    with pytest.raises(UserError, match=message):
        train(make(trainer_options=options), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
