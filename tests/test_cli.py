from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from redpeft import RedConfig, __version__, cli
from redpeft.errors import RunError, Stopped, UserError
from redpeft.runs import reports
from redpeft.tasks.files import read_file
from redpeft.training import trainer
from redpeft.training.recipe import load_recipe


@pytest.fixture
def redpeft(capsys):
    """Run a command: (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()  # what the fixtures printed
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        return exit_.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def adapter(tiny_encoder_folder, tmp_path):
    """Write an adapter with random edits into a folder under `tmp_path`."""

    def write(name, seed=0):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModel.from_pretrained(tiny_encoder_folder), RedConfig(init_weights=False))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return write


SITES = [f"encoder.layer.{index}.output.dense" for index in range(2)]


def standard_input(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def one_line(text):
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize("name", [name.callback.__name__.replace("_", "-") for name in cli.app.registered_commands])
def test_every_command_has_help_with_an_example_and_json(redpeft, name):
    code, out, _ = redpeft(name, "--help")
    assert code == 0
    assert f"redpeft {name}" in out.partition("Example:")[2]
    assert "--json" in out


def test_the_process_answers_a_mistake_without_a_traceback():
    call = [sys.executable, "-m", "redpeft", "trian"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith("redpeft: No such command 'trian'. Did you mean 'train'? See redpeft --help\n")
    assert "Traceback" not in done.stderr
    assert "Usage" not in done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["nosuch"], "No such command 'nosuch'. See redpeft --help"),
        (["train", "--nosuch"], "No such option: --nosuch"),
        (["evaluate"], "Missing argument 'run'. See redpeft evaluate --help"),
        (["predict", "run"], "Missing argument 'file'. See redpeft predict --help"),
        (["train", "a.yaml", "--out"], "Option '--out' requires an argument. See redpeft"),
        (["version", "extra"], "unexpected extra argument"),
        (["train", "--lr"], "recipe fields are written without dashes, as KEY=VALUE\n"),
        (["evaluate", "--lr", "1"], "See redpeft evaluate --help\n"),
        (
            ["train", "--base", "my models/b", "--learning-rate=1e-2", "--out", "r", "epochs=2"],
            "dashes: redpeft train 'base=my models/b' learning_rate=1e-2 --out r epochs=2\n",
        ),
        (["sweep", "r.yaml", "--lr", "1", "--grid", "seed=1,2"], "redpeft sweep r.yaml lr=1 --grid seed=1,2\n"),
    ],
)
def test_a_wrong_call_is_one_line(redpeft, call, message):
    code, out, err = redpeft(*call)
    assert (code, out) == (2, "")
    assert one_line(err)
    assert err.startswith("redpeft: ")
    assert message.lower() in err.lower()


def test_no_command_shows_the_help(redpeft):
    code, out, err = redpeft()
    assert (code, err) == (0, "")
    assert "evaluate" in out
    assert out == redpeft("--help")[1]


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["{data}/train.jsonl", "lr=1"], "redpeft train base=MODEL data={data}/train.jsonl lr=1"),
        (["base=b", "{data}"], "redpeft train base=b data={data}"),
        (["{model}", "data=rows.csv"], "redpeft train base={model} data=rows.csv"),
    ],
)
def test_what_is_given_in_place_of_a_recipe_is_recognised(redpeft, data_folder, tiny_encoder_folder, arguments, right):
    names = {"data": data_folder, "model": tiny_encoder_folder}
    code, out, err = redpeft("train", *(argument.format(**names) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.endswith(f" is not a recipe: give it as a field, such as: {right.format(**names)}\n")
    assert one_line(err)


@pytest.mark.parametrize(("error", "expected"), [(UserError, 2), (RunError, 1), (Stopped, 130)])
def test_errors_become_one_line_and_an_exit_code(redpeft, monkeypatch, error, expected):
    def fail(*_):
        print("progress on standard output")
        raise error("it went\nwrong")

    monkeypatch.setattr("redpeft.adapters.folder.read_config", fail)
    code, out, err = redpeft("inspect", "somewhere", "--json")
    assert (code, out) == (expected, "")
    assert err == "progress on standard output\nredpeft: it went wrong\n"


def test_an_interrupt_is_one_line(redpeft, monkeypatch):
    monkeypatch.setattr("redpeft.adapters.folder.read_config", lambda _: os.kill(os.getpid(), signal.SIGINT))
    code, out, err = redpeft("inspect", "somewhere")
    assert (code, out) == (130, "")
    assert err == "redpeft: interrupted; run the same command again to continue from what was saved\n"


def test_an_interrupted_training_says_how_to_go_on(redpeft, monkeypatch, tmp_path, tiny_encoder_folder, data_folder):
    """Of several seeds those that would come later do not start."""
    step = trainer.RunTrainer.training_step

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    call = ["train", f"base={tiny_encoder_folder}", f"data={data_folder}", "max_steps=2", "--seeds", "1,2"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.RunTrainer, "training_step", interrupted)
        code, out, err = redpeft(*call, "--out", tmp_path / "run")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "redpeft: stopped at step 1; run the same command again to continue"
    assert [path.name for path in tmp_path.glob("run/seed-*")] == ["seed-1"]
    code, out, err = redpeft(*call, "--out", tmp_path / "run")
    assert code == 0
    assert "continuing from step 1" in err


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("redpeft.adapters.folder.read_config", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "somewhere"])


def test_version(redpeft):
    code, out, _ = redpeft("version", "--json")
    assert code == 0
    assert {"python", "redpeft", "torch", "transformers", "peft"} <= json.loads(out).keys()
    assert "redpeft 0." in redpeft("version")[1]
    assert redpeft("--version")[:2] == (0, f"redpeft {__version__}\n")


def test_shells_complete_commands(monkeypatch):
    monkeypatch.setenv("_REDPEFT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "redpeft tra")
    monkeypatch.setenv("COMP_CWORD", "1")
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert (exit_.value.code, out.getvalue().strip()) == (0, "train")


def test_init_writes_a_recipe_and_never_over_a_file(redpeft, tmp_path):
    path = tmp_path / "recipe.yaml"
    code, out, _ = redpeft("init", path, "--json")
    assert (code, json.loads(out)) == (0, {"recipe": str(path)})
    text = path.read_text()
    assert "base:" in text
    assert "# " in text
    code, out, err = redpeft("init", path)
    assert (code, out) == (2, "")
    assert one_line(err)
    assert "exists already" in err
    assert path.read_text() == text
    code, _, err = redpeft("init", tmp_path / "no" / "recipe.yaml")
    assert code == 2
    assert "cannot write" in err


def test_sites(redpeft, tiny_decoder_folder):
    code, out, _ = redpeft("sites", tiny_decoder_folder, "--sites", "ffn,qkv", "--json")
    found = json.loads(out)
    assert code == 0
    assert {site["kind"] for site in found["sites"]} == {"ffn", "qkv"}
    assert found["parameters"] == 2 * 4 * 2 * 32
    code, out, _ = redpeft("sites", tiny_decoder_folder)
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in out
    code, out, _ = redpeft("sites", tiny_decoder_folder, "--layers", "1", "--json")
    assert [site["name"] for site in json.loads(out)["sites"]] == ["model.layers.1.mlp.down_proj"]


def test_sites_keeps_a_long_path_on_one_line(redpeft, tiny_decoder_folder, tmp_path):
    folder = tmp_path / ("a-long-name-" * 12) / ("and-another-" * 5)
    folder.parent.mkdir()
    folder.symlink_to(tiny_decoder_folder)
    out = redpeft("sites", folder)[1]
    assert f"{folder} (LlamaForCausalLM)" in out.splitlines()


def test_sites_of_nothing(redpeft, tmp_path, tiny_decoder_folder):
    code, out, err = redpeft("sites", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "no such model folder" in err
    code, out, err = redpeft("sites", tiny_decoder_folder, "--sites", "fnn")
    assert (code, out) == (2, "")
    assert "fnn" in err
    code, out, err = redpeft("sites", tiny_decoder_folder, "--layers", "0,7")
    assert (code, out) == (2, "")
    assert "no block to edit has the index [7]" in err
    code, out, err = redpeft("sites", tiny_decoder_folder, "--layers", "first")
    assert (code, out) == (2, "")
    assert "--layers takes block numbers such as 0,1,11, not 'first'" in err


def test_inspect_one_and_two_adapters(redpeft, adapter, tmp_path):
    adapter("run/adapter")
    other = adapter("other", seed=1)
    code, out, _ = redpeft("inspect", tmp_path / "run", "--json")
    assert code == 0
    assert [row["site"] for row in json.loads(out)["sites"]] == SITES
    code, out, _ = redpeft("inspect", tmp_path / "run", other, "--plot", tmp_path / "both.png", "--json")
    found = json.loads(out)
    assert found["adapter"] == str(tmp_path / "run" / "adapter")
    assert [row["edited_by"] for row in found["comparison"]] == ["both", "both"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = redpeft("inspect", tmp_path / "run", other)
    assert "cosine" in out
    assert SITES[0] in out


def test_inspect_refuses_a_broken_adapter(redpeft, adapter):
    folder = adapter("a")
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    code, out, err = redpeft("inspect", folder, "--json")
    assert (code, out) == (2, "")
    assert one_line(err)
    assert "corrupt or truncated" in err


def test_released_checkpoints_there_and_back(redpeft, tmp_path, tiny_decoder_folder):
    sites = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    torch.manual_seed(0)
    parts = {"bias": 5 * torch.randn(1, 32), "scaling": torch.ones(1, 32)}
    tensors = {f"{s}.delta_vector.activation_{part}": parts[part].bfloat16() for s in sites for part in parts}
    torch.save(tensors, tmp_path / "delta_vector.pth")
    call = ["import-released", tmp_path, "--base", tiny_decoder_folder, "--out"]
    code, out, err = redpeft(*call, tmp_path / "a", "--json")
    found = json.loads(out)
    assert (code, found["architecture"], found["parameters"]) == (0, "LlamaForCausalLM", 128)
    assert (found["adapter"], found["dtype"], len(found["bias_rms"])) == (str(tmp_path / "a"), "bfloat16", 2)
    code, out, _ = redpeft(*call, tmp_path / "b")
    assert code == 0
    assert "ffn: 2 modules in 2 layers" in out
    assert found["notes"][0] in out
    code, out, err = redpeft(*call, tmp_path / "b")
    assert (code, out) == (2, "")
    assert one_line(err)
    assert "exists already" in err
    code, out, _ = redpeft("export-released", tmp_path / "a", "--out", tmp_path / "c", "--json")
    file = tmp_path / "c" / "delta_vector.pth"
    assert (code, json.loads(out)) == (0, {"files": [str(file)], "modules": 2, "dtype": "bfloat16"})
    again = torch.load(file, weights_only=True)
    assert list(again) == list(tensors)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert "delta_vector.pth (bfloat16)" in redpeft("export-released", tmp_path / "a", "--out", tmp_path / "d")[1]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, count in {"train": 24, "validation": 8, "test": 8}.items():
        rows = [{"text": f"the film is {word}", "label": label} for word, label in (("good", "yes"), ("bad", "no"))]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * (count // 2)))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_encoder_folder, data_folder):
    """The run folder of `redpeft train recipe.yaml ... --out RUN --json`, and what was printed."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"base: {tiny_encoder_folder}\ndata: {data_folder}\nepochs: 7\n")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_:
        cli.main(["train", str(recipe), "epochs=1", "batch_size=8", "--out", str(folder / "run"), "--json"])
    assert exit_.value.code == 0
    return folder / "run", out.getvalue()


