from __future__ import annotations

import json

import pytest

from redpeft.errors import UserError
from redpeft.tasks.base import DataConfig
from redpeft.tasks.data import read_data, read_evaluation

SUMS = {"train": 30, "validation": 10, "test": 10, "max_terms": 2, "max_digits": 1}


def read(**changes):
    fields = {"path": "reasoning-gym:chain_sum", "generate": SUMS, **changes}
    return read_data("reward", DataConfig(**fields), reward=["reasoning-gym"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs reasoning-gym: pip install redpeft\[reasoning\]"):
        read()


def test_options_without_such_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "response": "2"}\n')
    with pytest.raises(UserError, match="data.generate is for data of reasoning-gym"):
        read(path=str(tmp_path))


def test_questions_differ_and_answers_are_scored():
    pytest.importorskip("reasoning_gym", reason="needs the extra [reasoning]")
    task, splits = read()
    questions = [question for split in splits.values() for question in split["prompt"]]
    assert len(set(questions)) == len(questions) == 50
    assert read()[1]["test"]["prompt"] == splits["test"]["prompt"]
    assert read_evaluation("reasoning-gym:chain_sum", generate=SUMS)["prompt"] == splits["test"]["prompt"]
    [reward] = task.reward_functions()
    row = splits["train"][0]
    given = {f"given.{name}": [value] * 3 for name, value in row.items()}
    right = [f"The sum of 7 and more is {row['response']}", row["response"], "I do not know"]
    assert reward(prompts=[""] * 3, completions=right, **given) == pytest.approx([1, 1, 0], abs=0.02)
    with pytest.raises(UserError, match=r"needs rows of reasoning-gym with its metadata as JSON"):
        reward(prompts=[""] * 3, completions=right, **{**given, "given.metadata": [json.dumps({"a": 1})] * 3})
    with pytest.raises(UserError, match="has no data set 'chain_sun'; it has "):
        read(path="reasoning-gym:chain_sun")
    with pytest.raises(UserError, match=r"data.generate: reasoning-gym's chain_sum: .*max_term'"):
        read(generate=SUMS | {"max_term": 2})
    with pytest.raises(UserError, match="data.generate.train is a number of rows, not 0"):
        read(generate=SUMS | {"train": 0})
    with pytest.raises(UserError, match=r"5,000 rows for train were asked for, and only \d+ questions differ"):
        read(generate=SUMS | {"train": 5000})


def test_answers_that_are_none_and_scores_that_are_lost_in_json():
    pytest.importorskip("reasoning_gym", reason="needs the extra [reasoning]")
    few = {"train": 1, "validation": 1, "test": 1}
    task, splits = read(path="reasoning-gym:graph_color", generate=few)
    row = splits["train"][0]
    assert row["response"] == ""
    colours = json.dumps(json.loads(row["metadata"])["possible_answer"])
    given = {f"given.{name}": [value] * 2 for name, value in row.items()}
    assert task.reward_functions()[0](prompts=[""] * 2, completions=[colours, "red"], **given) == [1, 0]
    with pytest.raises(UserError, match="the answer in column 'response' is empty"):
        read_data("reward", DataConfig(path="reasoning-gym:graph_color", generate=few), reward=["exact_match"])
    with pytest.raises(UserError, match="rearc, train, row 1: reasoning-gym gives 0.05 of 1 point for the data's"):
        read(path="reasoning-gym:rearc", generate=few)
