"""Arithmetic on trained edits: functions from adapters to an adapter, exact at each site.

A site's edit is the affine map `h' = scale * h + bias` of each channel, with the bias in the output's own size:

    sequence([a, b])              a, then b              scale = sb * sa                      bias = sb * ba + bb
    weighted_sum([a, b], [u, v])  of what they change    scale = 1 + u (sa - 1) + v (sb - 1)  bias = u ba + v bb
    inverse(a)                    undoes a after it      scale = 1 / sa                       bias = -ba / sa
    keep_scale(a), keep_bias(a)   one of its vectors     bias = 0                             scale = 1
    keep_layers(a, [0, 1])        some layers' sites
    trim(a, 0.8)                  without the smallest 80 % of the scales and of the biases

`weighted_sum` is the average where the weights sum to 1, and with one adapter its strength: 0.5 half of it, -1 its
negation. A site that one adapter has and another lacks is the identity there.

Adapters of different base models are refused. The result takes its configuration and the units of its biases from the
first adapter that has them, and its head as `tuner.heads.combine_heads` says; `write_adapter` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from redpeft.adapters.files import Adapter, EffectiveEdit
from redpeft.errors import UserError, some
from redpeft.models import fingerprint_difference
from redpeft.tuner import compose as method
from redpeft.tuner.heads import Head, combine_heads


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of the adapters' differences from the identity: average, interpolation, strength, negation.

    Heads are averaged where their weights sum to 1. `UserError`: adapters of different bases, heads that differ.
    """
    return _combine(adapters, weights, method.weighted_sum, averaging=True)


def sequence(adapters: Sequence[Adapter]) -> Adapter:
    """The adapters one after another at each site, the first one first: what PEFT does with several active ones.

    `UserError`: adapters of different bases, heads that differ.
    """
    return _combine(adapters, [1.0] * len(adapters), method.sequence, averaging=False)


def inverse(adapter: Adapter) -> Adapter:
    """The adapter that undoes `adapter` when it acts after it. `UserError` names the sites where a scale is 0."""
    zero = [site for site, edit in adapter.edits.items() if bool((edit.scale == 0).any())]
    if zero:
        raise UserError(
            f"{adapter.folder} has no inverse: a scale is 0 at {some(zero)}. Its negation, a weight of -1, exists"
        )
    return _each(adapter, lambda edit: _edit(method.inverse(_difference(edit))))


def keep_scale(adapter: Adapter) -> Adapter:
    """The scales alone: every bias 0."""
    return _each(adapter, lambda edit: EffectiveEdit(edit.scale, torch.zeros_like(edit.bias)))


def keep_bias(adapter: Adapter) -> Adapter:
    """The biases alone: every scale 1."""
    return _each(adapter, lambda edit: EffectiveEdit(torch.ones_like(edit.scale), edit.bias))


