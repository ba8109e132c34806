from __future__ import annotations

import pytest

from redpeft.reproduce.published import tables
from redpeft.reproduce.settings import base_of, family_of, recipe_for, recipes_folder, row_values, source_of, values
from redpeft.training.baselines import DEFAULT_RATES, check_options
from redpeft.training.recipe import load_recipe

ORDER = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]

# The paper's appendix: rates, epochs, warm-up, weight decay, in that order of tasks.
PAPER = {
    "roberta-base": (
        [1e-3, 1e-3, 5e-3, 5e-3, 3e-3, 1e-3, 8e-3, 3e-3],
        [20, 40, 40, 40, 20, 20, 40, 40],
        [0.06] * 8,
        [0] * 8,
    ),
    "roberta-large": (
        [1e-3, 1e-3, 2e-3, 1e-3, 1e-3, 1e-3, 5e-3, 5e-3],
        [10, 10, 20, 20, 10, 10, 20, 10],
        [0.06, 0.06, 0, 0.06, 0.06, 0.06, 0.01, 0.06],
        [0, 0, 0, 0, 0, 0, 1e-4, 0],
    ),
    "t5-base": (
        [5e-2, 3e-2, 1e-1, 4e-2, 2e-2, 5e-3, 7e-2, 4e-2],
        [10, 10, 20, 60, 10, 10, 30, 50],
        [0.01, 0.06, 0.01, 0.01, 0, 0.01, 0.01, 0.06],
        [0] * 8,
    ),
}


@pytest.mark.parametrize("model", PAPER)
def test_red_on_glue_has_the_papers_values(model):
    for task, rate, epochs, warmup, decay in zip(ORDER, *PAPER[model], strict=True):
        recipe = recipe_for(model, "red", task, "paper", {"data.config_name": task})
        found = (recipe.learning_rate, recipe.epochs, recipe.warmup, recipe.weight_decay)
        assert found == (rate, epochs, warmup, decay), task
        assert (recipe.batch_size, recipe.max_length, recipe.schedule) == (32, 256, "linear")
        assert recipe.method_options == {"unit": 1, "scale_origin": 0}
        assert recipe.metric == {"cola": "matthews", "stsb": "pearson"}.get(task, "accuracy")
        assert recipe.data.protocol == ("glue-t5" if model == "t5-base" else "glue")
        assert (recipe.data.path, recipe.data.config_name) == ("nyu-mll/glue", task)


@pytest.mark.parametrize(
    ("model", "row", "values_"),
    [
        ("gpt2-medium", "red", (6e-2, 5, 500, 1e-4, 10)),
        ("gpt2-medium", "red+", (6e-3, 5, 500, 1e-4, 10)),
        ("gpt2-large", "red", (6e-3, 10, 500, 0, 10)),
        ("gpt2-large", "red+", (8e-3, 10, 500, 0, 10)),
        ("llama2-7b", "red", (1e-3, 10, 0.1, 0, 128)),
        ("llama2-7b", "lora", (3e-4, 10, 0.1, 0, 128)),
    ],
)
def test_the_language_models_have_the_papers_values(model, row, values_):
    recipe = recipe_for(model, row, "e2e", "paper", {})
    assert values_ == (recipe.learning_rate, recipe.epochs, recipe.warmup, recipe.weight_decay, recipe.batch_size)


def test_the_released_scripts_where_they_differ():
    assert row_values("roberta-large", "red", "sst2", "released")["learning_rate"] == 3e-3
    assert row_values("roberta-large", "red", "mrpc", "released")["learning_rate"] == 2e-3
    assert row_values("roberta-large", "red+", "sst2", "released")["learning_rate"] == 1e-3
    assert row_values("t5-base", "red", "sst2", "released")["learning_rate"] == 2e-2
    llama = recipe_for("llama2-7b", "red", "ultrafeedback", "released", {})
    assert (llama.learning_rate, llama.epochs, llama.max_length, llama.learn_prompt) == (2e-5, 3, 512, True)


def test_the_librarys_own_rates_for_another_base():
    recipe = recipe_for("roberta-base", "red+", "cola", "default", {}).resolved()
    assert recipe.learning_rate == DEFAULT_RATES["red"]
    assert recipe.method_options == {"sites": "red+"}
    assert (recipe.metric, recipe.epochs) == ("matthews", 40)
    lora = recipe_for("roberta-base", "lora", "cola", "default", {})
    assert lora.learning_rate is None
    assert lora.method_options["r"] == 8


def test_a_task_that_the_paper_has_not_takes_no_rate_of_another():
    recipe = recipe_for("roberta-base", "full", "ag_news", "paper", {"data.protocol": None})
    assert recipe.learning_rate is None
    assert (recipe.metric, recipe.weight_decay) == (None, 0.1)


def test_changes_go_last_and_leave_the_values_alone():
    recipe = recipe_for("roberta-base", "red", "cola", "paper", {"method_options.sites": "qkv", "epochs": 1})
    assert recipe.method_options == {"unit": 1, "scale_origin": 0, "sites": "qkv"}
    assert recipe.epochs == 1
    assert row_values("roberta-base", "red", "cola")["method_options"] == {"unit": 1, "scale_origin": 0}


def test_every_row_of_every_table_has_a_recipe_and_a_source():
    for table in tables().values():
        assert base_of(table.values)
        assert (recipes_folder() / f"{family_of(table.values)}.yaml").is_file()
        for row in table.rows:
            assert source_of(table.values, row)
            for task in table.tasks:
                for settings in ("paper", "released", "default"):
                    check_options(recipe_for(table.values, row, task, settings, {}))


def test_families_are_recipes_by_themselves():
    for family in ("roberta", "t5", "gpt2", "llama2"):
        recipe = load_recipe(recipes_folder() / f"{family}.yaml")
        model = next(
            name for name, block in values().items() if name != "tasks" and block["recipe"] == f"{family}.yaml"
        )
        assert recipe.base.model == base_of(model)
    assert load_recipe(recipes_folder() / "llama2.yaml").base.dtype == "bf16"


def test_every_value_belongs_to_a_row_of_a_table():
    rows = {model: set() for model in values() if model != "tasks"}
    for table in tables().values():
        rows[table.values].update(table.rows)
    assert rows == {model: set(values()[model]["rows"]) for model in rows}
