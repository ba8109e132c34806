from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from redpeft.errors import UserError
from redpeft.tasks.base_model import load_base, token_limit


def error_of(auto_class, base) -> str:
    with pytest.raises(UserError) as caught:
        load_base(auto_class, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_model_folder(tmp_path):
    for auto_class in (AutoTokenizer, AutoModelForCausalLM):
        assert error_of(auto_class, tmp_path / "none") == f"no such model folder: {tmp_path / 'none'}"
        assert error_of(auto_class, "./none") == "no such model folder: ./none"
    file = tmp_path / "model.bin"
    file.touch()
    assert "no such model folder" in error_of(AutoTokenizer, file)


def test_a_folder_that_holds_no_model(tmp_path):
    assert f"cannot load {tmp_path} with AutoModelForCausalLM: " in error_of(AutoModelForCausalLM, tmp_path)


def test_a_hub_name_that_does_not_load():
    class Offline:
        @staticmethod
        def from_pretrained(name):
            raise OSError(f"We couldn't connect for {name}\nlong story")

    assert error_of(Offline, "owner/model") == (
        "cannot load owner/model, a name on the Hugging Face hub since there is no such folder, with Offline: "
        "We couldn't connect for owner/model"
    )


def test_an_architecture_without_such_a_head(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    message = error_of(AutoModelForSequenceClassification, tmp_path)
    assert "with AutoModelForSequenceClassification: Unrecognized configuration class" in message


def test_truncated_weights(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"cannot load {tmp_path} with " in error_of(AutoModelForSequenceClassification, tmp_path)


def test_loading_and_lengths(tiny_encoder_folder):
    tokenizer = load_base(AutoTokenizer, tiny_encoder_folder)
    assert [token_limit(tokenizer, length) for length in (10, 1000, None)] == [10, 64, 64]
    assert load_base(AutoModelForSequenceClassification, str(tiny_encoder_folder), num_labels=3).num_labels == 3