def test_preview_shows_a_recipe_and_makes_no_run(redpeft, tiny_encoder_folder, data_folder, tmp_path):
    call = ["preview", f"base={tiny_encoder_folder}", f"data={data_folder}", f"out={tmp_path / 'run'}", "batch_size=8"]
    code, out, _ = redpeft(*call, "max_steps=2", "--json")
    assert (code, json.loads(out)["steps"], json.loads(out)["rows"]["train"]) == (0, 2, 24)
    code, out, err = redpeft(*call, "max_steps=2", "seeds=1,2")
    assert code == 0
    assert "film is good [SEP] → [[yes]]" in out
    assert (
        "Rows: train 24, validation 8, test 8; none was cut\nThat is one run; there are 2, one for each seed." in out
    )
    assert list(tmp_path.iterdir()) == []
    code, out, err = redpeft(*call, "data.text=nosuch")
    assert (code, out) == (2, "")
    assert err == redpeft("train", *call[1:], "data.text=nosuch")[2]


def test_train_prints_one_object(trained):
    run, out = trained
    result = json.loads(out)
    assert result["run"] == str(run)
    assert result["epochs"] == 1
    assert 0 <= result["test"]["accuracy"] <= 1
    assert (run / "adapter" / "adapter_config.json").is_file()


def next_calls(shown):
    """What `train` prints at its end to be called next, as (standard input, arguments)."""
    for line in shown.partition("Next:\n")[2].splitlines():
        said, _, call = line.strip().rpartition(" | ")
        yield "".join(shlex.split(said)[1:]), shlex.split(call)[1:]


