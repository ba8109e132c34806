"""The benchmarks run, at sizes that say nothing about time but all about memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers.data import write_rows
from helpers.gguf_files import write_gguf

TINY = ["--rounds=2", "--layers=2", "--width=32", "--vocabulary=50", "--batch=2", "--tokens=8", "--threads=1"]
LORA = ["LoRA r=1 on q, v", "LoRA r=8 on q, v", "LoRA r=16 on all"]
METHODS = ["frozen floor", "floor again", "RED", "RED, bias alone", *LORA, "IA3", "full"]


def benchmark(name: str) -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_answers_within_a_second_of_cpu_time(capsys):
    """Without torch a quarter of a second; with it five at least."""
    benchmark("startup").main(["--rounds=1", "--only", "python -c pass", "--only", "redpeft train --nosuch", "--json"])
    seconds = json.loads(capsys.readouterr().out)
    assert 0 < seconds["python -c pass"][0] < seconds["redpeft train --nosuch"][0] < 1


@pytest.fixture(scope="module")
def training_step() -> Iterator[ModuleType]:
    module = benchmark("training_step")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_red_step_keeps_one_activation_a_site_and_two_vectors_of_optimiser_state(training_step, capsys, dtype):
    training_step.main([*TINY, "--dtype", dtype, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["threads"] == 1
    assert list(report["models"]) == ["bert", "llama"]
    for rows in report["models"].values():
        assert [row["method"] for row in rows] == METHODS
        by_method = {row["method"]: row for row in rows}
        red, floor = by_method["RED"], by_method["frozen floor"]
        assert red["parameters"] == 2 * 2 * 32
        activations, scale = 2 * (2 * 8 * 32) * (4 if dtype == "fp32" else 2), 32 * 4  # an effective scale is fp32
        assert red["saved_bytes"] - floor["saved_bytes"] == activations + scale
        assert red["saved_activations_per_site"] == 1 + scale / activations  # 2 or 3 where an fp32 copy is kept
        assert red["optimizer_bytes"] == 4 * (2 * 128 + 4)  # per vector two fp32 moments, and a step count
        assert by_method["floor again"]["saved_bytes"] == floor["saved_bytes"]
        assert by_method["RED, bias alone"]["saved_bytes"] - floor["saved_bytes"] == scale
        assert by_method["LoRA r=8 on q, v"]["saved_bytes"] > red["saved_bytes"]
        assert floor["ratio"] == 1.0
        assert all(row["seconds"] > 0 and row["ratio_quartiles"][0] <= row["ratio"] for row in rows)


def test_the_table_names_the_machine_and_every_method(training_step, capsys):
    training_step.main([*TINY, "--models", "llama"])
    shown = capsys.readouterr().out
    assert all(method in shown for method in METHODS)
    assert "threads 1" in shown
    assert "torch " in shown
    assert "bert" not in shown


def test_an_edit_adds_the_same_to_every_quantised_base(capsys):
    module = benchmark("quantised_bases")
    tiny = ["--layers=2", "--width=64", "--vocabulary=50", "--batch=2", "--tokens=8"]
    module.main([*tiny, "--json"])
    rows = json.loads(capsys.readouterr().out)["bases"]
    assert [row["format"] for row in rows] == list(module.formats())
    for row in rows:
        assert row["edit_bytes"] == 2 * 4 * (64 + 64 + 1)
        assert row["saved_activations_per_site"] in (1 + 1 / 32, 1 + 1 / 16)  # the effective scale is an fp32 vector
        assert row["base_bytes"] > row["block_bytes"]
    bits = {row["format"]: row["bits_per_block_weight"] for row in rows}
    assert (bits["fp32"], bits["bf16"]) == (32, 16)
    assert 4.5 < bits.get("4bit", 4.6) < 5  # fp32 for each block of 64 weights; norms are bf16
    assert all(8 < bits[name] < 9 for name in ("8bit", "int8_weight_only") if name in bits)
    module.main(tiny)
    shown = capsys.readouterr().out
    assert all(row["format"] in shown for row in rows)


def test_fleets_are_measured_beside_their_ways(tiny_encoder_folder, tmp_path):
    for name in ("sst2", "ag_news", "cola"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [{"sentence": f"the {word} film {n}", "label": n % 2} for n in range(6) for word in ("good", "bad")]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / name / "train.jsonl").write_text(lines)
    module = benchmark("fleet")
    sets = module.make_sets(tmp_path / "data", tmp_path / "sets", 3, rows=6)
    labels = [json.loads(line)["label"] for path in sets for line in (path / "train.jsonl").read_text().splitlines()]
    assert len(labels) == 18
    assert all(label.startswith("class ") for label in labels)
    values = {"base": str(tiny_encoder_folder), "batch_size": 3, "epochs": 1}
    found = [module.work(way, sets, tmp_path / way, values) for way in ("fleet", "one by one")]
    assert [one["steps"] for one in found] == [6, 6]
    assert module.row_times([1, 2], [4], 4, 2).row_count == 1


def test_steps_of_fleets_are_measured_beside_one_alone():
    module = benchmark("fleet")
    for rows_a_job, jobs, rows in ((None, [1, 3, 4], [4, 4, 4]), (2, [1, 2, 2], [2, 4, 4])):
        report = module.step_times("minilm", [1, 3, 64], rows=4, tokens=6, steps=2, rows_a_job=rows_a_job)
        assert [one["rows"] for one in report["sizes"]] == rows
        if rows_a_job:  # else the owners are drawn
            assert [one["jobs"] for one in report["sizes"]] == jobs
        of_one = report["sizes"][0]["table_bytes"]
        assert [one["table_bytes"] for one in report["sizes"]] == [of_one, 3 * of_one, 64 * of_one]
        assert ("alone" in report) == bool(rows_a_job)
        assert module.step_table(report).row_count == (4 if rows_a_job else 3)


def test_methods_that_find_no_time_are_left_out(training_step, capsys):
    training_step.main([*TINY, "--models", "llama", "--minutes", "0", "--methods", "RED", "IA3", "--json"])
    shown = capsys.readouterr()
    assert [row["method"] for row in json.loads(shown.out)["models"]["llama"]] == ["frozen floor"]
    assert "no time is left for RED" in shown.err


@pytest.mark.slow
def test_the_parts_for_a_gpu_leave_a_file_for_each_result(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    out = tmp_path / "out"
    settings = {"TINY": "1", "PYTHON": sys.executable, "OUT": str(out), "WORK": str(tmp_path / "work")}
    done = subprocess.run(
        ["bash", script, "training_step", "fleets"], env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "training_step-eager, RED:" in done.stdout
    assert "fleets-minilm, 4 slots:" in done.stdout
    assert {path.name for path in out.iterdir()} == {"training_step-eager.json", "fleets-minilm.json"}
    assert len(json.loads((out / "training_step-eager.json").read_text())["models"]["llama"]) == len(METHODS)
    fleets = json.loads((out / "fleets-minilm.json").read_text())
    assert [one["slots"] for one in fleets["sizes"]] == [2, 4]


@pytest.mark.slow
def test_the_comparison_runs_on_the_pieces_of_a_model_until_its_time_is_over(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    pieces = [tmp_path / "model.0", tmp_path / "model.1"]
    for piece, content in zip(pieces, (whole[:999], whole[999:]), strict=True):
        piece.write_bytes(content)
    rows = [{"prompt": f"Spell {word} backward", "response": word[::-1]} for word in ("tea", "cup", "milk")]
    for name in ("train", "validation", "test", "validation_questions", "test_questions"):
        write_rows(tmp_path / "data" / "spell_backward" / f"{name}.jsonl", rows)
    (tmp_path / "data" / "wikitext.txt").write_text("the tea " * 10_000)
    out = tmp_path / "out"
    settings = {
        "PYTHON": sys.executable,
        "MODEL": " ".join(map(str, pieces)),
        "DATA": str(tmp_path / "data"),
        "OUT": str(out),
        "WORK": str(tmp_path / "work"),
        "RUNS": "C",
        "WORKERS": "1",
        "DONE": str(tmp_path / "none"),
        "MINUTES": "3",
    }
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    done = subprocess.run(["bash", script, "comparison"], env=os.environ | settings, capture_output=True, text=True)
    results = [json.loads(path.read_text()) for path in (out / "comparison" / "results").glob("*.json")]
    assert results, done.stdout + done.stderr
    assert all(0 <= result["test"]["exact_match"] <= 1 and result["text_loss"] > 0 for result in results)
    assert len(list((out / "comparison" / "texts").iterdir())) == len(results)
