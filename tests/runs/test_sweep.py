from __future__ import annotations

import pytest

from redpeft.errors import UserError
from redpeft.runs.sweep import Point, jobs_of_grid, parse_grid, parse_seeds, points_of


def test_values_are_read_as_in_a_recipe():
    grid = parse_grid(["lr=3e-3,1e-2", "method_options.sites=ffn,[ffn, qkv]", "max_steps=5,null", "head=last"])
    assert grid == {
        "learning_rate": [0.003, 0.01],
        "method_options.sites": ["ffn", ["ffn", "qkv"]],
        "max_steps": [5, None],
        "head": ["last"],
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lr"], "--grid takes a field and its values, such as lr=3e-3,1e-2, not 'lr'"),
        (["lr="], "--grid takes a field and its values"),
        (["=1,2"], "--grid takes a field and its values"),
        (["lr=[1,2"], "--grid takes a field and its values"),
        (["seed=1,2"], "--grid seed: use --seeds instead"),
        (["output=a,b"], "--grid output: use --out instead"),
        (["lr=1", "learning_rate=2"], "--grid learning_rate is given twice"),
    ],
)
def test_a_grid_of_another_form(texts, message):
    with pytest.raises(UserError) as error:
        parse_grid(texts)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "seeds"), [("5", [0, 1, 2, 3, 4]), ("1,2,3", [1, 2, 3]), ("7,", [7]), ("4, 4,2", [4, 2]), ("1", [0])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "two", "1,x", "1,-2", ",", "1.5"])
def test_seeds_of_another_form(text):
    with pytest.raises(UserError, match="--seeds takes a number of seeds such as 5, or a list such as 1,2,3, not"):
        parse_seeds(text)


def test_points_are_the_cross_product_with_names_for_folders():
    points = points_of({"learning_rate": [0.003, 0.01], "base.model": ["a/b", "c"]})
    assert points[0] == Point("learning_rate=0.003,base.model=a-b", {"learning_rate": 0.003, "base.model": "a/b"})
    assert [point.name for point in points[1:]] == [
        "learning_rate=0.003,base.model=c", "learning_rate=0.01,base.model=a-b", "learning_rate=0.01,base.model=c",
    ]  # fmt: skip
    assert len(points_of({"learning_rate": [0.01, 0.01]})) == 1
    with pytest.raises(UserError, match=r"two values would need the same folder base.model=a-b"):
        points_of({"base.model": ["a/b", "a:b"]})


def test_all_points_get_a_seed_before_any_gets_another(tmp_path, tiny_encoder_folder):
    fields = [f"base={tiny_encoder_folder}", "data.path=rows.csv", "epochs=4", "output=elsewhere"]
    points = points_of({"epochs": [1, 2], "base.dtype": ["fp32"]})
    jobs = jobs_of_grid(None, fields, points, [3, 5], tmp_path)
    assert [(job.folder.relative_to(tmp_path).as_posix(), job.recipe.epochs, job.recipe.seed) for job in jobs] == [
        ("epochs=1,base.dtype=fp32/seed-3", 1, 3),
        ("epochs=2,base.dtype=fp32/seed-3", 2, 3),
        ("epochs=1,base.dtype=fp32/seed-5", 1, 5),
        ("epochs=2,base.dtype=fp32/seed-5", 2, 5),
    ]
    assert {(job.recipe.output, job.recipe.seeds, job.recipe.base.model) for job in jobs} == {
        (None, None, str(tiny_encoder_folder))
    }


@pytest.mark.parametrize(("more", "seeds"), [([], [0]), (["seed=4"], [4]), (["seeds=[4,6]"], [4, 6])])
def test_the_recipes_own_seeds(tmp_path, tiny_encoder_folder, more, seeds):
    (tmp_path / "r.yaml").write_text(f"base: {tiny_encoder_folder}\ndata: rows.csv\n")
    jobs = jobs_of_grid(str(tmp_path / "r.yaml"), more, points_of({"epochs": [1]}), None, tmp_path)
    assert [job.recipe.seed for job in jobs] == seeds


def test_what_no_recipe_has_is_found_before_anything_is_read(tmp_path, tiny_encoder_folder):
    fields = [f"base={tiny_encoder_folder}", "data.path=rows.csv"]
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        jobs_of_grid(None, fields, points_of({"learnig_rate": [1]}), None, tmp_path)
    with pytest.raises(UserError, match="batch_size"):
        jobs_of_grid(None, fields, points_of({"batch_size": [8, 0]}), None, tmp_path)
    with pytest.raises(UserError, match="has no 'sties'"):
        jobs_of_grid(None, fields, points_of({"method_options.sties": ["ffn"]}), None, tmp_path)