def run_next(redpeft, monkeypatch, shown):
    """Run what `train` prints at its end, as it is printed; the answers as data."""
    answers = []
    for typed, call in next_calls(shown):
        standard_input(monkeypatch, typed)
        code, out, err = redpeft(*call, *(["--json"] if call[0] == "evaluate" else []))
        assert code == 0, err
        answers.append([json.loads(line) for line in out.splitlines()])
    assert len(answers) == 2
    return answers


def test_train_ends_with_what_was_and_what_comes_next(redpeft, trained, data_folder, tiny_encoder_folder, monkeypatch):
    run, out = trained
    result = json.loads(out)
    recipe = run.parent / "recipe.yaml"
    code, shown, _ = redpeft("train", recipe, "epochs=1", "batch_size=8", "--out", run)
    assert code == 0
    assert re.search(r"metric *┃ validation, best epoch \(1\) *┃ test", shown)
    assert re.search(rf"accuracy *│ {result['validation']['accuracy']:.4f} *│ {result['test']['accuracy']:.4f}", shown)
    assert re.search(r"^Best epoch by accuracy: 1 of 1\. Trained in \d+ s, [\d.e-]+ s a step\.$", shown, re.M)
    assert "\nRows: train 24, validation 8, test 8; none was cut\n" in shown
    [[scores], labels] = run_next(redpeft, monkeypatch, shown)
    assert scores["metrics"] == result["test"]
    assert [row["text"] for row in labels[:2]] == ["the film is good", "the film is bad"]


