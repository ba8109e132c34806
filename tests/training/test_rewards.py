"""Recipes with rewards: what is learned, what functions get, what is refused, what a run leaves behind."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace

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

WORDS = ("good", "film", "shop", "tree")
ROWS = [{"prompt": f"spell {word}", "response": word[::-1], "weight": 2} for word in WORDS * 2]
FUNCTIONS = '''
CALLS = []

def even(completion_ids, trainer_state=None, **columns):
    """The more tokens with even numbers, the better."""
    step = trainer_state and trainer_state.global_step  # in training
    CALLS.append({"completion_ids": completion_ids, "step": step, **columns})
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

def of_messages(prompts, completions, **columns):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [float(len(answer[0]["content"])) for answer in completions]

def half(completions, **columns):
    return [None if at % 2 else 0.5 for at in range(len(completions))]
'''


@pytest.fixture(scope="module")
def make(tiny_decoder_folder, make_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "scores_of_tests.py").write_text(FUNCTIONS)
    for split in ("train", "validation", "test"):
        write_rows(folder / f"{split}.jsonl", ROWS)
    # a random model's outputs are small: at a usual temperature its answers would be any
    fields = {"base": str(tiny_decoder_folder), "data": str(folder), "learning_rate": 0.3, "batch_size": 2}
    fields |= {"reward": "scores_of_tests:even", "max_completion_length": 6, "num_generations": 4, "temperature": 0.02}
    sys.path.append(str(folder))
    yield lambda **changes: make_recipe(**{**fields, "epochs": 4, **changes})
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """A run of a new adapter: (folder, result)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, train(make(), folder)


@pytest.fixture
def calls(make):
    """What `even` got, call by call."""
    found = importlib.import_module("scores_of_tests").CALLS
    found.clear()
    return found


