from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from redpeft import RedConfig
from redpeft.errors import UserError
from redpeft.training.baselines import DEFAULT_RATES
from redpeft.training.recipe import Recipe, dotted_fields, load_recipe, template

SMALL = {"base": "some/model", "data": "rows.csv"}


def test_defaults_and_short_forms():
    recipe = load_recipe(None, SMALL)
    assert (recipe.base.model, recipe.data.path, recipe.method) == ("some/model", "rows.csv", "red")
    assert (recipe.batch_size, recipe.epochs, recipe.warmup) == (32, 5, 0.06)
    assert (recipe.task, recipe.learning_rate, recipe.max_length) == (None, None, None)
    assert (recipe.resolved().task, recipe.resolved().max_length) == ("classification", 256)
    assert load_recipe(None, {**SMALL, "task": "instruction"}).resolved().max_length == 2048
    assert recipe.resolved().learning_rate == DEFAULT_RATES["red"]
    assert load_recipe(None, {**SMALL, "method": "full"}).resolved().learning_rate == DEFAULT_RATES["full"]


def test_overrides_reach_every_level_and_win_over_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: m\ndata: d.csv\nlearning_rate: 1e-3\nepochs: 7\n")
    recipe = load_recipe(
        path,
        ["epochs=2", "data.text=body", "base.dtype=bf16", "method_options.unit=1e-1",
         "method_options.sites=[ffn, qkv]", "seeds=[1, 2]", "report_to=tensorboard"],
    )  # fmt: skip
    assert (recipe.epochs, recipe.learning_rate) == (2, 1e-3)
    assert (recipe.data.path, recipe.data.text, recipe.base.model, recipe.base.dtype) == ("d.csv", "body", "m", "bf16")
    assert recipe.method_options == {"unit": 0.1, "sites": ["ffn", "qkv"]}
    assert recipe.seeds == [1, 2]
    assert recipe.report_to == ["tensorboard"]


SHORTLY = {
    "lr": (0.01, "learning_rate"),
    "sites": (["ffn", "qkv"], "method_options.sites"),
    "unit": (1, "method_options.unit"),
    "text": ("body", "data.text"),
    "label": (["a", "b"], "data.label"),
    "max_eval_rows": (5, "data.max_eval_rows"),
    "model": ("m", "base.model"),
    "batch": (8, "batch_size"),
    "out": ("there", "output"),
    "seeds": (3, "seeds"),
}


def test_short_names_stand_for_fields_wherever_one_is_given(tmp_path):
    texts = [f"{name}={json.dumps(value)}" for name, (value, _) in SHORTLY.items()]
    expected = load_recipe(
        None, {"base.model": "m", "data.path": "d.csv"} | {key: value for value, key in SHORTLY.values()}
    )
    assert (expected.learning_rate, expected.data.text, expected.seeds) == (0.01, "body", [3])
    assert expected.method_options == {"sites": ["ffn", "qkv"], "unit": 1}
    assert load_recipe(None, ["data=d.csv", *texts]) == expected
    assert load_recipe(None, {"data": "d.csv"} | {name: value for name, (value, _) in SHORTLY.items()}) == expected
    path = tmp_path / "recipe.yaml"
    lines = [f"{name}: {json.dumps(value)}" for name, (value, _) in SHORTLY.items()]
    path.write_text("\n".join([*lines, "data: d.csv"]))
    assert load_recipe(path) == expected
    assert load_recipe(None, dotted_fields(str(path), [])) == expected