def test_the_next_calls_fit_other_data_too(redpeft, tmp_path, tiny_encoder_folder, monkeypatch):
    """Pairs of a data set that is in no file, seeds, names with blanks, and rows that were cut."""
    rows = [{"question": "is the film good", "passage": "the film is very good " * 9}] * 3
    rows = [{**row, "label": label} for label in ("yes", "no") for row in rows]
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = [f"base={tiny_encoder_folder}", "batch_size=4", "max_steps=1", "max_length=32"]
    code, shown, err = redpeft(
        "train", *fields, f"data={tmp_path / 'my rows.jsonl'}", "--seeds", "3,4", "--out", tmp_path / "my run"
    )
    assert code == 0, err
    assert "\nBest epoch by accuracy: 0.5 (seed 3), 0.5 (seed 4). Trained in " in shown
    assert "\nRows: train 5 (5 cut), validation 1 (1 cut)\n" in shown
    assert "redpeft predict '" in shown
    _, [first, *_] = run_next(redpeft, monkeypatch, shown)
    assert first["question"] == "is the film good"
    run = tmp_path / "my run" / "seed-3"
    recipe = load_recipe(run / "recipe.yaml", {"data.path": "nyu-mll/glue", "config_name": "mrpc"})
    evaluate, predict = reports.next_calls(recipe, run)
    assert evaluate.endswith("/my run/seed-3' nyu-mll/glue --config mrpc")
    [(typed, call)] = next_calls(f"Next:\n{predict}")
    standard_input(monkeypatch, typed)
    code, out, err = redpeft(*call)
    assert (code, json.loads(out)["passage"]) == (0, "another"), err


def test_train_without_a_file_and_with_seeds(redpeft, tmp_path, tiny_encoder_folder, data_folder):
    call = ["train", f"base={tiny_encoder_folder}", f"data={data_folder}", "max_steps=1", "--seeds", "3,4"]
    code, out, _ = redpeft(*call, "--out", tmp_path / "run")
    assert code == 0
    assert {"seed-3", "seed-4"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "accuracy" in out
    assert "±" in out
    code, out, _ = redpeft(*call, "--out", tmp_path / "run", "--json")  # finished: answers at once
    assert json.loads(out)["seeds"] == [3, 4]


def test_a_failed_seed_is_reported_after_the_others(redpeft, monkeypatch, tmp_path, tiny_encoder_folder, data_folder):
    """Exit code 1, with the others' scores printed and kept; where every seed fails, the first one's error alone."""
    step = trainer.RunTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.args.seed == 4:
            raise RunError("the loss is not finite at step 1")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.RunTrainer, "training_step", failing)
    call = ["train", f"base={tiny_encoder_folder}", f"data={data_folder}", "max_steps=1", "--json"]
    code, out, err = redpeft(*call, "--seeds", "4,5", "--out", tmp_path / "run")
    summary = json.loads(out)
    assert code == 1
    assert summary["seeds"] == [5]
    assert summary["failed"] == {str(tmp_path / "run" / "seed-4"): "the loss is not finite at step 1"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["validation"] == summary["validation"]
    last = f"redpeft: some seeds failed: {tmp_path}/run/seed-4: the loss is not finite at step 1"
    assert err.splitlines()[-1] == last
    code, out, err = redpeft(*call, "--seeds", "4", "--out", tmp_path / "all")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "redpeft: the loss is not finite at step 1"
    assert not (tmp_path / "all" / "summary.json").exists()


def test_train_on_instructions_shows_the_test_split_too(redpeft, tmp_path, tiny_decoder_folder):
    pytest.importorskip("trl")
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"{split} {i}?", "response": f"It is {i}."} for i in range(4)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    arguments = (f"base={tiny_decoder_folder}", "task=instruction", f"data.path={tmp_path / 'data'}", "epochs=1")
    code, shown, err = redpeft("train", *arguments, "--out", out)
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert re.search(rf"loss\W+{result['validation']['loss']:.4f}\W+{result['test']['loss']:.4f}", shown)


