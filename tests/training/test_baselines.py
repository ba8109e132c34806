"""Baselines from training to prediction, on encoders, decoders and encoder-decoders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.methods import OPTIONS
from redpeft.errors import Stopped
from redpeft.training.predict import evaluate, load_run, predict
from redpeft.training.train import train
from redpeft.training.trainer import RunTrainer


def short(method, **changes):
    options = OPTIONS.get(method, {})
    return {"method": method, "method_options": options, "max_length": 48, "learning_rate": 3e-2, **changes}


@pytest.mark.parametrize("method", ["adapter", "prompt", "prefix", "top_layers"])
def test_a_stopped_run_resumes_bit_for_bit(method, make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(**short(method))
    whole = train(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(10, patch)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "cut")
    result = train(recipe, tmp_path / "cut")
    assert result["validation"] == whole["validation"]
    [there] = (tmp_path / "whole").glob("*/*.safetensors")
    expected, found = load_file(there), load_file(tmp_path / "cut" / there.relative_to(tmp_path / "whole"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def stop_at(step, patch):
    """As if SIGTERM came before this step."""
    original = RunTrainer.training_step

    def training_step(self, *args, **kwargs):
        self.terminated = self.state.global_step + 1 >= step
        return original(self, *args, **kwargs)

    patch.setattr(RunTrainer, "training_step", training_step)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_data_to_text_with_gpt2(method, make_recipe, tiny_gpt2_folder, e2e_folder, tmp_path):
    changes = {"task": "e2e", "base": str(tiny_gpt2_folder), "data": str(e2e_folder), "max_steps": 3}
    changes["max_length"] = 128
    trains_and_answers(make_recipe(**{**short(method), **changes}), {"mr": "name[Aromi], food[Thai]"}, tmp_path)


@pytest.mark.parametrize("method", ["adapter", "adapter_drop", "bitfit", "prompt", "prefix", "lora", "ia3"])
def test_text_to_text_with_t5(method, make_recipe, tiny_t5_folder, tmp_path):
    changes = {"task": "text-to-text", "base": str(tiny_t5_folder), "max_steps": 3}
    trains_and_answers(make_recipe(**{**short(method), **changes}), "the film is good", tmp_path)


@pytest.mark.parametrize("method", ["adapter", "adapter_ffn", "prompt", "prefix", "lora", "ia3"])
def test_instructions_with_gpt2(method, make_recipe, tiny_gpt2_folder, tmp_path):
    pytest.importorskip("trl")
    rows = [{"prompt": f"say {word}", "response": word} for word in ("good", "bad") * 6]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"task": "instruction", "base": str(tiny_gpt2_folder), "data": str(tmp_path), "max_steps": 3}
    trains_and_answers(make_recipe(**{**short(method), **changes}), "say good", tmp_path)


def trains_and_answers(recipe, row, folder):
    """A run whose reloaded model scores as it did, and answers."""
    result = train(recipe, folder / "run")
    assert result["trainable_parameters"] > 0
    assert result["head_parameters"] == 0
    run = load_run(folder / "run")
    scores = evaluate(run, recipe.data.path)
    assert scores["loss"] == pytest.approx((result["test"] or result["validation"])["loss"], rel=1e-4)
    [answer] = predict(run, [row], max_new_tokens=3)
    assert isinstance(answer.get("text", answer.get("label")), str)
