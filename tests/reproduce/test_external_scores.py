from __future__ import annotations

import json

import pytest

from redpeft.errors import UserError
from redpeft.evaluation.lm_harness import PRESETS
from redpeft.reproduce import external_scores
from redpeft.reproduce.external_scores import LM_EVAL, Scoring, extra_scores, score_run, what_is_left
from redpeft.reproduce.published import find_table


def test_scores_of_a_judge_are_read(tmp_path):
    assert extra_scores(tmp_path, "mt-bench") == {}
    (tmp_path / "mt-bench-scores.json").write_text('{"turn_1": 5, "turn_2": "4.5"}')
    assert extra_scores(tmp_path, "mt-bench") == {"turn_1": 5.0, "turn_2": 4.5}
    assert extra_scores(tmp_path, "alpaca-eval") == {}


@pytest.mark.parametrize("text", ["[1]", '{"a": "b"}', "{", '{"a": null}'])
def test_a_broken_scores_file_is_named(tmp_path, text):
    (tmp_path / "mt-bench-scores.json").write_text(text)
    with pytest.raises(UserError, match="mt-bench-scores.json must hold one JSON object of numbers"):
        extra_scores(tmp_path, "mt-bench")


def test_answers_are_written_once_and_judging_is_left_to_the_user(tmp_path, monkeypatch):
    calls = []

    def generate(benchmark, model, questions, out, decoding):
        calls.append((benchmark, model, questions))
        out.write_text("[]")

    monkeypatch.setattr(external_scores, "generate", generate)
    score_run(tmp_path, "alpaca-eval", "base", Scoring())  # no questions
    assert calls == []
    assert f"redpeft generate alpaca-eval {tmp_path} --questions FILE" in what_is_left(tmp_path, "alpaca-eval")
    for _ in range(2):
        score_run(tmp_path, "alpaca-eval", "base", Scoring(tmp_path / "questions.json"))
    assert calls == [("alpaca-eval", str(tmp_path), tmp_path / "questions.json")]
    left = what_is_left(tmp_path, "alpaca-eval")
    assert left.startswith(f"alpaca_eval --model_outputs {tmp_path}/alpaca-eval.json")
    assert '{"alpaca_eval": 0.0}' in left
    (tmp_path / "alpaca-eval-scores.json").write_text('{"alpaca_eval": 81.0}')
    assert what_is_left(tmp_path, "alpaca-eval") is None


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_lm_eval_scores_an_adapter_or_a_whole_model(tmp_path, monkeypatch, kind):
    (tmp_path / kind).mkdir()
    tasks = PRESETS["open-llm-leaderboard"]
    calls = []

    def evaluate(base, adapters, tasks, out):
        calls.append((base, adapters))
        metrics = {task.name: {task.metric: 0.1 * place, "other": 9.0} for place, task in enumerate(tasks)}
        return {"results": {"whatever": metrics}}

    monkeypatch.setattr(external_scores, "evaluate_adapters", evaluate)
    for _ in range(2):
        score_run(tmp_path, "lm-eval", "base", Scoring())
    assert calls == [("base", [tmp_path]) if kind == "adapter" else (str(tmp_path / "model"), [])]
    found = json.loads((tmp_path / "lm-eval-scores.json").read_text())
    assert found == {name: pytest.approx(0.1 * place) for place, name in enumerate(LM_EVAL)}
    assert len(LM_EVAL) == len(tasks)
    assert [column.metric for column in find_table("open-llm").columns] == list(LM_EVAL)
    assert what_is_left(tmp_path, "lm-eval") is None
