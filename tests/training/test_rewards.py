"""Recipes with rewards: what is learned, what functions get, what is refused, what a run leaves behind."""

from __future__ import annotations

import json
import sys

import pytest

from helpers.data import write_rows
from redpeft.training.predict import evaluate, load_run, predict
from redpeft.training.train import set_up, train

pytest.importorskip("trl", reason="needs the extra [trl]")

WORDS = ("good", "film", "shop", "tree")
ROWS = [{"prompt": f"spell {word}", "response": word[::-1], "weight": 2} for word in WORDS * 2]
FUNCTIONS = '''
CALLS = []

def even(completion_ids, **columns):
    """The more tokens with even numbers, the better."""
    CALLS.append({"completion_ids": completion_ids, **columns})
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

def of_messages(prompts, completions, **columns):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [float(len(answer[0]["content"])) for answer in completions]

def sometimes(completions, **columns):
    return [None if at % 2 else 1 for at in range(len(completions))]

def fails(completions, **columns):
    return [row["colour"] for row in columns["given"]]

def too_few(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["good"] * len(completions)

NUMBER = 3
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
    [answer] = predict(run, ["spell good"])
    assert answer["prompt"] == "spell good"
    assert (folder / "plots" / "reward.png").is_file()
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (folder / "adapter" / "tokenizer.json").exists()


def test_what_a_function_gets(make, tmp_path):
    _, trainer = set_up(make().alone(), tmp_path / "run")
    calls = sys.modules["scores_of_tests"].CALLS
    calls.clear()
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
