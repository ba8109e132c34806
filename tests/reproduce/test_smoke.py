"""The tiny models stand in for the paper's: the same classes, and the same head."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead

from redpeft.reproduce.plan import recipe_for
from redpeft.reproduce.smoke import make_model
from redpeft.tasks.classification import ClassificationTask
from redpeft.training.learner import apply_method, head_modules

COLUMNS = {"text": "sentence", "label": "label"}
TASK = ClassificationTask(COLUMNS, "single_label_classification", ["0", "1", "2"], "accuracy")


@pytest.fixture
def roberta(tmp_path):
    folder = make_model(tmp_path, "roberta")
    return TASK.load_model(folder, AutoTokenizer.from_pretrained(folder)), folder


def test_the_papers_head(roberta):
    """Encoder without pooler; dropout, dense, tanh, dropout, out_proj on the first token; trained in full."""
    model, folder = roberta
    assert model.roberta.pooler is None
    assert isinstance(model.classifier, RobertaClassificationHead)
    inputs = AutoTokenizer.from_pretrained(folder)(["a cat", "the old house sees"], padding=True, return_tensors="pt")
    model = model.eval()
    with torch.no_grad():
        first = model.roberta(**inputs).last_hidden_state[:, 0]
        dense, out = model.classifier.dense, model.classifier.out_proj
        expected = torch.tanh(first @ dense.weight.T + dense.bias) @ out.weight.T + out.bias
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert (model.classifier.dropout.p, head_modules(model, "classification")) == (0.1, ["classifier"])
    trained = apply_method(model, recipe_for("roberta-base", "red", "mnli", "paper", {}))
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    head = {name for name in names if "classifier" in name}
    assert len(head) == 4  # two weights, two biases
    assert len(names - head) == 2 * 6
    assert all(".output.dense." in name and "attention" not in name for name in names - head)


@pytest.mark.parametrize(
    ("family", "auto"),
    [("t5", AutoModelForSeq2SeqLM), ("gpt2", AutoModelForCausalLM), ("llama2", AutoModelForCausalLM)],
)
def test_tiny_models_load_generate_and_are_made_once(tmp_path, family, auto):
    folder = make_model(tmp_path / family, family)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_model(tmp_path / family, family) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert AutoConfig.from_pretrained(folder).model_type == {"llama2": "llama"}.get(family, family)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), auto.from_pretrained(folder)
    text = "name[Aromi], food[Thai] é"
    tokens = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(tokens["input_ids"][0], skip_special_tokens=True) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[0] == 1
