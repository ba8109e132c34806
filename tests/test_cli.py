from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModel

from redpeft import RedConfig, cli
from redpeft.errors import RunError, UserError


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


def one_line(text):
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize("name", ["init", "train", "evaluate", "predict", "sites", "inspect", "demo", "version"])
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
    assert "No such command 'trian'. Did you mean 'train'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("error", "expected"), [(UserError, 2), (RunError, 1)])
def test_errors_become_one_line_and_an_exit_code(redpeft, monkeypatch, error, expected):
    def fail(*_):
        print("progress on standard output")
        raise error("it went\nwrong")

    monkeypatch.setattr("redpeft.adapters.files.read_config", fail)
    code, out, err = redpeft("inspect", "somewhere", "--json")
    assert (code, out) == (expected, "")
    assert err == "progress on standard output\nredpeft: it went wrong\n"


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("redpeft.adapters.files.read_config", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "somewhere"])


def test_version(redpeft):
    code, out, _ = redpeft("version", "--json")
    assert code == 0
    assert {"python", "redpeft", "torch", "transformers", "peft"} <= json.loads(out).keys()
    assert "redpeft 0." in redpeft("version")[1]


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
    assert "is there already" in err
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


def test_sites_of_nothing(redpeft, tmp_path, tiny_decoder_folder):
    code, out, err = redpeft("sites", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert "no config.json" in err
    code, out, err = redpeft("sites", tiny_decoder_folder, "--sites", "fnn")
    assert (code, out) == (2, "")
    assert "fnn" in err


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


def test_train_prints_one_object(trained):
    run, out = trained
    result = json.loads(out)
    assert result["run"] == str(run)
    assert result["epochs"] == 1
    assert 0 <= result["test"]["accuracy"] <= 1
    assert (run / "adapter" / "adapter_config.json").is_file()


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
    summary = {"validation": {"accuracy": 0.5}, "test": None, "failed": {"seed-4": "the loss is not finite"}}
    monkeypatch.setattr("redpeft.runs.runner.run_recipe", lambda *_: summary)
    code, out, err = redpeft("train", f"base={tiny_encoder_folder}", f"data={data_folder}", "--json")
    assert code == 1
    assert json.loads(out)["validation"] == {"accuracy": 0.5}
    assert "the loss is not finite" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["a.yaml", "b.yaml"], "one recipe at a time"),
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
    assert json.loads(found)["metrics"]["accuracy"] == json.loads(out)["test"]["accuracy"]
    assert "accuracy" in redpeft("evaluate", run, test)[1]


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
    monkeypatch.setattr("sys.stdin", io.StringIO('the film is good\n\n{"text": "the film is bad"}\n'))
    code, out, _ = redpeft("predict", run, "-")
    assert code == 0
    again = [json.loads(line)["probabilities"]["yes"] for line in out.splitlines()]
    assert again == pytest.approx([row["probabilities"]["yes"] for row in rows[:2]], rel=1e-4)


def test_predict_names_a_broken_line(redpeft, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('the film\n{"text": \n'))
    code, _, err = redpeft("predict", trained[0], "-")
    assert code == 2
    assert "line 2 of standard input is broken JSON" in err.splitlines()[-1]
