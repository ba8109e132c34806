from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from redpeft import console
from redpeft.adapters.folder import read_adapter
from redpeft.errors import RunError, Stopped, UserError
from redpeft.runs.runner import run_recipe
from redpeft.storage import default_mode
from redpeft.training import callbacks
from redpeft.training.baselines import DEFAULT_RATES
from redpeft.training.predict import evaluate, load_run, open_run, predict
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train
from redpeft.training.trainer import RunTrainer

STEPS = 18  # of make_recipe: 3 epochs of 6


def write(path, text):
    path.write_text(text)
    return str(path)


def before_step(monkeypatch, action, at):
    """Call `action(trainer)` before step `at` (the first is 1)."""
    step = RunTrainer.training_step

    def wrapped(self, *args, **kwargs):
        if self.state.global_step + 1 == at:
            action(self)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", wrapped)


def terminate(_, number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def poison(trainer):
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(folder, other):
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert history(folder) == history(other)


def history(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in e.items() if not key.endswith(callbacks.TIMES)} for e in entries]
    return [entry for entry in timeless if "train_loss" not in entry]


@pytest.fixture(scope="module")
def whole(make_recipe, tmp_path_factory):
    """An uninterrupted run: (folder, result)."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(make_recipe(), folder)


def test_a_run_folder_and_its_result(whole, make_recipe, data_folder):
    folder, result = whole
    names = {path.name for path in folder.iterdir()}
    assert names == {"recipe.yaml", "task.json", "adapter", "metrics.jsonl", "plots", "result.json"}
    assert {path.name for path in (folder / "plots").iterdir()} == {"loss.png", "accuracy.png"}
    files = {path.name for path in (folder / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}  # the tokenizer is the base's
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {default_mode(folder)}
    assert json.loads((folder / "result.json").read_text()) == result
    assert (result["steps"], result["metric"], result["learning_rate"]) == (STEPS, "accuracy", DEFAULT_RATES["red"])
    assert result["head_parameters"] == 32 * 2 + 2
    assert result["trainable_parameters"] == 2 * 2 * 32 + result["head_parameters"]
    assert result["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 0 < result["seconds_per_step"] < result["seconds"]
    assert set(result["versions"]) == {"redpeft", "peft", "transformers", "torch"}
    assert load_recipe(folder / "recipe.yaml").learning_rate == DEFAULT_RATES["red"]


def test_a_tokenizer_in_the_adapters_folder_overrides_the_bases(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    tokenizer = load_run(tmp_path / "run").tokenizer
    tokenizer.add_tokens(["<mine>"])
    assert "<mine>" not in load_run(tmp_path / "run").tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path / "run" / "adapter")
    assert "<mine>" in load_run(tmp_path / "run").tokenizer.get_vocab()


def test_training_moves_every_edit_and_keeps_the_best_epoch(whole):
    folder, result = whole
    adapter = read_adapter(folder / "adapter")
    assert len(adapter.edits) == 2
    for site, edit in adapter.edits.items():
        assert (edit.scale != 1).all(), site
        assert (edit.bias != 0).all(), site
        assert adapter.units[site] > 0
    evaluations = [entry for entry in history(folder) if "eval_accuracy" in entry]
    assert len(evaluations) == 3
    best = max(evaluations, key=lambda entry: entry["eval_accuracy"])
    assert result["validation"]["accuracy"] == best["eval_accuracy"]
    assert result["best_epoch"] == best["epoch"]
    assert set(result["test"]) == set(result["validation"])


def test_a_finished_run_is_not_repeated(whole, make_recipe, monkeypatch):
    folder, result = whole
    monkeypatch.setattr(RunTrainer, "training_step", None)
    assert train(make_recipe(output="elsewhere"), folder) == result


def test_another_recipe_in_the_same_folder_is_refused(whole, make_recipe, tmp_path):
    folder, _ = whole
    with pytest.raises(UserError, match=r"another recipe \(learning_rate, epochs differ\)"):
        train(make_recipe(epochs=2, learning_rate=0.1), folder)
    (tmp_path / "letter.txt").write_text("dear diary")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        train(make_recipe(), tmp_path)


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 9), (signal.SIGTERM, 12), (signal.SIGINT, 18)])
def test_a_signal_leaves_a_run_that_resumes_bit_for_bit(number, at, whole, make_recipe, tmp_path, monkeypatch):
    """Step 9 is inside the second epoch, 12 and 18 end one: their evaluations must not be lost."""
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        before_step(patch, lambda _: terminate(_, number), at)
        with pytest.raises(Stopped, match=f"stopped at step {at}; run the same command again"):
            train(make_recipe(), folder)
    assert signal.getsignal(number) is before
    assert not (folder / "result.json").exists()
    assert (folder / "checkpoints" / f"checkpoint-{at}").is_dir()
    train(make_recipe(), folder)
    assert_same_run(folder, whole[0])
    assert not (folder / "checkpoints").exists()


def test_a_signal_during_an_evaluation_stops_at_its_end(make_recipe, tmp_path, monkeypatch):
    """The last one: no step comes after it in which it would be seen."""
    folder, evaluate = tmp_path / "run", callbacks.RunCallback.on_evaluate

    def stopping(self, args, state, control, **others):
        if state.global_step == STEPS and self.trainer.is_in_train:
            terminate(None)
        return evaluate(self, args, state, control, **others)

    monkeypatch.setattr(callbacks.RunCallback, "on_evaluate", stopping)
    with pytest.raises(Stopped, match=f"stopped at step {STEPS}"):
        train(make_recipe(), folder)
    assert not (folder / "result.json").exists()


def test_a_second_interrupt_stops_at_once(make_recipe, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, lambda _: [terminate(_, signal.SIGINT) for _ in range(2)], 9)
        with pytest.raises(KeyboardInterrupt):
            train(make_recipe(), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-6"]
    assert "stopping: this step is finished and saved first; Ctrl-C again stops at once\n" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_cut_short_by_a_kill_is_passed_over(whole, make_recipe, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, terminate, 9)
        with pytest.raises(RunError):
            train(make_recipe(), folder)
    broken = folder / "checkpoints" / "checkpoint-11"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    (broken / "trainer_state.json").write_text('{"global_step": 1')
    train(make_recipe(), folder)
    assert "continuing from step 9" in capsys.readouterr().err
    assert_same_run(folder, whole[0])


def test_a_loss_that_is_not_finite_stops_the_run(make_recipe, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    before_step(monkeypatch, poison, 9)
    with pytest.raises(RunError, match=r"not finite at step 9: .*kept: .*checkpoint-6$"):
        train(make_recipe(), folder)
    kept = load_file(folder / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (folder / "result.json").exists()


def test_a_full_disk_keeps_the_last_checkpoint(whole, make_recipe, tmp_path, monkeypatch):
    folder, save = tmp_path / "run", torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-12" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunError, match="disk of .*run is full: free some space and run the same command again"):
            train(make_recipe(), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-6"]
    train(make_recipe(), folder)
    assert_same_run(folder, whole[0])


def test_early_stopping_also_when_it_is_interrupted(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(early_stopping=1, epochs=20, learning_rate=1e-9)
    result = train(recipe, tmp_path / "run")
    assert result["steps"] == 12  # the second epoch brings nothing better
    assert result["best_epoch"] == 1
    with monkeypatch.context() as patch:
        patch.setattr("redpeft.training.train._scores", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe, tmp_path / "killed")
    assert train(recipe, tmp_path / "killed")["steps"] == 12
    assert_same_run(tmp_path / "killed", tmp_path / "run")


def test_save_steps_and_a_hard_kill(whole, make_recipe, tmp_path, monkeypatch, capsys):
    folder, recipe = tmp_path / "run", make_recipe(save_steps=4)
    with monkeypatch.context() as patch:
        before_step(patch, lambda _: 1 / 0, 10)
        with pytest.raises(ZeroDivisionError):
            train(recipe, folder)
    train(recipe, folder)
    assert "continuing from step 8" in capsys.readouterr().err
    assert_same_run(folder, whole[0])


def test_gradient_accumulation_does_not_change_the_run(whole, make_recipe, tmp_path):
    train(make_recipe(gradient_accumulation=2), tmp_path / "run")
    losses = [
        [entry["loss"] for entry in history(folder) if "loss" in entry] for folder in (whole[0], tmp_path / "run")
    ]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.05)  # dropout draws other numbers
    assert len(losses[1]) == len(losses[0])


def test_seeds_differ_and_head_lr_is_the_heads_alone(whole, make_recipe, tmp_path):
    train(make_recipe(seed=1), tmp_path / "seed")
    assert not torch.equal(*(load[sorted(load)[0]] for load in (weights(tmp_path / "seed"), weights(whole[0]))))
    train(make_recipe(head_lr=1e-12, max_steps=6), tmp_path / "head")
    train(make_recipe(learning_rate=1e-12, head_lr=1e-2, max_steps=6), tmp_path / "edits")
    head, edits = weights(tmp_path / "head"), weights(tmp_path / "edits")
    moved = {name: (head[name] - edits[name]).abs().max() for name in head}
    scale = next(name for name in head if name.endswith("scale_offset"))
    assert head[scale].abs().max() > 1e-2
    assert edits[scale].abs().max() < 1e-6
    assert moved["base_model.model.classifier.weight"] > 1e-3


def test_a_moved_run_folder_still_knows_its_best_epoch(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(learning_rate=0.3, schedule="constant", metric="accuracy")
    result = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_step(patch, terminate, 16)
        with pytest.raises(RunError):
            train(recipe, tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert train(recipe, tmp_path / "moved")["validation"] == result["validation"]
    assert result["best_epoch"] < 3, "the test needs a best epoch before the last"
    assert_same_run(tmp_path / "moved", tmp_path / "whole")


def test_a_log_has_lines_of_progress(make_recipe, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS", 0.0)
    monkeypatch.setattr(console, "SHARE", 0.0)
    train(make_recipe(max_steps=3), tmp_path / "run")
    said = capsys.readouterr().err
    for line in (
        "tokenising: row 0 of 48\n",
        r"step 2 of 3, loss \d\.\d{3}, \d+ s left\n",
        r"scoring: batch 2 of 2, \d+ s left\n",
    ):
        assert re.search(line, said), line
    run = open_run(tmp_path / "run")
    evaluate(run, data_folder / "test.jsonl")
    assert "scoring: batch 1 of 2" in capsys.readouterr().err
    assert len(list(predict(run, ["good", "bad", "great"], batch_size=2))) == 3
    assert re.search(r"row 2 of 3, \d+ s left\n", capsys.readouterr().err)


def test_bf16(make_recipe, tmp_path):
    result = train(make_recipe(base__dtype="bf16", max_steps=6), tmp_path / "run")
    assert torch.isfinite(torch.tensor(result["validation"]["loss"]))
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(make_recipe, tmp_path):
    train(make_recipe(max_steps=3), tmp_path / "plain")
    train(make_recipe(max_steps=3, gradient_checkpointing=True), tmp_path / "checkpointed")
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "checkpointed")[name], msg=name)


def test_a_batch_that_the_processes_cannot_share(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="batch_size 8 cannot be shared by 3 processes$"):
        train(make_recipe(), tmp_path / "run")
    with pytest.raises(UserError, match="batch_size 8 cannot be shared by 3 processes in 2 pieces each"):
        train(make_recipe(gradient_accumulation=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard(make_recipe, tmp_path):
    train(make_recipe(report_to="tensorboard", max_steps=2), tmp_path / "run")
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_continuing_from_an_adapter(whole, make_recipe, tmp_path):
    start = whole[0] / "adapter"
    train(make_recipe(init_from=str(start), learning_rate=1e-12, max_steps=1), tmp_path / "run")
    for name, tensor in weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, weights(whole[0])[name], atol=1e-6, rtol=0)


def rename_labels(data_folder, folder, names):
    """The data set with other names for its two labels."""
    folder.mkdir()
    for file in data_folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.dumps(row | {"label": names[row["label"]]}) + "\n" for row in rows]
        (folder / file.name).write_text("".join(lines))
    return str(folder)


@pytest.mark.parametrize("start", ["", "adapter"])
def test_an_adapter_of_other_labels_is_refused(start, whole, make_recipe, data_folder, tmp_path):
    data = rename_labels(data_folder, tmp_path / "data", {"negative": "negative", "positive": "sports"})
    recipe = make_recipe(init_from=str(whole[0] / start), data=data)
    with pytest.raises(UserError) as caught:
        train(recipe, tmp_path / "run")
    expected = (
        f"init_from: label_names is ['negative', 'positive'] in {whole[0] / start} and ['negative', 'sports'] here"
    )
    assert str(caught.value).startswith(expected)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_task_is_refused(whole, make_recipe, tmp_path):
    rows = json.dumps({"tokens": ["a", "b"], "tags": ["negative", "positive"]}) + "\n"
    (tmp_path / "train.jsonl").write_text(rows * 8)
    changes = {"task": "token-classification", "data": str(tmp_path / "train.jsonl")}
    with pytest.raises(UserError, match="init_from: task is classification in .* and token-classification here"):
        train(make_recipe(init_from=str(whole[0]), **changes), tmp_path / "run")


def test_an_adapter_out_of_its_run_says_no_labels(whole, make_recipe, tmp_path, capsys):
    shutil.copytree(whole[0] / "adapter", tmp_path / "alone")
    train(make_recipe(init_from=str(tmp_path / "alone"), max_steps=1), tmp_path / "run")
    assert "alone is not in a run folder: its head is assumed to have this data's labels" in capsys.readouterr().err


def test_labels_of_one_format_are_scored_in_another(make_recipe, tmp_path, capsys):
    rows = [(f"{'good' if index % 2 else 'bad'} {index}", index % 2) for index in range(24)]
    lines = "text,label\n" + "".join(f"{text},{number}.0\n" for text, number in rows)
    result = train(make_recipe(data=write(tmp_path / "rows.csv", lines), epochs=1), tmp_path / "run")
    said = capsys.readouterr().err
    assert "problem type: single_label_classification\nlabels: " in said
    assert result["rows"] == {"train": 22, "validation": 2}
    run = load_run(tmp_path / "run")
    assert run.task.label_names == ["0.0", "1.0"]
    files = [tmp_path / "rows.csv"]
    for kind in (int, float):
        lines = "".join(json.dumps({"text": text, "label": kind(number)}) + "\n" for text, number in rows)
        files.append(write(tmp_path / f"{kind.__name__}.jsonl", lines))
    scores = [evaluate(run, path) for path in files]
    assert sum(map(sum, scores[0]["confusion_matrix"]["counts"])) == 24
    assert scores[0] == scores[1] == scores[2]
    with pytest.raises(UserError, match=r"odd.csv, row 1: the label '1' is not among .* \(0.0, 1.0\)"):
        evaluate(run, write(tmp_path / "odd.csv", "text,label\na,1\n"))


def test_rows_without_a_label_are_left_out_in_evaluation_too(make_recipe, tmp_path, caplog):
    rows = "text,label\n" + "".join(f"text {index},{'ab'[index % 2]}\n" for index in range(12)) + "none,\nneither,\n"
    recipe = make_recipe(data=write(tmp_path / "rows.csv", rows), data__drop_missing=True, epochs=1)
    assert sum(train(recipe, tmp_path / "run")["rows"].values()) == 12
    counts = evaluate(load_run(tmp_path / "run"), tmp_path / "rows.csv")["confusion_matrix"]["counts"]
    assert sum(map(sum, counts)) == 12
    assert caplog.text.count("rows.csv, row 13 (and 1 more of 14)") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "no/such/folder"}, "no such model folder"),
        ({"batch_size": 9}, "batch_size 9 cannot be shared by 2 processes"),
        ({"method_options__site": "ffn"}, "RedConfig has no 'site'"),
        ({"method_options__sites": "nowhere"}, "unknown sites"),
        ({"method_options__unit": -1}, "unit must be"),
        ({"method": "head", "method_options__r": 4}, "method head has no options"),
        ({"init_from": "no/such/adapter"}, "no/such/adapter"),
        ({"report_to": ["trackio"]}, "report_to trackio: pip install trackio"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_read(changes, message, make_recipe, tmp_path, monkeypatch):
    if "report_to" in changes and importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("redpeft.training.train.read_data", lambda *_: pytest.fail("read the data"))
    with pytest.raises(UserError, match=message):
        train(make_recipe(**changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"), [({"data__text": "body"}, "no column"), ({"metric": "x"}, "no metric")]
)
def test_wrong_data_is_refused_before_the_model_is_loaded(changes, message, make_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("redpeft.training.learner.load_base", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(UserError, match=message):
        train(make_recipe(**changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "no/such/folder"}, "no such model folder: no/such/folder"),
        ({"data": "no/such/rows.csv"}, "no such file"),
        ({"data__text": "body"}, "no column 'body'"),
        ({"metric": "bleu"}, "no metric 'bleu'"),
        ({"precision": "fp16"}, "precision fp16 needs a GPU"),
        ({"base__dtype": "bf16", "precision": "fp32"}, "base.dtype bf16 needs a precision of 16 bits"),
        ({"method_options__sites": "nowhere"}, "unknown sites"),
        ({"init_from": "no/such/adapter"}, "no/such/adapter"),
        ({"report_to": ["wandb"]}, "report_to wandb: pip install wandb"),
    ],
)
def test_wrong_input_writes_nothing(changes, message, make_recipe, tmp_path):
    if changes.get("precision") == "fp16" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if "report_to" in changes and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(UserError, match=message) as caught:
        train(make_recipe(**changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """Another process that holds the lock of a folder until it is killed: call it with the folder."""
    started = []

    def hold(folder):
        folder.mkdir(exist_ok=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], **pipes))
        assert started[-1].stdout.readline() == b"held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_until_the_first_is_gone(other_process, make_recipe, tmp_path):
    folder = tmp_path / "run"
    first = other_process(folder)
    with pytest.raises(UserError, match=r"^another process is at work in .*run: wait, or choose another folder$"):
        train(make_recipe(), folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    first.kill()  # no time to tidy up: the file stays, and locks nobody out
    first.wait()
    assert (folder / ".lock").exists()
    assert train(make_recipe(max_steps=1), folder)["steps"] == 1
    assert not (folder / ".lock").exists()


def test_several_seeds_are_locked_as_one(other_process, make_recipe, tmp_path):
    other_process(tmp_path / "seeds")
    with pytest.raises(UserError, match="another process is at work in"):
        run_recipe(make_recipe(seeds=[1, 2]), tmp_path / "seeds")
    assert [path.name for path in (tmp_path / "seeds").iterdir()] == [".lock"]


def test_no_run_within_a_run(make_recipe, tmp_path):
    train(make_recipe(max_steps=1), tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(UserError, match=r"seed-1 would lie inside the run folder .*run: choose another"):
        run_recipe(make_recipe(max_steps=1, seeds=[1, 2]), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
