"""The table of trainable parameters in docs/reference/baselines.md, counted anew on the models of the paper."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
)

from redpeft.training.baselines import METHODS
from redpeft.training.learner import trainable_parameters
from redpeft.training.recipe import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "baselines.md"
ROW = re.compile(r"^\| ([^|]+) \| `(method=[^`]+)` \| ([\d,]+) \|([^|]*)\| ([^|]+) \|$", re.M)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))

# The configurations that are published beside the checkpoints, where they differ from the classes' defaults.
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
MODELS = {
    "RoBERTa-base": ("classification", AutoModelForSequenceClassification, RobertaConfig(**ROBERTA)),
    "RoBERTa-large": ("classification", AutoModelForSequenceClassification, RobertaConfig(**ROBERTA, **LARGE)),
    "T5-base": ("text-to-text", AutoModelForSeq2SeqLM, T5Config(**T5_BASE)),
    "GPT-2 medium": ("instruction", AutoModelForCausalLM, GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "GPT-2 large": ("instruction", AutoModelForCausalLM, GPT2Config(n_embd=1280, n_layer=36, n_head=20)),
    "Llama-2-7B": ("instruction", AutoModelForCausalLM, LlamaConfig()),
}
# Rows of the tables in the paper: GLUE base (8) and large (4), T5 (6), E2E medium and large (7 each), rank 1 (3 more),
# Llama-2 (3), and one of another paper.
COUNT = 8 + 4 + 6 + 7 + 7 + 3 + 3 + 1


@pytest.mark.parametrize(("base", "settings", "count", "published", "name"), ROWS, ids=lambda text: text[:40])
def test_the_table_of_counts(base, settings, count, published, name):
    task, auto, config = MODELS[base]
    recipe = load_recipe(None, ["base=m", "data=d", f"task={task}", *settings.split()])
    with torch.device("meta"):
        model = auto.from_config(config)
    trained = trainable_parameters(model, recipe)
    total = sum(trained) if recipe.method == "full" else trained.method
    assert f"{total:,}" == count
    assert bool(trained.head) == (task == "classification")
    if published.strip():
        figure, differs = re.fullmatch(r" ([\d.]+)M( \(differs\))? ", published).groups()
        digits = len(figure.partition(".")[2])
        assert (round(total / 1e6, digits) == float(figure)) is not bool(differs)


def test_every_row_of_the_paper_is_in_the_table():
    assert len(ROWS) == COUNT
    assert {base for base, *_ in ROWS} == set(MODELS)
    used = {re.match(r"method=(\w+)", settings)[1] for _, settings, *_ in ROWS}
    assert used == set(METHODS) - {"head"}


def test_the_notes_below_the_table():
    """Figures that the text derives: what the counts would be with PEFT's prompt for a decoder, and without norms."""
    task, auto, config = MODELS["T5-base"]

    def count(settings):
        with torch.device("meta"):
            model = auto.from_config(config)
        return trainable_parameters(model, load_recipe(None, ["base=m", "data=d", f"task={task}", *settings])).method

    assert count(["method=prompt", "method_options.num_transformer_submodules=2"]) == 153_600
    adapter = ["method=adapter", "method_options.bottleneck=24"]
    assert count([*adapter, "method_options.layer_norms=false"]) == 1_807_488


def test_the_tables_of_settings_and_rates_name_every_method():
    text = PAGE.read_text(encoding="utf-8")
    rates = dict(re.findall(r"^\| `(\w+)` \| (\d+e-\d) \|", text, re.M))
    assert {method: float(rate) for method, rate in rates.items()} == {
        name: method.rate for name, method in METHODS.items()
    }
    described = set(re.findall(r"^\| `(\w+)` \| [^|]+ \|[^|]*\|[^|]*\|$", text, re.M))
    assert described == set(METHODS) - {"red"} | {"method"}  # the heading
