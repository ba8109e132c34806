"""The benchmarks of serving run, at sizes that say nothing about time but all about memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.serving

TINY = ["--layers=2", "--width=64", "--slots=4", "--tokens=4", "--threads=1", "--methods=RED,LoRA r=8", "--json"]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def report_of(name: str, *arguments: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def report(*arguments: str) -> dict:
    return report_of("serving.py", *arguments, *TINY)


@pytest.mark.slow  # four engines
@pytest.mark.timeout(1200)
def test_throughput_is_that_of_every_way_at_every_number_of_adapters(base):
    """On a base model from a folder; the others make theirs."""
    rows = report("throughput", f"--base={base}", "--adapters=1,8", "--requests=8", "--rounds=2")["rows"]
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


@pytest.mark.slow  # three engines
@pytest.mark.timeout(1200)
def test_latency_counts_every_request():
    found = report("latency", "--adapters=6", "--seconds=1", "--rounds=2", "--loads=0.5")
    assert [row["way"] for row in found["rows"]] == ["base", "RED", "LoRA r=8"]
    assert len({row["requests"] for row in found["rows"]}) == 1  # the same arrivals
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in found["rows"])
    assert "capacity:" in found["notes"][-1]


@pytest.mark.slow  # four servers
@pytest.mark.timeout(1200)
def test_servers_start_and_list_their_adapters():
    found = report_of("server.py", "--adapters=3", "--calls=3", "--layers=2", "--width=64", "--json")
    assert [row["server"] for row in found["starts"]] == ["base", "1 adapter", "3 adapters", "3, no check"]
    assert all(row["median_s"] > 1 for row in found["starts"])
    calls = {row["call"]: row for row in found["calls"]}
    assert [calls[f"/v1/models, {name}"]["calls"] for name in ("first call", "later calls", "an adapter more")] == [
        1,
        3,
        1,
    ]
    assert all(0 < row["median_ms"] <= row["most_ms"] for row in calls.values())
