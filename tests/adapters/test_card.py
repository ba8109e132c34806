from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from helpers.adapters import SITES, random_tensors, write_folder
from redpeft.adapters.card import write_card
from redpeft.errors import UserError


def test_card_says_what_how_and_how_well(tmp_path):
    tensors = random_tensors()
    tensors["base_model.model.classifier.weight"] = next(iter(tensors.values()))[None].clone()
    folder = write_folder(tmp_path / "a", tensors, task_type="SEQ_CLS")
    path = write_card(
        folder,
        task="classification",
        metrics={"accuracy": 0.91234567, "f1": 0.9},
        labels=["refund", "card lost"],
        recipe={"base": "some/encoder", "rate": 0.03},
        license="apache-2.0",
    )
    assert path == folder / "README.md"
    card = ModelCard.load(path)
    assert card.data.library_name == "peft"
    assert card.data.base_model == "some/encoder"
    assert card.data.tags == ["redpeft", "peft", "classification"]
    assert card.data.metrics == ["accuracy", "f1"]
    assert card.data.license == "apache-2.0"
    for text in (
        "import redpeft",
        'AutoModelForSequenceClassification.from_pretrained("some/encoder", num_labels=2)',
        "PeftModel.from_pretrained(base,",
        "| accuracy | 0.9123 |",
        "1. `card lost`",
        "base: some/encoder\nrate: 0.03\n",
        "| sites | 2 (ffn) |",
        "| parameters of the edits | 128 |",
        "| parameters of the head | 32 |",
        "abc123",
        f"- `{SITES[1]}`",
    ):
        assert text in card.text


def test_card_leaves_out_what_is_not_known(adapter_folder):
    card = ModelCard.load(write_card(adapter_folder))
    assert card.data.license is None
    assert card.data.metrics is None
    assert "## Results" not in card.text
    assert "## Training recipe" not in card.text
    assert "AutoModel.from_pretrained" in card.text


@pytest.mark.parametrize("exists", [True, False])
def test_a_path_is_no_model_id(tmp_path, exists):
    base = tmp_path / "my-encoder"
    if exists:
        base.mkdir()
    folder = write_folder(tmp_path / "a", random_tensors(), base_model_name_or_path=str(base))
    card = ModelCard.load(write_card(folder))
    assert card.data.base_model is None
    assert "my-encoder" in card.text
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize("base", ["smollm2", "models/smollm2.gguf"])
def test_a_gguf_file_is_written_as_a_folder_first(base, tmp_path):
    folder = write_folder(tmp_path / "a", random_tensors(), base_model_name_or_path=base)
    card = ModelCard.load(write_card(folder))
    assert card.data.base_model is None
    line = f'.from_pretrained("path/to/base")  # redpeft export-base {base.split("/")[-1]} --out path/to/base\n'
    assert line in card.text


def test_card_of_another_method(tmp_path):
    folder = write_folder(tmp_path / "a", {}, peft_type="LORA", task_type="CAUSAL_LM")
    card = ModelCard.load(write_card(folder, metrics={"loss": 1.5}))
    assert card.data.tags == ["lora", "peft"]
    assert "# LORA adapter for encoder" in card.text
    assert "redpeft" not in card.text
    assert "AutoModelForCausalLM" in card.text


def test_no_card_without_an_adapter(tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()
