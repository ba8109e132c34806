"""An engine in which edits do not act does not start."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def outcomes(base, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("check") / "outcomes"
    script = Path(__file__).with_name("bypassed_sites.py")
    run = subprocess.run([sys.executable, str(script), str(base), str(out)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(out.read_text())


def test_it_starts_where_edits_act(outcomes):
    assert outcomes["as it should be"] == "started"


def test_it_does_not_start_where_a_site_is_passed_by(outcomes):
    said = outcomes["in no step"]
    assert said.startswith("UserError: an edit of model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj, model")
    assert "does not change what vLLM answers" in said
    assert '{"redpeft": {"check": false}}' in said


def test_it_does_not_start_where_edits_act_in_the_prompt_alone(outcomes):
    """That shows at the last layer, of which nothing is in the cache."""
    assert outcomes["in the prompt alone"].startswith("UserError: an edit of model.layers.2.mlp.down_proj does not")


def test_it_does_not_start_where_the_base_is_edited(outcomes):
    assert outcomes["by the last slot"].startswith("UserError: an edit of ")


def test_the_check_can_be_left_out(outcomes):
    assert outcomes["not checked"] == "started"


def test_a_server_of_which_nobody_asked_for_red_serves_lora_on(outcomes):
    assert outcomes["not asked for"].startswith("started, UserError: ")
    assert "cannot be served with this model: an edit of model.layers.0.mlp.down_proj" in outcomes["not asked for"]


def test_how_far_two_answers_are_apart():
    from redpeft.serving.vllm_internals.self_check import _distance

    one = [{1: -1.0, 2: -2.0}, {1: -1.0, 2: -2.0}]
    assert _distance(one, one) == 0
    assert _distance(one, [{1: -1.5, 2: -2.1}, {2: -2.2, 3: -1.0}]) == pytest.approx(0.2)  # the nearer step
    assert _distance(one, [{3: -1.0}, {1: math.nan, 2: -2.0}]) == math.inf
    assert _distance([], []) == 0
