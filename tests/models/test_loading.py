"""Base models that load, and what is said of those that do not."""

import json
import shutil

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from redpeft.errors import UserError
from redpeft.models import load_decoder, load_pretrained, load_tokenizer


def error_of(auto_class, base) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(auto_class, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_model_folder(tmp_path):
    for auto_class in (AutoTokenizer, AutoModelForCausalLM):
        assert error_of(auto_class, tmp_path / "none") == f"no such model folder: {tmp_path / 'none'}"
        assert error_of(auto_class, "./none") == "no such model folder: ./none"
    file = tmp_path / "model.bin"
    file.touch()
    assert "no such model folder" in error_of(AutoTokenizer, file)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "it holds no model, neither a config.json nor a GGUF file, and is empty: give another folder"),
        (
            dict.fromkeys(("a.txt", "b.txt", "c.txt", "d.txt", ".hidden"), ""),
            "it holds no model, neither a config.json nor a GGUF file, only a.txt, b.txt, c.txt and 1 more: give ",
        ),
        ({"adapter_config.json": "{}"}, "it holds an adapter and no model: give the adapter's base model, or fold "),
        ({"adapter/adapter_config.json": "{}", "recipe.yaml": ""}, "it holds an adapter and no model: "),
        (
            {"checkpoint-2/config.json": "{}"},
            "it holds no config.json, but {folder}/checkpoint-2 does: ",
        ),
        (
            {"snapshots/1f/config.json": "{}", "refs/main": "1f"},
            "it holds no config.json, but {folder}/snapshots/1f does: give that folder",
        ),
        (
            {"model.gguf": "GGUF", "adapter_model.safetensors": ""},
            "it holds weights without a config.json: for the GGUF file in it give {folder}/model.gguf",
        ),
        ({"config.json": '{"model_type": "ll'}, "its config.json is broken: copy it again"),
        ({"config.json": "[]"}, "its config.json is broken: copy it again"),
        ({"config.json": "{}"}, "its config.json names no architecture (model_type)"),
    ],
)
def test_a_folder_without_a_model_says_what_is_missing(files, says, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for auto_class in (AutoTokenizer, AutoModelForCausalLM, AutoConfig):
        start = f"cannot load {tmp_path} with {auto_class.__name__}: {says.format(folder=tmp_path)}"
        assert error_of(auto_class, tmp_path).startswith(start)


def test_a_folder_with_a_tokenizer_alone(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == len(tiny_tokenizer)  # as an adapter's folder has one
    assert "it holds no model, neither a config.json nor a GGUF file, only " in error_of(
        AutoModelForCausalLM, tmp_path
    )


def test_a_folder_without_weights(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    assert error_of(AutoModelForSequenceClassification, tmp_path).endswith(
        ": its weights are missing: model.safetensors, or several files and model.safetensors.index.json"
    )


def test_an_architecture_that_transformers_does_not_know(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wondrous"}))
    says = f"transformers {transformers.__version__} does not know the architecture wondrous: a newer one may"
    assert error_of(AutoModelForSequenceClassification, tmp_path).endswith(f": {says}")


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
    for auto_class, advice in (
        (AutoModelForSequenceClassification, "choose another task"),
        (AutoModelForCausalLM, "the task needs a decoder, such as Llama or GPT-2"),
    ):
        message = error_of(auto_class, tmp_path)
        assert message.endswith(
            f" with {auto_class.__name__}: transformers has no such class for this architecture; {advice}"
        )


def test_truncated_weights(tiny_encoder_folder, tmp_path):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"cannot load {tmp_path} with " in error_of(AutoModelForSequenceClassification, tmp_path)


def test_a_model_is_loaded(tiny_encoder_folder):
    assert load_pretrained(AutoModelForSequenceClassification, str(tiny_encoder_folder), num_labels=3).num_labels == 3


def test_an_encoder_cannot_write(tiny_encoder_folder, tiny_tokenizer):
    with pytest.raises(
        UserError, match="is an encoder .BertLMHeadModel., which cannot generate text: the task needs a"
    ):
        load_decoder(tiny_encoder_folder, tiny_tokenizer)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_tokenizer_without_a_vocabulary(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"^the tokenizer of {tmp_path} has no vocabulary: its files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("broken", ["{}", "{", '{"model": {"type": "X"}}', ""])
def test_a_tokenizer_with_a_broken_file(tiny_encoder_folder, tmp_path, broken):
    shutil.copytree(tiny_encoder_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(broken)
    assert f"cannot load {tmp_path} with AutoTokenizer: " in error_of(AutoTokenizer, tmp_path)
