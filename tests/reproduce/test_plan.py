from __future__ import annotations

import dataclasses
import json

import pytest

from redpeft.errors import UserError
from redpeft.reproduce.plan import (
    Request,
    base_of,
    check_folder,
    claim,
    family_of,
    parse_changes,
    plan,
    recipe_for,
    recipes_folder,
    row_values,
    source_of,
    values,
)
from redpeft.reproduce.published import find_table, tables
from redpeft.training.baselines import DEFAULT_RATES
from redpeft.training.learner import check_options
from redpeft.training.recipe import load_recipe
from redpeft.training.train import read_task

GLUE = find_table("glue-roberta-base")


@pytest.fixture
def data(tmp_path):
    for name in ("sst2", "cola", "ag_news", "e2e"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return tmp_path / "data"


def runs(request, tmp_path):
    return plan(request, tmp_path / "assets")


def test_a_whole_table_has_the_papers_rows_tasks_and_seeds(tmp_path):
    found = runs(Request(GLUE, tmp_path / "out"), tmp_path)
    assert len(found) == 8 * (3 * 1 + 3 * 5 + 2 * 15)
    assert {run.row for run in found} == {name for name, row in GLUE.rows.items() if row.is_published}
    assert len({run.job.folder for run in found}) == len(found)
    assert not (tmp_path / "assets").exists()
    last = found[-1]
    assert (last.task, last.seed, last.job.folder) == ("rte", 56, tmp_path / "out" / "red+" / "rte" / "seed-56")
    assert (last.job.recipe.data.config_name, last.job.recipe.seed) == ("rte", 56)
    assert last.job.recipe.base.model == "FacebookAI/roberta-base"


def test_every_row_and_task_has_its_first_seed_before_any_has_its_second(tmp_path):
    request = Request(GLUE, tmp_path, rows=("red", "lora"), tasks=("mnli", "rte", "sst2"), seeds=(7, 5))
    order = [(run.seed, run.task, run.row) for run in runs(request, tmp_path)]
    pairs = [(task, row) for task in ("mnli", "rte", "sst2") for row in ("red", "lora")]
    assert order == [(7, *pair) for pair in pairs] + [(5, *pair) for pair in pairs]
    paper = Request(GLUE, tmp_path, rows=("red",), tasks=("mnli", "sst2"))
    assert [(run.seed, run.task) for run in runs(paper, tmp_path)] == [
        (42, "mnli"), *((seed, "sst2") for seed in range(42, 47))
    ]  # fmt: skip


def test_rows_that_are_not_in_the_paper_are_run_only_when_named(tmp_path):
    [run] = runs(Request(GLUE, tmp_path, rows=("head", "head"), tasks=("mnli",)), tmp_path)
    assert (run.row, run.job.recipe.method) == ("head", "head")


def test_local_data_and_another_base(tmp_path, data):
    (tmp_path / "my-model").mkdir()
    request = Request(
        GLUE, tmp_path / "out", rows=("red",), tasks=("cola", "ag_news"), seeds=(1,), data=data,
        model=str(tmp_path / "my-model"), settings="default", changes={"epochs": 2, "data.max_train_rows": 9},
        row_changes={"red": {"method_options.sites": "qkv"}, "lora": {"epochs": 9}},
    )  # fmt: skip
    cola, news = (run.job.recipe for run in runs(request, tmp_path))
    assert (cola.data.path, cola.data.protocol, cola.data.config_name) == (str(data / "cola"), "glue", None)
    assert (news.data.path, news.data.protocol, news.metric) == (str(data / "ag_news"), None, None)
    assert cola.base.model == str(tmp_path / "my-model")
    assert (cola.epochs, cola.data.max_train_rows, cola.method_options) == (2, 9, {"sites": "qkv"})


def test_only_tasks_with_data_are_run(tmp_path, data):
    request = Request(GLUE, tmp_path, rows=("red",), seeds=(1,), data=data)
    assert [run.task for run in runs(request, tmp_path)] == ["sst2", "cola"]
    e2e = Request(find_table("rank-1"), tmp_path, rows=("red",), data=data)
    assert {run.job.recipe.data.path for run in runs(e2e, tmp_path)} == {str(data / "e2e")}


def test_base_models_are_found_in_a_folder(tmp_path):
    request = Request(GLUE, tmp_path, rows=("red",), tasks=("mnli",), base_folder=tmp_path / "models")
    (tmp_path / "models" / "roberta-base").mkdir(parents=True)
    assert runs(request, tmp_path)[0].job.recipe.base.model == str(tmp_path / "models" / "roberta-base")
    (tmp_path / "models" / "FacebookAI" / "roberta-base").mkdir(parents=True)
    assert runs(request, tmp_path)[0].job.recipe.base.model == str(tmp_path / "models" / "FacebookAI" / "roberta-base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("bitft",)}, "there is no row of glue-roberta-base bitft: did you mean bitfit?"),
        (
            {"tasks": ("sts",)},
            "no task of glue-roberta-base sts: did you mean stsb.*other data sets need --data",
        ),
        ({"tasks": ("ag_news",)}, "other data sets need --data FOLDER"),
        ({"data": "data", "tasks": ("agnews",)}, "there is no data set in .*data agnews: did you mean ag_news?"),
        ({"data": "nowhere"}, "no such data folder: .*nowhere"),
        ({"data": "data/sst2"}, "has none of the data sets of glue-roberta-base .*--tasks from what it has: nothing"),
        ({"base_folder": "data"}, "no base model FacebookAI/roberta-base in .*data: expected"),
        ({"changes": {"epoch": 1}}, "unknown key 'epoch': did you mean 'epochs'?"),
        ({"smoke": True, "data": None, "tasks": ("ag_news",)}, "other data sets need --data"),
    ],
)
def test_unknown_names_and_missing_folders_are_errors(tmp_path, data, changes, message):
    for name in ("data", "base_folder"):
        if changes.get(name):
            changes = {**changes, name: tmp_path / changes[name]}
    request = dataclasses.replace(Request(GLUE, tmp_path / "out"), **changes)
    with pytest.raises(UserError, match=message):
        runs(request, tmp_path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "assets").exists()