def keep_layers(adapter: Adapter, layers: Iterable[int]) -> Adapter:
    """The sites of some layers alone; a site's layer is the first number in its name.

    `UserError`: a layer in which the adapter has no site.
    """
    of_site = {site: int(found[1]) for site in adapter.edits if (found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", site))}
    wanted = set(layers)
    if missing := wanted - set(of_site.values()):
        there = ", ".join(map(str, sorted(set(of_site.values())))) or "none, as no site's name has a number"
        raise UserError(f"{adapter.folder} edits nothing in layer {min(missing)}; its layers are {there}")
    return _derived([adapter], {site: edit for site, edit in adapter.edits.items() if of_site.get(site) in wanted})


def trim(adapter: Adapter, share: float) -> Adapter:
    """Set the smallest entries to the identity: of the scales this share (0 to 1), and of the biases this share.

    Over all sites together, scales by |scale - 1| and biases by |bias| / unit, so that a site whose output is large
    has no larger say. `UserError`: a share out of range.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share to trim is from 0 to 1 (0% to 100%), not {share:g}")
    scales = _largest({site: edit.scale - 1 for site, edit in adapter.edits.items()}, share)
    biases = _largest({site: edit.bias / adapter.units[site] for site, edit in adapter.edits.items()}, share)
    edits = {
        site: EffectiveEdit(torch.where(scales[site], edit.scale, 1), torch.where(biases[site], edit.bias, 0))
        for site, edit in adapter.edits.items()
    }
    return _derived([adapter], edits)


def take_head(adapter: Adapter, owner: Adapter) -> Adapter:
    """`adapter` with the head (`modules_to_save`) of `owner`. `UserError`: adapters of different bases."""
    check_same_base([adapter, owner])
    return _with_head(adapter, owner, owner.head)


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Raise `UserError` where adapters belong to different base models, as far as their folders tell.

    Widths must agree. Fingerprints decide between adapters of the same sites; where they cannot (other sites, or none
    recorded), the names of the base models do.
    """
    first, *others = adapters
    for other in others:
        if reason := _other_base(first, other):
            raise UserError(f"{first.folder} and {other.folder} are for different base models: {reason}")


def _other_base(one: Adapter, other: Adapter) -> str | None:
    for site in [site for site in one.edits if site in other.edits]:
        widths = one.edits[site].scale.numel(), other.edits[site].scale.numel()
        if widths[0] != widths[1]:
            return f"the output of {site} has width {widths[0]} in one and {widths[1]} in the other"
    prints = one.config.get("base_fingerprint"), other.config.get("base_fingerprint")
    if all(prints) and one.edits.keys() == other.edits.keys():
        return fingerprint_difference(*prints)
    names = [adapter.config.get("base_model_name_or_path") for adapter in (one, other)]
    if all(names) and names[0] != names[1]:
        return (
            f"one names {names[0]}, the other {names[1]}, and their fingerprints cannot be compared; if these are the "
            "same model, write the same base_model_name_or_path into both adapter_config.json"
        )
    return None


def _combine(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: method.Combination, *, averaging: bool
) -> Adapter:
    check_same_base(adapters)
    edits = {}
    for site in dict.fromkeys(site for adapter in adapters for site in adapter.edits):
        pairs = zip(adapters, weights, strict=True)
        there = [(_difference(adapter.edits[site]), weight) for adapter, weight in pairs if site in adapter.edits]
        edits[site] = _edit(combination(*zip(*there, strict=True)))
    names, heads = [str(adapter.folder) for adapter in adapters], [adapter.head for adapter in adapters]
    head = combine_heads(names, heads, weights if averaging else None)
    owner = next((adapter for adapter in adapters if adapter.head), adapters[0])
    return _with_head(_derived(adapters, edits), owner, head)


def _difference(edit: EffectiveEdit) -> method.Difference:
    return edit.scale - 1, edit.bias


def _edit(difference: method.Difference) -> EffectiveEdit:
    return EffectiveEdit(1 + difference[0], difference[1])


def _with_head(adapter: Adapter, owner: Adapter, head: Head) -> Adapter:
    config = {name: owner.config.get(name) for name in ("modules_to_save", "task_type")}
    return replace(adapter, config=adapter.config | config, head=dict(head))


def _each(adapter: Adapter, function: Callable[[EffectiveEdit], EffectiveEdit]) -> Adapter:
    return _derived([adapter], {site: function(edit) for site, edit in adapter.edits.items()})


def _derived(adapters: Sequence[Adapter], edits: Mapping[str, EffectiveEdit]) -> Adapter:
    """The first adapter with other edits, and what its configuration then says."""
    configs = [{**adapter.config, "target_modules": list(adapter.edits)} for adapter in adapters]
    config = adapters[0].config | method.combine_configs(configs, edits.keys())
    units = dict.fromkeys(edits, 1.0)
    if config["unit_measured"] or config.get("unit") != "auto":
        units = {site: next(a.units[site] for a in adapters if site in a.units) for site in edits}
    return replace(adapters[0], config=config, edits=dict(edits), units=units)


def _largest(values: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Masks of the values that stay when the smallest of all are left out: round(share * their number)."""
    sizes = torch.cat(list(values.values())).abs()
    stays = torch.ones_like(sizes, dtype=torch.bool)
    stays[sizes.argsort(stable=True)[: round(share * len(sizes))]] = False
    return dict(zip(values, stays.split([len(value) for value in values.values()]), strict=True))
