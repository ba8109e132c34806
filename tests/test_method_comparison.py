"""benchmarks/method_comparison: what it runs, how it scores, and that the page says what its results say."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from redpeft.tasks.metrics import is_right

FOLDER = Path(__file__).parents[1] / "benchmarks" / "method_comparison"


@pytest.fixture(scope="module")
def comparison():
    """Its modules by their names."""
    names = ("data", "settings", "run", "tables", "feedback")
    sys.path.insert(0, str(FOLDER))
    before = {name: sys.modules.pop(name, None) for name in names}
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(FOLDER))
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]


def test_the_page_has_the_tables_that_the_results_give(comparison):
    tables = comparison["tables"]
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page_with_tables(text, tables.tables(tables.read_results())) == text, (
        "run python benchmarks/method_comparison/tables.py --write"
    )


def test_every_result_is_named_by_the_digest_of_its_settings(comparison):
    run, settings = comparison["run"], comparison["settings"]
    for name, result in run.read_results().items():
        fields = {key: value for key, value in result["settings"].items() if key != "training"}
        assert settings.Run(**fields).digest == name


def scored(settings, name, task, losses, criterion=None):
    """Results of a search: validation scores by rate, with the other criteria equal."""
    results = {}
    for rate, loss in losses.items():
        one = settings.run_of(name, task, rate, 0, "validation")
        results[one.digest] = {"settings": one.settings(), "validation": {"loss": loss, "exact_match": 0.5}}
    return results


def test_a_rate_is_chosen_when_all_are_there_and_one_more_is_tried_at_an_edge(comparison):
    settings = comparison["settings"]
    rates = settings.CANDIDATES["RED"].rates
    losses = dict(zip(rates, (2.0, 1.0, 1.5), strict=True))
    some = scored(settings, "RED", "spell_backward", {rate: losses[rate] for rate in rates[:2]})
    assert settings.best_rate("RED", "spell_backward", some) is None
    found = scored(settings, "RED", "spell_backward", losses)
    assert settings.best_rate("RED", "spell_backward", found) == rates[1]
    assert settings.next_rate("RED", "spell_backward", found) is None
    edge = scored(settings, "RED", "spell_backward", dict(zip(rates, (3.0, 2.0, 1.0), strict=True)))
    assert settings.next_rate("RED", "spell_backward", edge) == 0.3
    runs = settings.searches(["RED"], ["spell_backward"], edge)
    assert [one.rate for one in runs] == [*rates, 0.3]
    wider = edge | scored(settings, "RED", "spell_backward", {0.3: 0.5})
    assert settings.best_rate("RED", "spell_backward", wider) == 0.3
    assert settings.next_rate("RED", "spell_backward", wider) is None  # one more, and no further
    assert [(one.rate, one.seed) for one in settings.table(["RED"], ["spell_backward"], wider)] == [
        (rate, seed) for rate in (0.3, 3e-2) for seed in (0, 1, 2)
    ]


def test_the_variant_with_the_best_scores_on_e2e_is_tested_on_both_tasks(comparison):
    settings = comparison["settings"]
    results: dict = {}
    for number, name in enumerate(["RED", *settings.group("variant")], -1):
        assert settings.winner(results) is None
        one = settings.run_of(name, "e2e", 3e-2, 0, "validation")
        validation = {"loss": abs(number - 2), "bleu": 9, "values": 1}
        results[one.digest] = {"settings": one.settings(), "validation": validation}
    assert settings.winner(results) == "RED on norms"
    runs = [one for one in settings.planned("D", results) if one.split == "test"]
    assert [(one.task, one.rate, one.seed) for one in runs] == [
        (task, 3e-2, seed) for task in settings.TWO for seed in settings.SEEDS
    ]


def test_a_rate_whose_loss_was_not_finite_is_never_chosen(comparison):
    settings = comparison["settings"]
    rates = settings.CANDIDATES["IA3"].rates
    found = scored(settings, "IA3", "chain_sum", dict.fromkeys(rates, 1.0))
    last = settings.run_of("IA3", "chain_sum", rates[0], 0, "validation").digest
    found[last]["validation"] = None
    assert settings.best_rate("IA3", "chain_sum", found) == rates[1]


def test_ranks_count_every_criterion(comparison):
    settings = comparison["settings"]
    scores = {
        "low loss": {"loss": 1.0, "bleu": 50.0, "values": 0.7},
        "says more": {"loss": 1.1, "bleu": 52.0, "values": 0.8},
    }
    assert settings.rank_sum("low loss", scores, "e2e") == 2
    assert settings.rank_sum("says more", scores, "e2e") == 1


def test_what_is_right_is_what_reasoning_gym_gives_one_point(comparison):
    gym = pytest.importorskip("reasoning_gym")
    for task, options in comparison["data"].CHECKED.items():
        drawn = gym.create_dataset(task, seed=5, size=20, **options)
        for entry, other in zip(drawn, list(drawn)[1:], strict=False):
            for answer in (entry["answer"], other["answer"]):
                points = drawn.score_answer(answer, entry)
                assert is_right(f"It is {answer}.", entry["answer"]) is (points == 1.0)


def test_the_last_seed_answers_no_questions_of_e2e(comparison, tmp_path):
    run, settings = comparison["run"], comparison["settings"]
    assert run.answer(None, settings.run_of("RED", "e2e", 3e-2, settings.SEEDS[-1], "test"), tmp_path) == ({}, {})


def test_the_share_of_values_that_a_text_says(comparison):
    question = {"mr": "name[The Eagle], food[Fast food], familyFriendly[no], near[Burger King]"}
    said = comparison["run"].values_said(
        ["The Eagle serves fast food near the burger king.", "Eagle."], [question] * 2
    )
    assert said == 3 / 6


def test_a_text_that_the_limit_cut_does_not_end_as_a_sentence(comparison):
    assert comparison["run"].unending(["It is a pub.", "It is a pub.It is a", "Is it? ", ""]) == 0.5


def test_bounded_biases_and_edits_in_bf16(comparison):
    """What part C and D ask for does happen in training, and is undone afterwards."""
    import torch

    from redpeft.tuner.edit import Edit

    run, settings = comparison["run"], comparison["settings"]
    own = Edit.train
    one = settings.planned("C", {})[0]
    assert one.stored == "bf16"
    with run.changed(one):
        edit = Edit(4, unit=1)
        edit.to(torch.bfloat16)
        edit.bias.data = edit.bias.data.bfloat16()
        assert edit.train().bias.dtype == torch.bfloat16
    assert Edit.train is own
    assert edit.train().bias.dtype == torch.float32


def test_a_wrong_spelling_is_plausible_and_never_right(comparison):
    feedback = comparison["feedback"]
    words = ["cimho", "noen", "lool", "aab", "level", "aaa"]
    found = {word: {feedback.wrong_spelling(word, random.Random(seed)) for seed in range(50)} for word in words}
    assert found["noen"] == {"onen", "neon", "none", "oen", "nen", "non"}  # swapped, as it was, left out
    assert found["lool"] == {"olol", "lolo", "ool", "lol"}  # a word that is the same backward is no wrong answer
    assert found["aaa"] == {"aa"}
    assert all(word not in wrong for word, wrong in found.items())
    assert feedback.wrong_spelling("cimho", random.Random(3)) == feedback.wrong_spelling("cimho", random.Random(3))


def test_the_pages_of_preferences_and_rewards_have_the_tables_that_the_results_give(comparison):
    tables, feedback = comparison["tables"], comparison["feedback"]
    for name, (page, table) in feedback.TABLES.items():
        text = page.read_text(encoding="utf-8")
        assert tables.page_with_tables(text, {name: table()}) == text, (
            "run python benchmarks/method_comparison/feedback.py tables"
        )


def test_a_result_of_preferences_and_rewards_says_its_settings(comparison):
    feedback = comparison["feedback"]
    for file in feedback.RESULTS.glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        run = feedback.Run(**result["settings"])
        assert run.name == file.stem
        assert run in feedback.RUNS
        assert result.get("training") == feedback.TRAINING.get(run.kind)
        if "hits" in result:
            assert len(result["hits"]) == feedback.ROWS["test"]
