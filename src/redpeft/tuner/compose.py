"""The arithmetic of whole edits, as differences from the identity: `h' = h + d * h + b` at each channel. What edits
make together is again one edit, exactly:

    weighted sum   of w_i times each difference   d = sum of w_i d_i      b = sum of w_i b_i
    sequence       B after A                      d = dA + dB + dA dB     b = (1 + dB) bA + bB
    inverse        undoes an edit after it        d = -d / (1 + d)        b = -b / (1 + d)

A weighted sum with weights that sum to 1 is the plain average, with one weight it is the strength of an edit (0 the
identity, 1 the edit, -1 its negation). The bias is in the output's own size, never in units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

Difference = tuple[torch.Tensor, torch.Tensor]  # d = scale - 1 and the bias, both (width,)
Combination = Callable[[Sequence[Difference], Sequence[float]], Difference]


def weighted_sum(edits: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """The weighted sum of the edits' differences from the identity. At least one edit, a weight for each."""
    parts = [(weight * d, weight * bias) for (d, bias), weight in zip(edits, weights, strict=True)]
    return reduce(lambda left, right: (left[0] + right[0], left[1] + right[1]), parts)


def sequence(edits: Sequence[Difference], weights: Sequence[float]) -> Difference:
    """The edits one after another, in this order, each with its weight as its strength."""
    each = [(weight * d, weight * bias) for (d, bias), weight in zip(edits, weights, strict=True)]
    return reduce(lambda a, b: (a[0] + b[0] + a[0] * b[0], (1 + b[0]) * a[1] + b[1]), each)


def inverse(edit: Difference) -> Difference:
    """The edit that undoes `edit`. Not finite where a scale is 0."""
    d, bias = edit
    return -d / (1 + d), -bias / (1 + d)


COMBINATIONS: dict[str, Combination] = {"linear": weighted_sum, "sequence": sequence}


def combine_configs(configs: Sequence[Mapping[str, Any]], sites: Collection[str]) -> dict[str, Any]:
    """The fields in which the configuration of a composition that edits `sites` differs from its first adapter's.

    What was asked for and the fingerprint of the base describe a set of sites: they are those of an adapter with the
    same sites, if there is one. `configs` give the full names of theirs as `target_modules`. The units of the biases
    count as measured where all of them are.
    """
    same = [config for config in configs if set(config["target_modules"]) == set(sites)]
    like = max(same, key=lambda config: config.get("base_fingerprint") is not None, default={})
    return {
        **{name: like.get(name) for name in ("sites", "layers_to_transform", "base_fingerprint")},
        **{name: any(config.get(name, True) for config in configs) for name in ("use_scale", "use_bias")},
        "scale_origin": max(config.get("scale_origin", 0.0) for config in configs),
        "unit_measured": all(config.get("unit_measured") or config.get("unit") != "auto" for config in configs),
        "target_modules": sorted(sites),
        "resolved": True,
        "exclude_modules": None,  # the names are all there: it could only take some of another adapter's away
    }
