"""The list of the adapters below a folder: their names, what each is, and unfinished, damaged and other ones."""

from __future__ import annotations

import io
import json
import shutil
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from helpers.adapters import SITES, WIDTH, random_tensors, write_folder, write_run
from redpeft.adapters import list_adapters
from redpeft.adapters.listing import ListedAdapter, adapters_table
from redpeft.errors import UserError

SAMPLES = [0.1234, -2.5, 1e-3]


@pytest.fixture
def runs(tmp_path):
    head = {"base_model.model.classifier.weight": torch.randn(3, WIDTH)}
    options = {"task_type": "SEQ_CLS", "base_fingerprint": {"shapes": "x", "samples": SAMPLES}}
    write_run(tmp_path / "runs" / "reviews", random_tensors(seed=1) | head, score=0.8, **options)
    write_run(tmp_path / "runs" / "topics" / "seed-3", seed=2, **options)
    write_folder(tmp_path / "runs" / "plain", random_tensors(SITES[:1]), SITES[:1], sites=["ffn", "qkv"], **options)
    return tmp_path / "runs"


def rows_of(path):
    return {row.name: row for row in list_adapters(path)}


def test_a_row_says_what_an_adapter_is(runs):
    rows = rows_of(runs)
    assert list(rows) == ["plain", "reviews", "topics/seed-3"]
    size = (runs / "reviews" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert rows["reviews"] == ListedAdapter(
        name="reviews",
        status="ok",
        base="some/encoder",
        task="classification",
        method="red",
        sites="ffn",
        metric="accuracy",
        validation=0.8,
        test=0.4,
        parameters=4 * WIDTH,
        head_parameters=3 * WIDTH,
        bytes=size,
        fingerprint=rows["reviews"].fingerprint,
    )
    plain = rows["plain"]  # outside a run: what the configuration says
    assert (plain.task, plain.sites, plain.parameters, plain.head_parameters) == ("SEQ_CLS", "ffn,qkv", 2 * WIDTH, 0)
    assert (plain.metric, plain.validation, plain.test, plain.status) == (None, None, None, "ok")


def test_names_are_paths_below_the_folder(runs):
    assert list(rows_of(runs / "topics")) == ["seed-3"]
    assert list(rows_of(runs / "reviews")) == ["."]
    assert list(rows_of(runs / "reviews" / "adapter")) == ["."]
    write_folder(runs / "plain" / "adapter", random_tensors(seed=4))  # an adapter within another: each has its name
    assert list(rows_of(runs / "plain")) == [".", "adapter"]


def test_checkpoints_hidden_folders_and_what_is_being_written_are_not_listed(runs):
    write_folder(runs / "reviews" / "checkpoints" / "checkpoint-2", random_tensors())
    write_folder(runs / "new.partial", random_tensors())
    write_folder(runs / ".cache" / "old", random_tensors())
    (runs / "link").symlink_to(runs / "plain")
    assert list(rows_of(runs)) == ["plain", "reviews", "topics/seed-3"]


def test_short_fingerprints_tell_other_weights_and_not_their_rounding(runs):
    def short(samples):
        folder = write_folder(runs / "other", random_tensors(), base_fingerprint=samples)
        rows = rows_of(folder.parent)
        return rows["reviews"].fingerprint, rows["other"].fingerprint

    rounded = torch.tensor(SAMPLES).bfloat16().tolist()
    assert rounded != SAMPLES
    one, other = short({"shapes": "x", "samples": rounded})
    assert one == other
    assert len(one) == 8
    one, other = short({"shapes": "x", "samples": [0.2, *SAMPLES[1:]]})
    assert one != other
    assert len(other) == 8
    assert short(None)[1] is None


def test_runs_that_are_not_finished(runs):
    (runs / "reviews" / "result.json").unlink()
    (runs / "topics" / "seed-3" / "result.json").unlink()
    shutil.rmtree(runs / "reviews" / "adapter")
    rows = rows_of(runs)
    begun = ListedAdapter(
        name="reviews", status="unfinished", base="some/encoder", task="classification", method="red"
    )
    assert rows["reviews"] == begun
    assert (rows["topics/seed-3"].status, rows["topics/seed-3"].parameters) == ("unfinished", 4 * WIDTH)


def damage(run, what):
    adapter = run / "adapter"
    if what == "cut short":
        weights = adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
    elif what == "not finite":
        tensors = random_tensors()
        tensors[f"base_model.model.{SITES[1]}.redpeft_edit.scale"][3] = float("nan")
        save_file(tensors, adapter / "adapter_model.safetensors")
    elif what == "lost":
        shutil.rmtree(adapter)
    else:
        (run / "result.json").write_text(what)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("cut short", "adapter_model.safetensors: corrupt or truncated"),
        ("not finite", f"{SITES[1]}: scale has values that are not finite"),
        ("lost", "adapter: no such adapter folder"),
        ("{", "result.json: damaged (Expecting property name"),
        ("[]", "result.json: damaged (it holds no fields)"),
    ],
)
def test_a_damaged_adapter_is_a_row_with_the_reason(runs, what, reason):
    damage(runs / "reviews", what)
    rows = rows_of(runs)
    assert [row.status for row in rows.values()] == ["ok", "damaged", "ok"]
    assert reason in rows["reviews"].reason
    assert rows["reviews"].validation == (None if what in "{[]" else 0.8)