def test_demo_does_not_write_into_another_run(redpeft, trained):
    run, _ = trained
    before = sorted(path.name for path in run.iterdir())
    code, out, err = redpeft("demo", "--out", run)
    assert (code, out) == (2, "")
    assert one_line(err)
    assert "which is no part of a demo" in err
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["a.yaml", "b.yaml"], "give one recipe, not a.yaml, b.yaml"),
        (["learningrate=1", "base=x", "data=y"], "did you mean 'learning_rate'?"),
        (["base=x", "data=y", "batch_size=none"], "batch_size"),
        (["base=x", "data=y", "--seeds", "one"], "seeds"),
        (["base=x"], "data is missing"),
        (["base=nowhere/at/all", "data={data}"], "no such model folder"),
        (["base=x", "data=nowhere.csv"], "nowhere.csv"),
    ],
)
def test_train_refuses_what_is_wrong(redpeft, monkeypatch, tmp_path, data_folder, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = redpeft("train", *(text.format(data=data_folder) for text in arguments), "--out", "run")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_evaluate_takes_a_run_or_its_adapter(redpeft, trained, data_folder):
    run, out = trained
    test = data_folder / "test.jsonl"
    code, found, _ = redpeft("evaluate", run / "adapter", test, "--json")
    assert code == 0
    scores = json.loads(found)
    accuracy = json.loads(out)["test"]["accuracy"]
    assert scores["metrics"]["accuracy"] == accuracy
    matrix = scores["confusion_matrix"]
    assert matrix["true"] == matrix["predicted"] == ["no", "yes"]
    assert [sum(counts) for counts in matrix["counts"]] == [4, 4]
    assert (matrix["counts"][0][0] + matrix["counts"][1][1]) / 8 == accuracy
    _, out, err = redpeft("evaluate", run, test)
    assert "accuracy" in out
    assert re.search(r"true label, as predicted\W+no\W+yes\W", out)
    for name, counts in zip(("no", "yes"), matrix["counts"], strict=True):
        assert re.search(rf"{name}\W+{counts[0]}\W+{counts[1]}\W", out)
    assert "eval_loss" not in err
    assert "it/s" not in err


def test_the_snippet_of_the_model_card_runs_as_printed(trained, monkeypatch):
    run, _ = trained
    [snippet] = re.findall(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), re.S)
    monkeypatch.chdir(run / "adapter")
    names = {}
    exec(compile(snippet, "card", "exec"), names)
    saved = load_file("adapter_model.safetensors")
    key = "base_model.model.classifier.weight"
    state = names["model"].state_dict()
    assert torch.equal(state[key.replace("classifier.", "classifier.modules_to_save.default.")], saved[key])


@pytest.mark.parametrize("hand_made", [False, True])
def test_an_adapter_folder_without_a_run_labels_and_is_scored(redpeft, trained, data_folder, tmp_path, hand_made):
    """What compose writes knows the labels; one that was copied out of its run knows their number."""
    run, out = trained
    test, folder = data_folder / "test.jsonl", tmp_path / "adapter"
    if hand_made:
        folder.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(run / "adapter" / name, folder)
    else:
        assert redpeft("compose", f"'{run}'", "--out", folder)[0] == 0
    code, answers, err = redpeft("predict", folder, test)
    assert code == 0, err
    whole = [json.loads(line)["probabilities"] for line in redpeft("predict", run, test)[1].splitlines()]
    found = [json.loads(line)["probabilities"] for line in answers.splitlines()]
    assert [set(row) for row in found] == [{"LABEL_0", "LABEL_1"} if hand_made else {"no", "yes"}] * 8
    assert [sorted(row.values()) for row in found] == [pytest.approx(sorted(row.values()), abs=1e-4) for row in whole]
    if not hand_made:
        code, scores, err = redpeft("evaluate", folder, test, "--json")
        assert code == 0, err
        assert json.loads(scores)["metrics"]["accuracy"] == json.loads(out)["test"]["accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "does not name its base model: give it with --base"),
        ({"task_type": None}, "does not say what it was trained for: give --task, one of classification,"),
        ({"peft_type": "VERA"}, "a VERA adapter needs its run folder"),
    ],
)
def test_what_an_adapter_folder_does_not_say_is_asked_for(redpeft, trained, data_folder, tmp_path, changes, message):
    folder = tmp_path / "adapter"
    shutil.copytree(trained[0] / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    code, out, err = redpeft("predict", folder, data_folder / "test.jsonl")
    assert (code, out) == (2, "")
    assert message in err
    assert one_line(err)
    code, _, err = redpeft("predict", folder, data_folder / "test.jsonl", "--base", "m", "--task", "poetry")
    assert code == 2
    if "VERA" not in message:
        assert "cannot be used for the task poetry: give --task, one of classification, token-classification," in err


def test_evaluate_refuses_what_is_no_run(redpeft, tmp_path, data_folder):
    code, out, err = redpeft("evaluate", tmp_path, data_folder)
    assert (code, out) == (2, "")
    assert "is no run folder" in err


def test_predict_writes_a_json_line_a_row(redpeft, trained, data_folder, monkeypatch):
    run, _ = trained
    code, out, _ = redpeft("predict", run, data_folder / "test.jsonl")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, len(rows)) == (0, 8)
    assert all(row["label"] in ("yes", "no") and set(row["probabilities"]) == {"yes", "no"} for row in rows)
    assert [row["text"] for row in rows[:2]] == ["the film is good", "the film is bad"]
    standard_input(monkeypatch, '{"text": "the film is good"}\n\n{"Text": "the film is bad", "id": 17}\n')
    code, out, _ = redpeft("predict", run, "-")
    assert code == 0
    assert [json.loads(line).get("id") for line in out.splitlines()] == [None, 17]
    again = [json.loads(line)["probabilities"]["yes"] for line in out.splitlines()]
    assert again == pytest.approx([row["probabilities"]["yes"] for row in rows[:2]], rel=1e-4)


