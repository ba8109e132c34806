"""The arithmetic of whole edits. An edit of a site is an affine map of each channel, `h' = scale * h + bias`, so what
edits make together is again one edit, exactly:

    sequence       B after A                  scale = sB * sA                    bias = sB * bA + bB
    weighted sum   of w_i (edit_i - identity) scale = 1 + sum of w_i (s_i - 1)   bias = sum of w_i b_i
    inverse        undoes an edit after it    scale = 1 / s                      bias = -b / s

A weighted sum with weights that sum to 1 is the plain average, with one weight it is the strength of an edit (0 the
identity, 1 the edit, -1 its negation). The bias is in the output's own size, never in units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from redpeft.errors import UserError

Affine = tuple[torch.Tensor, torch.Tensor]  # scale (width,), bias (width,)
Combination = Callable[[Sequence[Affine], Sequence[float]], Affine]
Head = Mapping[str, torch.Tensor]


def weighted_sum(edits: Sequence[Affine], weights: Sequence[float]) -> Affine:
    """The weighted sum of the edits' differences from the identity. At least one edit, a weight for each."""
    rest = 1 - math.fsum(weights)  # an average loses nothing: 1 + (s - 1) would round a small s away
    pairs = list(zip(edits, weights, strict=True))
    return sum(weight * scale for (scale, _), weight in pairs) + rest, sum(
        weight * bias for (_, bias), weight in pairs
    )


def sequence(edits: Sequence[Affine], weights: Sequence[float]) -> Affine:
    """The edits one after another, in this order, each with its weight as its strength."""
    each = [weighted_sum([edit], [weight]) for edit, weight in zip(edits, weights, strict=True)]
    return reduce(lambda first, second: (second[0] * first[0], second[0] * first[1] + second[1]), each)


def inverse(edit: Affine) -> Affine:
    """The edit that undoes `edit`. Not finite where a scale is 0."""
    scale, bias = edit
    return 1 / scale, -bias / scale


COMBINATIONS: dict[str, Combination] = {"linear": weighted_sum, "sequence": sequence}


def combine_configs(configs: Sequence[Mapping[str, Any]], sites: Collection[str]) -> dict[str, Any]:
    """The fields in which the configuration of a composition that edits `sites` differs from its first adapter's.

    What was asked for and the fingerprint of the base describe a set of sites: they are those of an adapter with the
    same sites, if there is one. `configs` give the full names of theirs as `target_modules`.
    """
    same = [config for config in configs if set(config["target_modules"]) == set(sites)]
    like = max(same, key=lambda config: config.get("base_fingerprint") is not None, default={})
    return {
        **{name: like.get(name) for name in ("sites", "layers_to_transform", "base_fingerprint")},
        **{name: any(config.get(name, True) for config in configs) for name in ("use_scale", "use_bias")},
        "target_modules": sorted(sites),
        "resolved": True,
        "exclude_modules": None,  # the names are all there: it could only take some of another adapter's away
    }


def combine_heads(names: Sequence[str], heads: Sequence[Head], weights: Sequence[float] | None) -> Head:
    """The head (`modules_to_save`) of a composition, from those of its adapters: {} for an adapter without one.

    A head is no difference from an identity, so it is kept where just one comes, or all that come are equal. Several
    are averaged where their weights sum to 1 and they have the same keys and shapes. `weights` is None where an
    average has no meaning (a sequence). `UserError` in any other case.
    """
    owners = [index for index, head in enumerate(heads) if head]
    brought = [heads[index] for index in owners]
    if all(same_tensors(brought[0], head) for head in brought):
        return brought[0] if brought else {}
    said = f"{' and '.join(dict.fromkeys(names[index] for index in owners))} bring different heads (modules_to_save)"
    choose = "say whose head to keep: --head on the command line, head=... in Python"
    if weights is None:
        raise UserError(f"{said}, and heads cannot act one after another; {choose}")
    if any(_shapes(head) != _shapes(brought[0]) for head in brought):
        raise UserError(f"{said}, of other names or shapes; {choose}")
    used = [weights[index] for index in owners]
    if not math.isclose(math.fsum(used), 1):
        raise UserError(f"{said}, and their weights sum to {math.fsum(used):g}, not to 1; {choose}")
    return {key: _average([head[key] for head in brought], used) for key in brought[0]}


def _average(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    pairs = zip(tensors, weights, strict=True)
    return torch.stack([weight * tensor.double() for tensor, weight in pairs]).sum(0).to(tensors[0].dtype)


def _shapes(head: Head) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in head.items()}


def same_tensors(left: Head, right: Head) -> bool:
    """Whether two heads have the same names, shapes and values."""
    return _shapes(left) == _shapes(right) and all(torch.equal(left[key], right[key]) for key in left)
