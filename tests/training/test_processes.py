"""The same run on one process and on two (CPU, gloo), started as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.data import write_rows
from redpeft.storage import read_result
from redpeft.training.predict import evaluate, load_run

JOB = """
import os, signal, sys
from redpeft.training import trainer
from redpeft.training.recipe import load_recipe
from redpeft.training.train import train

stop, step = os.environ.get("STOP_BEFORE"), trainer.RunTrainer.training_step

def stopping(self, *args, **kwargs):
    if str(self.state.global_step + 1) == stop and self.args.process_index == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, *args, **kwargs)

trainer.RunTrainer.training_step = stopping
result = train(load_recipe(sys.argv[1]), sys.argv[2])
assert result["steps"] == 18
"""
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def launch(recipe, folder, processes=1, success=True, **environment):
    folder.mkdir(exist_ok=True)
    recipe.save(folder / "recipe.yaml")
    (folder / "job.py").write_text(JOB)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "job.py", "recipe.yaml", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert (done.returncode == 0) == success, done.stderr[-3000:]
    return folder / "run"


def history(run, key):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


@pytest.fixture(scope="module")
def without_dropout(make_recipe, tiny_encoder_folder, tmp_path_factory):
    """Dropout draws differ with the number of processes, so the model has none."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    shutil.copytree(tiny_encoder_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return make_recipe(base=str(folder))


@pytest.fixture(scope="module")
def one(without_dropout, tmp_path_factory):
    return launch(without_dropout, tmp_path_factory.mktemp("one") / "job")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(environment, one, without_dropout, tmp_path):
    run = launch(without_dropout, tmp_path / "job", processes=2, **environment)
    assert_same_run(run, one)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_stop_together_and_resume(environment, one, without_dropout, tmp_path):
    """SIGTERM reaches one process, inside the second epoch."""
    run = launch(without_dropout, tmp_path / "job", processes=2, success=False, STOP_BEFORE="9", **environment)
    assert (run / "checkpoints" / "checkpoint-9").is_dir()
    assert not (run / "result.json").exists()
    launch(without_dropout, tmp_path / "job", processes=2, **environment)
    assert_same_run(run, one)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_generate_as_one(make_recipe, tiny_gpt2_folder, e2e_folder, tmp_path):
    """The test split has four questions, fewer than two processes take at once: each is answered once all the same."""
    folder = tmp_path / "decoder"
    shutil.copytree(tiny_gpt2_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = make_recipe(task="e2e", base=str(folder), data=str(e2e_folder), batch_size=4, learning_rate=0.1)
    no_java = str(Path(sys.executable).parent)
    runs = [launch(recipe, tmp_path / str(count), processes=count, PATH=no_java) for count in (1, 2)]
    one, two = (read_result(run)["test"] for run in runs)
    assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=1e-3)
    assert one == two
    assert one["bleu"] is not None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_learn_by_rewards(make_recipe, tiny_decoder_folder, tmp_path):
    """Every row is scored once, by one of them."""
    pytest.importorskip("trl")
    rows = [
        {"prompt": f"spell {word}", "kind": place} for place, word in enumerate(("good", "film", "shop", "tree", "a"))
    ]
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "scores.py").write_text(
        "def even(completion_ids, **_):\n"
        "    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]\n\n"
        "def kind(kind, **_):\n    return kind\n"
    )
    fields = {
        "data": str(tmp_path),
        "reward": "scores:even,scores:kind",
        "max_completion_length": 6,
        "num_generations": 4,
    }
    recipe = make_recipe(base=str(tiny_decoder_folder), **fields, batch_size=2, max_steps=18, learning_rate=0.3)
    run = launch(recipe, tmp_path / "job", processes=2)
    result = read_result(run)
    assert result["test"]["reward_kind"] == sum(range(5)) / 5
    assert result["test"]["reward"] == pytest.approx(result["test"]["reward_even"] + result["test"]["reward_kind"])
    assert result["test"]["completion_length"] <= 6
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path / "job")
        patched.setattr("sys.path", list(sys.path))
        again = evaluate(load_run(run), f"{tmp_path}/test.jsonl")
    assert again == pytest.approx(result["test"], rel=1e-4)


def assert_same_run(run, one):
    assert {path.name for path in run.iterdir()} == {path.name for path in one.iterdir()}
    assert history(run, "loss") == pytest.approx(history(one, "loss"), rel=1e-3)
    assert history(run, "eval_loss") == pytest.approx(history(one, "eval_loss"), rel=1e-3)
    mine, alone = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, one))
    assert mine.keys() == alone.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == torch.float32, name
        torch.testing.assert_close(tensor, alone[name], rtol=1e-2, atol=1e-3)
        if name.endswith("unit"):
            assert torch.equal(tensor, alone[name])
    assert read_result(run)["test"] == pytest.approx(read_result(one)["test"], rel=1e-3)
    assert read_result(run)["trainable_parameters"] == read_result(one)["trainable_parameters"]