def entries(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_reward_rises_and_a_finished_run_is_scored_alike(trained, make):
    folder, result = trained
    scores = [entry["eval_reward"] for entry in entries(folder) if "eval_reward" in entry]
    assert len(scores) == 4
    assert max(scores) > scores[0]
    assert result["validation"]["reward"] == pytest.approx(max(scores))
    assert result["steps"] == 16
    run = load_run(folder)
    assert run.recipe.task == "reward"
    again = evaluate(run, f"{make().data.path}/test.jsonl")
    assert again == pytest.approx(result["test"], rel=1e-4)
    assert prompt_form(folder, run.tokenizer)[0].template == run.task.template
    by_vllm = run.recipe.model_copy(update={"trainer_options": {"use_vllm": True}})  # scored without it
    assert evaluate(replace(run, recipe=by_vllm), f"{make().data.path}/test.jsonl") == again
    [answer] = predict(run, ["spell good"])
    assert answer["prompt"] == "spell good"
    assert run.task.generation["max_new_tokens"] == 6
    assert (folder / "plots" / "reward.png").is_file()
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (folder / "adapter" / "tokenizer.json").exists()


def test_what_a_function_gets(make, calls, tmp_path):
    _, trainer = set_up(make().alone(), tmp_path / "run")
    trainer.evaluate(trainer.eval_dataset.select([0, 5]))
    [call] = calls
    assert call["prompt"] == call["prompts"] == ["spell good", "spell film"]
    assert call["response"] == ["doog", "mlif"]
    assert call["weight"] == [2, 2]
    assert len(call["completion_ids"]) == 2
    calls.clear()
    trainer.args.max_steps = 1
    trainer.train()
    asked = calls[0]["prompts"]
    assert len(asked) == 8
    assert [asked[at] for at in (0, 4)] == [asked[at] for at in (3, 7)]  # each prompt four times in a row
    assert calls[0]["response"] == [prompt.split()[1][::-1] for prompt in asked]


def stop_after(step, recipe, folder, monkeypatch):
    training_step = RunTrainer.training_step

    def stopping(self, *args, **kwargs):
        self.terminated = self.state.global_step == step - 1
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RunTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            train(recipe, folder)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(make, tmp_path, monkeypatch):
    recipe = make(save_steps=1, epochs=2, temperature=1.0, gradient_accumulation=2, beta=0.1)
    whole = train(recipe, tmp_path / "whole")
    stop_after(3, recipe, tmp_path / "stopped", monkeypatch)
    resumed = train(recipe, tmp_path / "stopped")
    assert resumed["test"] == whole["test"]
    expected, found = (read_adapter(tmp_path / name / "adapter").edits for name in ("whole", "stopped"))
    for site, edit in expected.items():
        assert torch.equal(edit.scale, found[site].scale), site
        assert torch.equal(edit.bias, found[site].bias), site


def test_a_run_stopped_between_steps_with_the_same_answers_asks_for_them_again(make, calls, tmp_path, monkeypatch):
    recipe = make(save_steps=1, max_steps=6, trainer_options={"num_iterations": 2})
    stop_after(3, recipe, tmp_path / "run", monkeypatch)
    train(recipe, tmp_path / "run")
    assert [call["step"] for call in calls if call["step"] is not None] == [0, 2, 3, 4]


def edits(model, name):
    return {key: value.clone() for key, value in model.state_dict().items() if f".{name}." in key}


@pytest.mark.parametrize("begin", ["new", "continued", "lora"])
def test_the_reference_is_the_start(begin, trained, make, tmp_path):
    changes = {"method": "lora", "learning_rate": 0.01} if begin == "lora" else {}
    if begin == "continued":
        changes = {"init_from": str(trained[0])}
    recipe = make(beta=0.1, max_steps=2, warmup=0, **changes)
    _, trainer = set_up(recipe.alone(), tmp_path / "set-up")
    reference = edits(trainer.model, "ref")
    assert trainer.ref_model is None
    assert {name.replace(".ref.", ".default."): value.tolist() for name, value in reference.items()} == (
        {name: value.tolist() for name, value in edits(trainer.model, "default").items()}
        if begin == "continued"
        else {}
    )
    train(recipe, tmp_path / "run")
    divergences = [entry["kl"] for entry in entries(tmp_path / "run") if "kl" in entry]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[1] > 1e-5
    assert (tmp_path / "run" / "plots" / "kl.png").is_file()


def test_without_beta_there_is_no_reference(trained, make, tmp_path):
    assert not (trained[0] / "plots" / "kl.png").exists()
    _, trainer = set_up(make(init_from=str(trained[0])).alone(), tmp_path / "run")
    assert set(trainer.model.peft_config) == {"default"}


def test_several_functions_are_added_by_weight(make, tmp_path):
    names = "exact_match,scores_of_tests:even,scores_of_tests:half"
    recipe = make(reward=names, trainer_options={"reward_weights": [1, 2, 0.5]}, max_steps=1)
    scores = train(recipe, tmp_path / "run")["test"]
    assert scores["reward_exact_match"] == 0
    assert scores["reward_half"] == 0.5
    assert "frac_reward_zero_std" in entries(tmp_path / "run")[0]
    assert "completions/clipped_ratio" in entries(tmp_path / "run")[0]
    # `half` scores every second answer
    assert scores["reward"] == pytest.approx(2 * scores["reward_even"] + 0.5 * 0.25)


def test_functions_get_messages_where_the_rows_have_some(make, tmp_path):
    rows = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    result = train(make(data=str(tmp_path), reward="scores_of_tests:of_messages", max_steps=1), tmp_path / "run")
    assert result["validation"]["reward"] > 0


def test_a_preview_shows_prompts(make, trained, tmp_path):
    found = preview(make(), tmp_path / "run")
    assert found.steps == trained[1]["steps"]
    assert [len(example.parts) for example in found.examples] == [1] * 3
    assert not any(part.learned for example in found.examples for part in example.parts)
    assert "spell good" in found.examples[0].parts[0].text
    assert "nothing is marked: the model learns from its own answers to these prompts" in found.notes
    assert not (tmp_path / "run").exists()


def test_defaults():
    recipe = load_recipe(None, {"base": "b", "data": "d", "task": "reward", "reward": "exact_match"}).resolved()
    assert (recipe.loss, recipe.learning_rate, recipe.max_length) == ("grpo", 3e-3, 2048)
    assert (recipe.beta, recipe.num_generations, recipe.temperature, recipe.max_completion_length) == (0, 8, 1, 512)
    assert why_alone(recipe) == "task reward"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "reward", "reward": None}, "the task reward needs reward: exact_match, reasoning-gym or"),
        ({"task": "instruction"}, "reward is for the task reward, not instruction"),
        ({"task": "instruction", "reward": None}, "num_generations is for the task reward, not instruction"),
        ({"loss": "dpo"}, "no loss is called 'dpo': choose grpo"),
        ({"method": "full", "beta": 0.1}, "the task reward compares the model with its start, which method full does"),
        ({"num_generations": 3, "gradient_accumulation": 4}, "batch_size 2 with 3 answers to each prompt cannot be"),
        ({"trainer_options": {"num_iteration": 2}}, "GRPOConfig has no 'num_iteration'; did you mean 'num_iter"),
        ({"trainer_options": {"num_iterations": "two"}}, "trainer_options: num_iterations: Input should be a valid "),
    ],
)  # fmt: skip
def test_wrong_fields(changes, message, make):
    with pytest.raises(UserError, match=message):
        check_recipe(make(**changes).alone())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 9}, "a step takes 9 prompts, and there are 8: choose a lower batch_size"),
        ({"trainer_options": {"beta": 0.1}}, "trainer_options: beta is decided by the recipe's other fields"),
        (
            {"trainer_options": {"reward_weights": [1, 2]}},
            r"trainer_options: Number of reward weights \(2\) must match",
        ),
        ({"trainer_options": {"use_vllm": True}}, "trainer_options.use_vllm: TRL sends the merged weights to vLLM"),
    ],
)
def test_wrong_fields_that_a_run_finds(changes, message, make, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        train(make(**changes), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
