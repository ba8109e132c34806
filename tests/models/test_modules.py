"""Fingerprints, and names of compiled modules."""

import copy

import pytest
import torch
from torch import nn

from redpeft.models import fingerprint, fingerprint_difference, plain_name


def model(seed=0, width=64):
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(width, width), "b": nn.Linear(width, 2 * width)})


def test_it_is_small_and_repeatable():
    first, second = fingerprint(model(), ["a", "b"]), fingerprint(model(), ["b", "a"])
    assert first == second
    assert len(str(first)) < 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_it_was_loaded_in_does_not_matter(dtype):
    base = model()
    cast = copy.deepcopy(base).to(dtype)
    assert fingerprint_difference(fingerprint(base, ["a", "b"]), fingerprint(cast, ["a", "b"])) is None


def test_a_fine_tuned_model_of_the_same_shape_differs():
    base, tuned = model(), model()
    with torch.no_grad():
        tuned["a"].weight.add_(1e-3 * torch.randn(64, 64))  # about 2 % of a weight
    line = fingerprint_difference(fingerprint(base, ["a", "b"]), fingerprint(tuned, ["a", "b"]))
    assert "weights differ" in line
    assert "of 32 sampled values" in line


def test_other_shapes_or_names_differ():
    line = fingerprint_difference(fingerprint(model(), ["a", "b"]), fingerprint(model(width=32), ["a", "b"]))
    assert "other names or shapes" in line
    assert "other names" in fingerprint_difference(fingerprint(model(), ["a", "b"]), fingerprint(model(), ["a"]))


def test_it_is_unknown_where_weights_cannot_be_read():
    assert fingerprint(model().to("meta"), ["a"]) is None
    quantised = model()
    quantised["a"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(quantised, ["a", "b"]) is None
    assert fingerprint_difference(None, fingerprint(model(), ["a"])) is None


def test_plain_names_have_no_mark_of_compilation():
    assert plain_name("_orig_mod.model.layers.0._orig_mod.mlp") == "model.layers.0.mlp"
    assert plain_name("model.not_orig_mod") == "model.not_orig_mod"