def test_the_command_line_overrides_the_file_by_any_of_a_fields_names(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: m\ndata: d.csv\nlr: 0.5\nmethod_options: {unit: 3}\n")
    for lr, unit in (("lr", "unit"), ("learning_rate", "method_options.unit")):
        overrides = [f"{lr}=0.25", f"{unit}=4"]
        for recipe in (load_recipe(path, overrides), load_recipe(None, dotted_fields(str(path), overrides))):
            assert (recipe.learning_rate, recipe.method_options) == (0.25, {"unit": 4})


@pytest.mark.parametrize(
    "text", ["lr: 1\nlearning_rate: 2", "unit: 1\nmethod_options: {unit: 1}", "model: m\nbase: m"]
)
def test_a_field_that_is_given_twice_in_a_file_is_refused(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"(lr|unit|model) and (learning_rate|method_options.unit|base.model|base) are"
    ):
        load_recipe(tmp_path / "recipe.yaml", ["base=m", "data=d"])


@pytest.mark.parametrize("separator", ["|", "||", ";", ",", "/", "#", "&", "*", ":", "-", ">", "@", "%", "!"])
def test_a_separator_is_taken_as_it_is_written(separator):
    for written in (separator, f"'{separator}'"):
        recipe = load_recipe(None, ["base=m", "data=d.csv", f"data.label_separator={written}"])
        assert recipe.data.label_separator == separator


def test_sites_may_be_listed_with_commas():
    assert RedConfig(sites="ffn, qkv").sites == ["ffn", "qkv"]
    with pytest.raises(UserError, match="unknown sites \\['fnn'\\]"):
        RedConfig(sites="ffn,fnn")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sits=red+"], "unknown key 'sits': did you mean 'method_options.sites'?"),
        (["layers=[1]"], "unknown key 'layers': did you mean 'method_options.layers'?"),
        (["base.lr=1"], "unknown key 'base.lr': did you mean 'learning_rate'?"),
        (["data.sites=ffn"], "unknown key 'data.sites': did you mean 'method_options.sites'?"),
        (["labels=stars"], "unknown key 'labels': did you mean 'data.label'?"),
        (["maxlength=9"], "unknown key 'maxlength': did you mean 'max_length'?"),
        (["learing_rate=1"], "unknown key 'learing_rate': did you mean 'learning_rate'?"),
        (["data.txt=1"], "unknown key 'data.txt': did you mean 'data.text'?"),
        (["dtype=bf16"], "unknown key 'dtype': did you mean 'base.dtype'?"),
        (["zzzz=1"], "unknown key 'zzzz'; `redpeft init` lists them all"),
        (["epochs=many"], "epochs: .*not 'many'"),
        (["method=adaptor"], "no method is called 'adaptor': choose red, lora.*PEFT's others: .*vera"),
        (["method=LORA"], "no method is called 'LORA'"),
        (["method=vera"], "method vera has no default learning rate: give learning_rate"),
        (["method=adalora", "lr=1"], "method adalora cannot be trained by a recipe: PEFT has to be called after each"),
        (["method=vera", "lr=1", "base.load_in=4bit"], "base.load_in quantises the base.* not for vera"),
        (["method=p_tuning", "lr=1", "task=instruction", "packing=true"], "leave it out with method p_tuning"),
        (["learning_rate=-1"], "learning_rate: Input should be greater than 0, not -1"),
        (["epochs"], "'epochs' is not of the form key=value"),
        (["epochs.x=1"], "epochs: Input should be a valid number"),
        (["method=lora", "init_from=somewhere"], "method must be red, not lora"),
        (["task=classification", "packing=true"], "packing is for the task instruction"),
        (["task=e2e", "learn_prompt=true"], "learn_prompt is for the task instruction"),
        (
            ["task=e2e", "problem_type=regression"],
            "problem_type is for the task classification and text-to-text, not e2e",
        ),
        (["gradient_accumulation=5"], "batch_size 32 is not divisible by gradient_accumulation 5"),
        (["base.load_in=3bit"], "base.load_in: .*'8bit', '4bit' or 'int8_weight_only', not '3bit'"),
        (["base.load_in=4bit", "method=full"], "base.load_in quantises the base.* not for full"),
    ],
)
def test_wrong_overrides_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(None, ["base=some/model", "data=rows.csv", *overrides])
    assert "\n" not in str(caught.value)


def test_missing_fields_say_what_they_are():
    with pytest.raises(UserError, match="base is missing: The base model.*; data is missing"):
        load_recipe(None, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"base: [", "is not valid YAML"), (b"\xff\xfe\xff", "is not valid YAML"), (b"- a\n", "holds no fields")],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_recipe(path)
    with pytest.raises(UserError, match="cannot read the recipe .*none.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_saved_recipes_are_resolved_and_load_the_same(tmp_path):
    recipe = load_recipe(None, {**SMALL, "method": "lora", "method_options": {"r": 4}})
    recipe.save(tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["learning_rate"] == DEFAULT_RATES["lora"]
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.differences(loaded) == []
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_differences_name_dotted_keys_and_ignore_the_output_folder():
    one = load_recipe(None, {**SMALL, "output": "here"})
    other = load_recipe(None, {**SMALL, "output": "there", "data.text": "body", "epochs": 1})
    assert one.differences(other) == ["data.text", "epochs"]
    assert one.differences(load_recipe(None, {**SMALL, "method_options": {"unit": 1}})) == ["method_options.unit"]


def test_run_folder():
    assert load_recipe(None, {**SMALL, "output": "here"}).run_folder() == Path("here")
    assert load_recipe(None, SMALL).run_folder() == Path("runs/rows-red")


def test_the_template_holds_every_field_with_its_default_and_meaning(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(template())
    recipe = load_recipe(path)
    assert recipe == load_recipe(None, {"base": recipe.base.model, "data": recipe.data.path})
    values = yaml.safe_load(template())
    assert set(values) == set(Recipe.model_fields)
    assert set(values["data"]) == set(Recipe.model_fields["data"].annotation.model_fields)
    assert max(map(len, template().splitlines())) <= 119
    assert all(field.description for field in Recipe.model_fields.values())


def test_the_template_in_recipes_is_the_one_that_init_writes():
    assert (Path(__file__).parents[2] / "recipes" / "template.yaml").read_text() == template()