def test_predict_reads_standard_input_as_it_reads_the_file(redpeft, trained, tmp_path, monkeypatch):
    content = 'number;text;label\r\n1;"the film, good";yes\r\n2;the film is bad;no\r\n'
    (tmp_path / "rows.csv").write_bytes(content.encode("utf-16"))
    code, of_file, _ = redpeft("predict", trained[0], tmp_path / "rows.csv")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode("utf-16"))))
    assert redpeft("predict", trained[0], "-")[:2] == (code, of_file)
    assert [json.loads(line)["text"] for line in of_file.splitlines()] == ["the film, good", "the film is bad"]
    standard_input(monkeypatch, "text,label\nthe film, good\n")
    code, out, _ = redpeft("predict", trained[0], "-", "--format", "lines")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["text,label", "the film, good"]


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.jsonl"])
def test_predict_writes_rows_with_their_answers(redpeft, trained, tmp_path, name):
    (tmp_path / "rows.csv").write_text("number,text,label\n007,the film is good,x\n2,the film is bad,\n")
    code, out, _ = redpeft("predict", trained[0], tmp_path / "rows.csv", "--out", tmp_path / name)
    assert (code, out) == (0, f"Wrote 2 rows with answers to {tmp_path / name}\n")
    rows = read_file(tmp_path / name)
    assert (rows["number"], rows["label"]) == (["007", "2"], ["x", None])
    assert set(rows["predicted_label"]) <= {"yes", "no"}
    probability = rows["probabilities.yes" if name.endswith("jsonl") else "probability yes"][0]
    assert len(str(probability).lstrip("0.")) <= 4
    again = redpeft("predict", trained[0], tmp_path / name, "--out", tmp_path / "again.csv")
    assert (again[0], read_file(tmp_path / "again.csv")["number"]) == (0, ["007", "2"])
    assert "predicted_predicted_label" in read_file(tmp_path / "again.csv").column_names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.csv", "rows.csv exists already: give another name, or remove it"),
        ("out.txt", "the extension decides the format; known are .csv, .tsv, .jsonl"),
        ("none/out.csv", "no such folder: "),
    ],
)
def test_predict_says_at_once_that_it_cannot_write(redpeft, trained, tmp_path, name, message):
    (tmp_path / "rows.csv").write_text("text\nthe film\n")
    code, out, err = redpeft("predict", trained[0], tmp_path / "rows.csv", "--out", tmp_path / name)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_numbers_of_the_rows_stay_as_they_are(redpeft, trained, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "the film", "price": 123456.789, "value": 1}\n')
    redpeft("predict", trained[0], tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["price"], row["value"]) == (123456.789, 1)


def test_lines_of_a_text_file_and_columns_in_another_case(redpeft, trained, tmp_path):
    (tmp_path / "rows.txt").write_bytes("the film, good\nthe film é\n".encode("utf-16"))
    _, out, _ = redpeft("predict", trained[0], tmp_path / "rows.txt")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["the film, good", "the film é"]
    (tmp_path / "rows.csv").write_text("Text,LABEL\nthe film is good,yes\nthe film is bad,no\n")
    assert redpeft("evaluate", trained[0], tmp_path / "rows.csv")[0] == 0


def test_predict_names_a_broken_line(redpeft, trained, tmp_path, monkeypatch):
    (tmp_path / "ask.jsonl").write_text('{"text": "the film"}\n{"text": " "}\n')
    code, _, err = redpeft("predict", trained[0], tmp_path / "ask.jsonl")
    assert (code, err.splitlines()[-1]) == (2, "redpeft: ask.jsonl, row 2: the text in column 'text' is empty")
    standard_input(monkeypatch, '{"text": "the film"}\n{"text": \n')
    code, _, err = redpeft("predict", trained[0], "-")
    assert code == 2
    assert "standard input, line 2: broken JSON" in err.splitlines()[-1]
    standard_input(monkeypatch, '\n\n{"body": "the film"}\n')
    code, out, err = redpeft("predict", trained[0], "-")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "redpeft: row 3 has no 'text'; it has 'body'"
    standard_input(monkeypatch, "")
    code, out, err = redpeft("predict", trained[0], "-")
    assert (code, out, err.splitlines()[-1]) == (2, "", "redpeft: standard input is empty: it holds no rows")