def test_changes_apply_to_all_rows_or_to_one():
    changes, rows = parse_changes(["epochs=2", "red:learning_rate=1e-2", "red:method_options.unit=2"], GLUE)
    assert changes == {"epochs": 2}
    assert rows == {"red": {"learning_rate": 0.01, "method_options.unit": 2}}
    with pytest.raises(UserError, match="there is no row of glue-roberta-base rad: did you mean red?"):
        parse_changes(["rad:epochs=2"], GLUE)


def test_a_folder_belongs_to_one_base_and_one_setting(tmp_path):
    request = Request(GLUE, tmp_path / "out", changes={"epochs": 2})
    check_folder(request)
    claim(request)
    check_folder(dataclasses.replace(request, rows=("red",), seeds=(9,)))  # more of the same
    with pytest.raises(UserError, match="holds runs with another settings, changes: choose another --out"):
        check_folder(dataclasses.replace(request, settings="released", changes={}))
    medium = Request(find_table("e2e-gpt2-medium"), tmp_path / "e2e")
    claim(medium)
    check_folder(Request(find_table("rank-1"), tmp_path / "e2e"))  # shares its RED runs
    with pytest.raises(UserError, match="another values"):
        check_folder(Request(find_table("e2e-gpt2-large"), tmp_path / "e2e"))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="is not empty and holds no reproduction: choose another --out"):
            check_folder(Request(GLUE, out))


@pytest.mark.parametrize("table", ["glue-roberta-base", "glue-t5-base", "e2e-gpt2-medium", "alpaca-eval"])
def test_smoke_data_can_be_read_by_the_recipes(tmp_path, table):
    request = Request(find_table(table), tmp_path / "out", rows=("red",), tasks=find_table(table).tasks, smoke=True)
    found = runs(request, tmp_path)
    assert [run.task for run in found] == find_table(table).tasks
    for run in found:
        _, splits = read_task(run.job.recipe)
        assert (len(splits["train"]), len(splits["validation"])) == (32, 4)
        assert run.job.recipe.base.model == str(tmp_path / "assets" / "model")
        assert (run.job.recipe.max_steps, run.seed) == (3, 42)
    config = json.loads((tmp_path / "assets" / "model" / "config.json").read_text())
    assert config["model_type"] in ("roberta", "t5", "gpt2", "llama")


def test_a_smoke_test_of_other_data_and_another_base(tmp_path, data):
    request = Request(GLUE, tmp_path / "out", rows=("red",), tasks=("ag_news",), data=data, model="m/n", smoke=True)
    [run] = runs(request, tmp_path)
    assert (run.job.recipe.data.path, run.job.recipe.base.model) == (str(data / "ag_news"), "m/n")
    assert not (tmp_path / "assets").exists()


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


def test_released_settings_are_those_of_the_scripts():
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


def test_a_task_that_is_not_in_the_paper_gets_the_default_rate():
    recipe = recipe_for("roberta-base", "full", "ag_news", "paper", {"data.protocol": None})
    assert recipe.learning_rate is None
    assert (recipe.metric, recipe.weight_decay) == (None, 0.1)


def test_changes_override_the_values():
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
