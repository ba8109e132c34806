from __future__ import annotations

import json

import pytest
import torch
from datasets import DatasetDict
from peft import PeftModel
from transformers import AutoModel

from redpeft.errors import UserError
from redpeft.tasks.columns import ROW
from redpeft.tasks.files import read_file
from redpeft.training.baselines import METHODS
from redpeft.training.predict import FinishedRun, evaluate, load_run, open_run, predict
from redpeft.training.train import read_task, train

# Three of PEFT's methods that are not listed.
TWO = {"target_modules": ["query", "value"]}
OTHERS = {"vera": {"r": 4} | TWO, "ln_tuning": {"target_modules": ["LayerNorm"]}, "miss": {"r": 2} | TWO}
FAST = {"learning_rate": 3e-2, "max_steps": 4, "batch_size": 16}


@pytest.fixture(scope="module")
def runs(make_recipe, tmp_path_factory):
    """A short run of every method: {method: (folder, result)}."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "adapter_drop": {"drop_layers": 1},
        "prompt": {"num_virtual_tokens": 5},
        "prefix": {"num_virtual_tokens": 5},
        "top_layers": {"layers": 1},
        **OTHERS,
    }
    found = {}
    for method in [*METHODS, *OTHERS]:
        changes = FAST | {"max_length": 48, "method_options": options.get(method, {})}
        found[method] = folder / method, train(make_recipe(method=method, **changes), folder / method)
    return found


@pytest.mark.parametrize("method", [*METHODS, *OTHERS])
def test_a_loaded_run_scores_as_it_did_when_it_was_saved(method, runs, data_folder):
    folder, result = runs[method]
    run = load_run(folder)
    scores = evaluate(run, str(data_folder / "validation.jsonl"))
    assert scores["loss"] == pytest.approx(result["validation"]["loss"], abs=1e-6)
    assert scores["accuracy"] == result["validation"]["accuracy"]
    assert evaluate(run, data_folder)["loss"] == pytest.approx(result["test"]["loss"], abs=1e-6)


def test_the_base_model_alone_answers_as_well(make_recipe):
    recipe = make_recipe()
    task, _ = read_task(recipe)
    run = FinishedRun(None, recipe, task)
    assert [answer["label"] in task.label_names for answer in predict(run, ["a good film", "bad"])] == [True, True]
    assert not isinstance(run.model, PeftModel)
    own = AutoModel.from_pretrained(recipe.base.model).state_dict()
    found = run.model.base_model.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in found.items())


def test_only_full_saves_the_whole_model(runs):
    sizes = {method: result["adapter_bytes"] for method, (_, result) in runs.items()}
    assert sizes["head"] < sizes["red"] < sizes["bitfit"] < sizes["full"]
    assert sizes["full"] > 4 * runs["full"][1]["trainable_parameters"]


def test_predictions_come_in_order_for_objects_and_texts(runs):
    run = load_run(runs["red"][0])
    texts = ["the film is good", "awful", "the the the very bad film in the shop", "great film"]
    as_texts = list(predict(run, texts, batch_size=3))
    as_objects = list(predict(run, ({"text": text, "id": 7} for text in texts)))
    assert [row["label"] for row in as_texts] == [row["label"] for row in as_objects]
    for row, single in zip(as_texts, (next(predict(run, [text])) for text in texts), strict=True):
        assert set(row["probabilities"]) == {"negative", "positive"}
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probabilities"] == pytest.approx(single["probabilities"], abs=1e-5)


def test_answers_can_be_joined_with_their_rows(runs):
    run = load_run(runs["red"][0])
    rows = [{"id": "a-7", "text": "good"}, {"text": "bad", "id": None}, "awful", {"id": 0, "text": "great", "more": 1}]
    answers = list(predict(run, rows))
    assert [{key: answer[key] for key in ("id", "text") if key in answer} for answer in answers] == [
        {"id": "a-7"},
        {"text": "bad"},
        {"text": "awful"},
        {"id": 0},
    ]
    assert all(set(answer) - {"id", "text"} == {"label", "probabilities"} for answer in answers)


def test_errors_name_the_row_of_the_input(runs):
    run = load_run(runs["red"][0])
    stream = predict(run, ["good"] * 7 + [{"body": "bad"}], batch_size=3)
    assert [next(stream)["text"] for _ in range(6)] == ["good"] * 6
    with pytest.raises(UserError, match=r"^row 8 has no 'text'; it has 'body'"):
        next(stream)
    with pytest.raises(UserError, match=r"row 5: the text in column 'text' is empty"):
        list(predict(run, ["good"] * 4 + [" "], batch_size=2))
    with pytest.raises(UserError, match=r"row 40: the text"):
        list(predict(run, [{"text": "", ROW: 40}]))


def test_wrong_rows_are_found_before_the_model_is_loaded(runs, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("redpeft.training.predict.load_trained", lambda *_: pytest.fail("loaded the model"))
    run = open_run(runs["red"][0])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good", "label": "positive"}\n{"text": "good", "label": "neutral"}\n')
    for call, message in (
        (lambda: evaluate(run, tmp_path / "none.csv"), "no such file"),
        (lambda: evaluate(run, rows), "rows.jsonl, row 2: the label 'neutral' is not among the training labels"),
        (lambda: next(predict(run, [{"body": "good"}])), "row 1 has no 'text'"),
        (lambda: next(predict(run, [""])), "row 1: the text in column 'text' is empty"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_the_configuration_of_a_hub_data_set(runs, data_folder, monkeypatch):
    asked = []

    def load(*names):
        asked.append(names)
        return DatasetDict(test=read_file(data_folder / "test.jsonl").remove_columns(ROW))

    monkeypatch.setattr("redpeft.tasks.data.load_dataset", load)
    scores = evaluate(load_run(runs["red"][0]), "owner/rows", "sst2")
    assert asked == [("owner/rows", "sst2")]
    assert scores["loss"] == pytest.approx(runs["red"][1]["test"]["loss"], abs=1e-6)


def test_predictions_stream(runs):
    def endless():
        while True:
            yield "good film"

    stream = predict(load_run(runs["red"][0]), endless(), batch_size=2)
    assert all(next(stream)["label"] for _ in range(5))


def test_a_moved_base_and_a_wrong_base(runs, tiny_encoder_folder, tiny_decoder_folder, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_encoder_folder)
    assert next(predict(load_run(runs["red"][0], base=moved), ["good"]))["label"]
    with pytest.raises(UserError, match=r"adapter|base"):
        load_run(runs["red"][0], base=tiny_decoder_folder)
    for method in ("head", "adapter"):
        with pytest.raises(UserError, match=r"trained.safetensors was trained on another base model: .*"):
            load_run(runs[method][0], base=tiny_decoder_folder)


def test_folders_that_hold_no_finished_run(runs, make_recipe, tmp_path):
    with pytest.raises(UserError, match=r"is no run folder: it has no recipe.yaml"):
        load_run(tmp_path / "none")
    (tmp_path / "seeds" / "seed-3").mkdir(parents=True)
    (tmp_path / "seeds" / "seed-3" / "recipe.yaml").touch()
    with pytest.raises(UserError, match="holds one run for each seed: choose seed-3"):
        load_run(tmp_path / "seeds")
    (tmp_path / "recipe.yaml").write_text((runs["red"][0] / "recipe.yaml").read_text())
    with pytest.raises(UserError, match="is not finished: run the same"):
        load_run(tmp_path)


def test_bf16_runs_predict(make_recipe, tmp_path):
    train(make_recipe(base__dtype="bf16", **FAST), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert torch.bfloat16 in {p.dtype for p in run.model.parameters()}
    [row] = predict(run, ["good film"])
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-3)


def test_token_classification(tiny_encoder_folder, make_recipe, tmp_path):
    rows = [{"tokens": ["the", "film", "is", "good"], "tags": ["O", "B-X", "O", "O"]}] * 12
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(task="token-classification", data=str(tmp_path), batch_size=4, epochs=8)
    result = train(recipe, tmp_path / "run")
    assert result["metric"] == "f1"
    assert result["validation"]["f1"] == 1
    assert result["test"] is None
    run = load_run(tmp_path / "run")
    assert evaluate(run, tmp_path / "validation.jsonl")["f1"] == 1
    [row] = predict(run, ["the film is good"])
    assert row == {"tokens": ["the", "film", "is", "good"], "tags": ["O", "B-X", "O", "O"]}


def test_instructions(tiny_decoder_folder, make_recipe, tmp_path):
    pytest.importorskip("trl")
    rows = [{"prompt": f"say {word}", "response": word} for word in ("good", "bad") * 8]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"task": "instruction", "base": str(tiny_decoder_folder), "data": str(tmp_path), "epochs": 8}
    changes["learning_rate"] = 0.5  # a random model's outputs are small
    result = train(make_recipe(**changes), tmp_path / "run")
    assert result["metric"] == "loss"
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert result["validation"]["loss"] == min(losses)
    assert losses == sorted(losses, reverse=True)
    run = load_run(tmp_path / "run")
    assert evaluate(run, tmp_path / "validation.jsonl")["loss"] == pytest.approx(min(losses), rel=1e-4)
    answers = list(predict(run, ["say good", "say bad, and much longer"], max_new_tokens=4))
    assert [answer["prompt"] for answer in answers] == ["say good", "say bad, and much longer"]
    assert all(isinstance(answer["text"], str) for answer in answers)
    packed = train(make_recipe(**{**changes, "packing": True, "max_length": 64, "max_steps": 2}), tmp_path / "packed")
    assert packed["steps"] == 2
