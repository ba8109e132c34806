from __future__ import annotations

import csv
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation.utils import GenerationMixin

from redpeft.errors import UserError
from redpeft.tasks.e2e import E2ETask
from redpeft.tasks.files import read_file
from redpeft.tasks.metrics import score_texts
from redpeft.training.predict import evaluate, load_run, open_run, predict
from redpeft.training.train import train
from redpeft.training.trainer import decode_tokens

OFFICIAL = {"bleu", "nist", "meteor", "rouge_l", "cider"}


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    """The scores that need Java have their own tests."""
    monkeypatch.setattr("redpeft.tasks.metrics.has_java", lambda: False)


@pytest.fixture
def generated(monkeypatch):
    """What `generate` was called with, call by call."""
    calls, plain = [], GenerationMixin.generate

    def spy(self, *args, **kwargs):
        calls.append(kwargs)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    return calls


def losses_of(folder) -> list[float]:
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


@pytest.fixture(scope="module")
def e2e(make_recipe, e2e_folder, tiny_gpt2_folder, tmp_path_factory):
    """A run of the task e2e, every weight trained: (folder, result)."""
    folder = tmp_path_factory.mktemp("e2e_run") / "run"
    changes = {"task": "e2e", "base": str(tiny_gpt2_folder), "data": str(e2e_folder), "method": "full"}
    recipe = make_recipe(**changes, epochs=30, batch_size=4, learning_rate=3e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redpeft.tasks.metrics.has_java", lambda: False)
        return folder, train(recipe, folder)


def test_data_to_text_is_learned_and_scored(e2e):
    folder, result = e2e
    losses = losses_of(folder)
    assert (result["metric"], result["validation"]["loss"]) == ("loss", min(losses))
    assert losses[-1] < losses[0] / 4
    assert set(result["validation"]) == {"loss"}
    assert set(result["test"]) == {"loss"} | OFFICIAL
    assert result["test"]["bleu"] > 20  # a random model has 0
    assert result["test"]["meteor"] is None
    written = json.loads((folder / "model" / "generation_config.json").read_text())
    assert not {"num_beams", "max_length", "top_k"} & set(written)  # the base's own, and not what the trainer does


def test_each_mr_of_a_file_gets_one_answer_in_its_order(e2e, e2e_folder):
    run = load_run(e2e[0])
    rows = list(csv.DictReader((e2e_folder / "testset_w_refs.csv").open(encoding="utf-8")))
    order = [0, 2, 1, 4, 3, 5, 7, 6, 0]
    mixed = [rows[index] for index in order]
    expected = [rows[index]["mr"] for index in (0, 2, 4, 7)]
    answers = list(predict(run, mixed, batch_size=2))  # an MR comes again in a later batch
    assert [answer["mr"] for answer in answers] == expected
    assert all(set(answer) == {"mr", "text"} for answer in answers)
    with_ids = list(predict(run, ({"id": index, **row} for index, row in enumerate(mixed))))
    assert [answer["id"] for answer in with_ids] == [0, 1, 3, 6]
    assert [answer["text"] for answer in with_ids] == [answer["text"] for answer in answers]
    for mr, answer in zip(expected, answers, strict=True):  # padding changes no answer
        assert next(predict(run, [mr]))["text"] == answer["text"]


def test_evaluate_scores_what_predict_answers(e2e, e2e_folder):
    folder, result = e2e
    run = load_run(folder)
    scores = evaluate(run, e2e_folder)
    assert scores.pop("loss") == pytest.approx(result["test"]["loss"], rel=1e-3)  # means of other batches
    assert scores == {name: result["test"][name] for name in OFFICIAL}
    dataset = read_file(e2e_folder / "testset_w_refs.csv")
    texts = [answer["text"] for answer in predict(run, list(dataset))]
    official = score_texts(texts, E2ETask(E2ETask.find_columns(dataset)).references(dataset))
    assert scores == official


def test_decoding_is_as_published(e2e, generated, e2e_folder):
    run = load_run(e2e[0])
    published = {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "do_sample": False}
    list(predict(run, ["name[Cotto]"]))
    list(predict(run, ["name[Cotto]"], max_new_tokens=3))
    evaluate(run, e2e_folder)
    assert len(generated) == 3
    for call in generated:
        assert published.items() <= call.items()
    assert [call["max_new_tokens"] for call in generated] == [100, 3, 100]
    assert len(generated[2]["input_ids"]) == 4  # a beam search a distinct MR, and none for the loss


@pytest.mark.parametrize("method", ["red", "lora"])
def test_adapters_learn_data_to_text(make_recipe, e2e_folder, tiny_gpt2_folder, tmp_path, method):
    recipe = make_recipe(
        task="e2e",
        base=str(tiny_gpt2_folder),
        data__train=str(e2e_folder / "trainset.csv"),
        data__validation=str(e2e_folder / "devset.csv"),
        data__path=None,
        method=method,
        learning_rate=1.0 if method == "red" else 0.03,  # a random model's outputs are small
        epochs=12,
        batch_size=4,
    )
    result = train(recipe, tmp_path / "run")
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.03
    assert (result["test"], result["head_parameters"]) == (None, 0)
    scores = evaluate(load_run(tmp_path / "run"), e2e_folder / "devset.csv")
    assert scores["loss"] == pytest.approx(min(losses), rel=1e-3)
    assert set(scores) == {"loss"} | OFFICIAL


def test_pieces_of_a_batch_weigh_by_their_tokens(make_recipe, e2e_folder, tiny_gpt2_folder, tmp_path):
    """The loss is the mean over the tokens of the whole batch, in how many pieces ever it is computed."""
    changes = {"task": "e2e", "base": str(tiny_gpt2_folder), "data": str(e2e_folder / "devset.csv"), "max_steps": 2}
    changes |= {"batch_size": 4, "group_by_length": False, "learning_rate": 0.1, "data__validation_fraction": 0.25}
    results = [
        train(make_recipe(**changes, gradient_accumulation=pieces), tmp_path / str(pieces)) for pieces in (1, 4)
    ]
    assert results[0]["validation"]["loss"] == pytest.approx(results[1]["validation"]["loss"], rel=1e-4)


def test_packages_are_asked_for_before_the_work(make_recipe, e2e, e2e_folder, tiny_gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("redpeft.tasks.metrics.importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("redpeft.training.learner.load_base", lambda *_: pytest.fail("loaded the model"))
    recipe = make_recipe(task="e2e", base=str(tiny_gpt2_folder), data=str(e2e_folder))
    with pytest.raises(UserError, match=r"pip install redpeft\[e2e\]"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"pip install redpeft\[e2e\]"):
        evaluate(open_run(e2e[0]), e2e_folder)


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory):
    """Texts whose first letter tells the label, or whose length tells the number."""
    folder, draw = tmp_path_factory.mktemp("words"), random.Random(0)
    for name, rows in {"train": 64, "validation": 16, "test": 16}.items():
        classes = [{"text": draw.choice("ab") * draw.randint(2, 6)} for _ in range(rows)]
        labelled = [row | {"label": {"a": "yes", "b": "no"}[row["text"][0]]} for row in classes]
        numbers = [row | {"label": {"a": 4.5, "b": 0.2}[row["text"][0]] + 0.01} for row in classes]
        for kind, found in (("classes", labelled), ("numbers", numbers)):
            (folder / kind).mkdir(exist_ok=True)
            (folder / kind / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture(scope="module")
def t5_runs(make_recipe, words_folder, tiny_t5_folder, tmp_path_factory):
    """A run on labels and a run on numbers, every weight trained: {kind: (folder, result)}."""
    folder = tmp_path_factory.mktemp("t5_runs")
    changes = {"task": "text-to-text", "base": str(tiny_t5_folder), "method": "full", "epochs": 8, "batch_size": 8}
    found = {}
    for kind, problem_type in (("classes", None), ("numbers", "regression")):
        data = str(words_folder / kind)
        recipe = make_recipe(**changes, data=data, problem_type=problem_type, learning_rate=1e-2)
        found[kind] = folder / kind, train(recipe, folder / kind)
    return found


def test_labels_are_learned_as_texts(t5_runs, words_folder):
    folder, result = t5_runs["classes"]
    losses = losses_of(folder)
    assert losses[-1] < losses[0] / 4
    assert result["metric"] == "accuracy"
    assert result["validation"]["accuracy"] == result["test"]["accuracy"] == 1
    assert result["test"]["unreadable"] == 0
    run = load_run(folder)
    scores = evaluate(run, words_folder / "classes")
    matrix = scores.pop("confusion_matrix")
    assert scores == pytest.approx(result["test"], rel=1e-3)
    assert (matrix["true"], matrix["predicted"]) == (["no", "yes"], ["no", "yes", None])
    assert [count > 0 for counts in matrix["counts"] for count in counts] == [True, False, False, False, True, False]
    answers = list(predict(run, ["aaa", {"text": "bbbb", "id": 9}, "aa"], batch_size=2))
    assert answers == [
        {"text": "aaa", "label": "yes", "generated": "yes"},
        {"id": 9, "label": "no", "generated": "no"},
        {"text": "aa", "label": "yes", "generated": "yes"},
    ]


def test_numbers_are_learned_as_texts(t5_runs):
    folder, result = t5_runs["numbers"]
    assert result["metric"] == "pearson"
    assert result["test"]["pearson"] == pytest.approx(1)
    assert result["test"]["mse"] == 0  # of the rounded numbers
    assert [answer["value"] for answer in predict(load_run(folder), ["aaa", "bb"])] == [4.5, 0.2]


def test_the_best_epoch_is_that_of_the_generated_labels(make_recipe, words_folder, tiny_t5_folder, tmp_path):
    recipe = make_recipe(
        task="text-to-text",
        base=str(tiny_t5_folder),
        data=str(words_folder / "classes"),
        metric="matthews",
        learning_rate=0.5,
        epochs=3,
    )
    result = train(recipe, tmp_path / "run")
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [entry["eval_matthews"] for entry in history if "eval_matthews" in entry]
    assert len(scores) == 3
    assert result["validation"]["matthews"] == max(scores)
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0]
    assert result["head_parameters"] == 0


def test_tokens_become_texts(tiny_gpt2_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2_folder)
    tokenizer.pad_token = tokenizer.eos_token
    ids = tokenizer("Cotto is a place")["input_ids"]
    rows = np.array([[*ids, tokenizer.eos_token_id, -100, -100], [tokenizer.eos_token_id] * (len(ids) + 3)])
    assert decode_tokens(tokenizer, rows) == ["Cotto is a place", ""]


def test_half_precision(make_recipe, e2e_folder, tiny_gpt2_folder, tmp_path):
    """Edits in fp32 beside a base in bf16, in training, evaluation and generation."""
    changes = {"task": "e2e", "base": str(tiny_gpt2_folder), "data": str(e2e_folder), "max_steps": 2}
    result = train(make_recipe(**changes, base__dtype="bf16"), tmp_path / "run")
    assert set(result["test"]) == {"loss"} | OFFICIAL
    run = load_run(tmp_path / "run")
    assert torch.bfloat16 in {parameter.dtype for parameter in run.model.parameters()}
    assert [answer["mr"] for answer in predict(run, ["name[Cotto]"], max_new_tokens=2)] == ["name[Cotto]"]
