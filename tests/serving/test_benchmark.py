"""The benchmark of serving runs, at sizes that say nothing about time but all about memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.serving

TINY = ["--layers=2", "--width=64", "--slots=4", "--tokens=4", "--threads=1", "--methods=RED,LoRA r=8", "--json"]
FILE = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def report(*arguments: str) -> dict:
    run = subprocess.run([sys.executable, str(FILE), *arguments, *TINY], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_throughput_is_that_of_every_way_at_every_number_of_adapters():
    rows = report("throughput", "--adapters=1,8", "--requests=8", "--rounds=2")["rows"]
    assert [(row["adapters"], row["way"]) for row in rows] == [
        (count, way) for count in (1, 8) for way in ("base", "base again", "RED", "LoRA r=8")
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
    assert {row["ratio"] for row in rows if row["way"] == "base"} == {1.0}


def test_a_slot_is_two_vectors_a_layer_beside_loras_matrices():
    red, lora = report("load", "--count=4")["rows"]
    assert red["slot_bytes"] == 2 * 2 * 64 * 4
    assert lora["slot_bytes"] == 2 * 3 * (64 * 8 + 8 * 64) * 4  # q, k and v are one layer in vLLM, with slots for each
    assert 0 < red["median_ms"] <= red["p99_ms"]


def test_latency_counts_every_request():
    found = report("latency", "--adapters=6", "--seconds=1", "--rounds=2", "--loads=0.5")
    assert [row["way"] for row in found["rows"]] == ["base", "RED", "LoRA r=8"]
    assert len({row["requests"] for row in found["rows"]}) == 1  # the same arrivals
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in found["rows"])
    assert "capacity:" in found["notes"][-1]