def test_other_methods_are_not_called_damaged(runs):
    write_run(runs / "lora", peft_type="LORA")
    result = runs / "lora" / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"method": "lora"}))
    write_run(runs / "full")
    (runs / "full" / "adapter").rename(runs / "full" / "model")
    (runs / "full" / "model" / "adapter_config.json").unlink()
    options = {"base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM"}
    write_folder(runs / "peft", random_tensors(), peft_type="IA3", **options)
    rows = rows_of(runs)
    assert "full" not in rows  # a model, and no adapter
    lora = rows["lora"]
    assert (lora.status, lora.method, lora.validation, lora.parameters) == ("not checked", "lora", 0.9, None)
    alone = rows["peft"]
    assert (alone.status, alone.method, alone.base, alone.task) == ("not checked", "ia3", "some/model", "CAUSAL_LM")


def test_odd_scores_are_left_out(runs):
    odd = {"metric": "accuracy", "validation": {"accuracy": "high"}, "test": [1]}
    (runs / "reviews" / "result.json").write_text(json.dumps(odd))
    row = rows_of(runs)["reviews"]
    assert (row.status, row.validation, row.test) == ("ok", None, None)


def test_the_table(runs):
    damage(runs / "reviews", "cut short")
    (runs / "topics" / "seed-3" / "result.json").unlink()
    console = Console(width=140, file=io.StringIO())
    console.print(adapters_table(list_adapters(runs), "runs"))
    lines = {line.split()[0]: line.split()[1:] for line in console.file.getvalue().splitlines() if line.strip()}
    assert " ".join(lines["reviews"]) == "encoder classification red accuracy 0.8 / 0.4 - - - damaged"
    short = rows_of(runs)["plain"].fingerprint
    size = f"{(runs / 'plain' / 'adapter_model.safetensors').stat().st_size / 1024:.0f}"
    assert " ".join(lines["plain"]) == f"encoder SEQ_CLS red ffn,qkv - 64 {size} KiB {short} ok"
    assert lines["topics/seed-3"][-1] == "unfinished"


def test_nothing_to_list(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "no", f"no such folder: {tmp_path / 'no'}"),
        (tmp_path / "empty", f"{tmp_path / 'empty'}: no adapters there"),
        (runs / "reviews" / "recipe.yaml", f"no such folder: {runs / 'reviews' / 'recipe.yaml'}"),
    ):
        with pytest.raises(UserError) as error:
            list_adapters(path)
        assert said in str(error.value)


def test_a_thousand_adapters_take_seconds(tmp_path):
    for index in range(1000):
        folder = tmp_path / f"{index:04}"
        write_folder(folder, random_tensors(SITES[:1]), SITES[:1])
    start = time.perf_counter()
    rows = list_adapters(tmp_path)
    assert time.perf_counter() - start < 10  # on an idle machine less than one
    assert {row.status for row in rows} == {"ok"}
    assert len(rows) == 1000