@pytest.mark.timeout(120)
def test_predict_answers_a_line_before_the_next_one_comes(trained):
    """As a person at a terminal, or a program at the other end of two pipes, expects it."""
    call = [sys.executable, "-m", "redpeft", "predict", str(trained[0]), "-"]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for line in ("the film is good", "the film is bad"):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == line
        assert process.communicate()[0] == b""
        assert process.returncode == 0


def test_list_shows_a_run_with_its_score(redpeft, trained):
    run, result = trained
    (row,) = json.loads(redpeft("list", run.parent, "--json")[1])["adapters"]
    assert (row["name"], row["status"]) == ("run", "ok")
    assert row["validation"] == json.loads(result)["validation"]["accuracy"]


def test_list_shows_all_before_it_fails(redpeft, adapter, tmp_path):
    adapter("in/one")
    weights = adapter("in/two", seed=1) / "adapter_model.safetensors"
    code, out, err = redpeft("list", tmp_path / "in")
    assert (code, err) == (0, "")
    assert re.search(r"one .* red ffn .* 128 .* ok", out)
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = redpeft("list", tmp_path / "in")
    assert code == 1
    assert re.search(r"one .* ok", out)
    assert re.search(r"two .* damaged", out)
    assert f"two: {weights}: corrupt or truncated" in out
    assert err == "redpeft: damaged: 1 of 2 adapters: two\n"
    code, out, _ = redpeft("list", tmp_path / "in", "--json")
    assert code == 1
    assert [row["status"] for row in json.loads(out)["adapters"]] == ["ok", "damaged"]


def test_fold_writes_a_checkpoint_and_says_how_exact_it_is(redpeft, adapter, tiny_encoder_folder, tmp_path):
    folder = adapter("one")
    code, out, err = redpeft("fold", folder, "--base", tiny_encoder_folder, "--out", tmp_path / "folded", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["architecture"], found["dtype"], found["adapter"]) == ("BertModel", "float32", None)
    assert [site["placement"] for site in found["sites"]] == ["weight and bias"] * 2
    assert all(site["error"] < 1e-6 and site["vanished"] == 0 for site in found["sites"])
    folded, base = AutoModel.from_pretrained(tmp_path / "folded"), AutoModel.from_pretrained(tiny_encoder_folder)
    weight = "encoder.layer.1.output.dense.weight"
    assert not torch.equal(folded.state_dict()[weight], base.state_dict()[weight])

    code, out, _ = redpeft(
        "fold", folder, "--base", tiny_encoder_folder, "--out", tmp_path / "table", "--dtype", "bf16"
    )
    assert code == 0
    for text in ("BertModel, bfloat16", "encoder.layer.*.output.dense", "rounding / edit", f"Checkpoint: {tmp_path}"):
        assert text in out


def test_fold_shows_its_plan_for_a_model_or_an_adapter(redpeft, adapter, tiny_encoder_folder, tiny_decoder_folder):
    code, out, _ = redpeft("fold", "--plan", tiny_decoder_folder, "--sites", "red+")
    assert code == 0
    assert "a bias by attention_bias=True, mlp_bias=True" in out
    assert "A plain checkpoint carries all of it." in out
    code, out, _ = redpeft("fold", adapter("one"), "--plan", tiny_encoder_folder, "--json")
    assert json.loads(out)["placements"] == dict.fromkeys(SITES, "weight and bias")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ADAPTER"], "give an adapter and --out, or --plan MODEL"),
        (["ADAPTER", "--out", "OUT", "--base", "nowhere"], "no folder and no model on the Hub has this name"),
        (["ADAPTER", "--out", "OUT", "--as", "llama"], "BertModel is not known to be Llama by another name"),
    ],
)
def test_a_wrong_call_of_fold_is_one_line(redpeft, adapter, tmp_path, arguments, said):
    names = {"ADAPTER": adapter("one"), "OUT": tmp_path / "out"}
    code, out, err = redpeft("fold", *(names.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "")
    assert said in err
    assert one_line(err)
    assert not (tmp_path / "out").exists()


def test_data_to_text_from_training_to_scores(redpeft, tmp_path, tiny_gpt2_folder, e2e_folder, monkeypatch, caplog):
    monkeypatch.setattr("redpeft.tasks.metrics.has_java", lambda: False)
    call = ["train", "task=e2e", f"base={tiny_gpt2_folder}", f"data={e2e_folder}", "max_steps=3", "batch_size=8"]
    code, out, err = redpeft(*call, "--out", tmp_path / "run", "--json")
    assert code == 0, err
    trained = json.loads(out)["test"]
    code, out, _ = redpeft(*call, "--out", tmp_path / "run")  # done already: its table has all that was scored
    for name in ("loss", "bleu", "nist", "meteor", "rouge_l", "cider"):
        score = "-" if trained[name] is None else f"{trained[name]:.4f}"
        assert re.search(rf"^│ {name} +│ +[\d.-]+ +│ +{re.escape(score)} +│$", out, re.M), name
    run_next(redpeft, monkeypatch, out)
    test = e2e_folder / "testset_w_refs.csv"
    code, out, _ = redpeft("predict", tmp_path / "run", test)
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, len(rows), len({row["mr"] for row in rows})) == (0, 4, 4)
    (tmp_path / "predictions.jsonl").write_text(out)
    files = ["--references", test, "--predictions", tmp_path / "predictions.jsonl"]
    code, out, _ = redpeft("score", "e2e", *files, "--json")
    found = json.loads(out)
    assert (code, found["benchmark"]) == (0, "e2e")
    assert found["scores"] == {name: trained[name] for name in ("bleu", "nist", "meteor", "rouge_l", "cider")}
    assert caplog.messages[-1].startswith("METEOR, ROUGE-L and CIDEr are left out, since they need Java: install")
    code, out, _ = redpeft("evaluate", tmp_path / "run", test)
    assert code == 0
    for name in ("loss", "bleu", "nist", "cider"):
        assert name in out


def test_score_prints_a_table(redpeft, tmp_path, monkeypatch):
    monkeypatch.setattr("redpeft.tasks.metrics.has_java", lambda: False)
    (tmp_path / "label.txt").write_text("Zizzi is a pub by the river.\nA pub by the river is Zizzi.\n\nCotto.\n\n")
    (tmp_path / "pred.txt").write_text("Zizzi is a pub by the river.\nCotto.\n")
    files = ["--references", tmp_path / "label.txt", "--predictions", tmp_path / "pred.txt"]
    code, out, _ = redpeft("score", "e2e", *files)
    assert code == 0
    assert re.search(r"bleu *│ 100\.0000", out)
    assert re.search(r"meteor *│ - ", out)


@pytest.mark.parametrize(
    ("benchmark", "predictions", "message"),
    [
        ("e2e", "One.\nTwo.\n", "holds 2 predictions and "),
        ("e2e", "", "pred.txt is empty"),
        ("e2e", "One.\n\nTwo.\n", "pred.txt, line 2: the line is empty"),
        ("e2e", None, "no such file: "),
        ("e2e", "a\0b\n", "pred.txt, line 1: it holds NUL bytes"),
        ("e3e", "One.\n", "'e3e' is not"),
    ],
)
def test_score_refuses_what_is_wrong(redpeft, tmp_path, benchmark, predictions, message):
    (tmp_path / "label.txt").write_text("One.\n")
    if predictions is not None:
        (tmp_path / "pred.txt").write_bytes(predictions.encode("utf-8", "surrogateescape"))
    files = ["--references", tmp_path / "label.txt", "--predictions", tmp_path / "pred.txt"]
    code, out, err = redpeft("score", benchmark, *files)
    assert (code, out) == (2, "")
    assert message in err
    assert one_line(err)


def test_each_command_of_a_process_logs_to_its_own_standard_error(tiny_encoder_folder, tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"t{i},{['a|b', 'b', 'a'][i % 3]}\n" for i in range(12))
    )
    call = ["train", f"base={tiny_encoder_folder}", f"data={tmp_path / 'rows.csv'}", "metric=none"]
    script = (
        "import contextlib, io, json, sys\nfrom redpeft.cli import main\nsaid = []\n"
        "for _ in range(2):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.suppress(SystemExit):\n"
        f"        main({call!r})\n"
        "    said.append(err.getvalue())\n"
        "print(json.dumps(said))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    first, second = json.loads(run.stdout.splitlines()[-1])
    assert all("several labels a row, separated by '|'" in said for said in (first, second))


def test_a_chat_from_a_pipe(redpeft, monkeypatch, tiny_decoder_folder, tmp_path):
    """Answers alone are on standard output, and with --json a line for each question."""
    decoder = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)
    get_peft_model(decoder, RedConfig(task_type="CAUSAL_LM", init_weights=False)).save_pretrained(tmp_path / "red")
    call = ["chat", tmp_path / "red", "--temperature", "0", "--max-new-tokens", "5"]
    standard_input(monkeypatch, "Hi\n/side-by-side\nHo\n")
    code, out, err = redpeft(*call, "--json")
    first, second, result = map(json.loads, out.splitlines())
    assert code == 0
    assert (first["question"], list(first["answers"]), list(second["answers"])) == ("Hi", ["red"], ["base", "red"])
    assert [each["role"] for each in result["messages"]] == ["user", "assistant"] * 2
    standard_input(monkeypatch, "Hi\n")
    assert redpeft(*call)[1].strip() == first["answers"]["red"]
    standard_input(monkeypatch, "/adapter nosuch\nHi\n")
    code, out, err = redpeft(*call)
    assert (code, out) == (2, "")
    assert err.endswith("redpeft: there is no adapter 'nosuch'. The adapters are: red\n")
    code, out, err = redpeft(*call, "--top-p", "2")
    assert (code, out, err) == (2, "", "redpeft: top_p: Input should be less than or equal to 1, not 2.0\n")
