"""Checkpoints of the paper's own code: into adapter folders, and back bit for bit.

The released code (repository mlwu22/RED) edits RoBERTa, T5, GPT-2 and Llama, at the FFN's output (RED) or at five
places of a layer (RED++, our "red+"), by `h' = scaling * h + bias`: our edit in units of 1. It names the modules of
RoBERTa's bare encoder, which a model with a head has under `roberta.`; its head is `RobertaClassificationHead`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import transformers
from rich.table import Table
from transformers import PreTrainedModel

from redpeft.adapters.card import AUTO_CLASS
from redpeft.adapters.files import Adapter, EffectiveEdit, write_adapter
from redpeft.adapters.released_files import (
    HEAD,
    HEAD_NAMES,
    Released,
    dtype_name,
    in_model_order,
    read_released,
    write_released,
)
from redpeft.console import counted
from redpeft.errors import UserError, some
from redpeft.models import load_config, on_meta
from redpeft.tuner.config import RedConfig
from redpeft.tuner.sites import RED_PLUS, find_sites

ENCODER, CLASSIFIER = "roberta.", "classifier."  # in transformers' RobertaForSequenceClassification
# The models that the released code edits, by how it names their modules: transformers' model_type, PEFT's task type.
MODELS = {
    "encoder.layer.": ("roberta", "FEATURE_EXTRACTION"),  # with its head: SEQ_CLS
    "encoder.block.": ("t5", "SEQ_2_SEQ_LM"),
    "decoder.block.": ("t5", "SEQ_2_SEQ_LM"),
    "transformer.h.": ("gpt2", "CAUSAL_LM"),
    "model.layers.": ("llama", "CAUSAL_LM"),
}
BIAS_ONLY = "every scale is exactly 1, so this is a bias-only edit"
WHY_BIAS_ONLY = (
    ": the scales were trained in bf16, whose spacing at 1.0 is 2^-7 above and 2^-8 below, so that an Adam step of "
    "1e-3 or 2e-5 rounds away"
)
NO_HEAD = f"there is no {HEAD} beside it: these are the edits of the bare encoder, without a head"


@dataclass(frozen=True)
class Imported:
    """What a released checkpoint holds. Biases are in the size of the output that they are added to."""

    adapter: Path
    architecture: str  # the class to load the base model with
    num_labels: int | None
    sites: str  # "ffn" (RED) or "red+" (RED++)
    modules: int
    layers: int
    parameters: int  # of the edits
    head_parameters: int
    dtype: str
    scale_min: float
    scale_max: float
    scale_negative: float  # share of the entries
    bias_max: float  # largest absolute value
    bias_rms: list[float]  # by layer, first to last
    notes: list[str]


@dataclass(frozen=True)
class Exported:
    """Files in the released format."""

    files: list[Path]
    modules: int
    dtype: str


def import_released(path: str | Path, base: str, out: str | Path) -> Imported:
    """Turn a `delta_vector.pth` of the released code, or the folder that holds it, into the adapter folder `out`.

    `base` is the base model: a hub name, or a folder in which a config.json is enough. Values are kept, in fp32.
    Raises `UserError`, before anything is written, for files that are not in the released format (the tensor is
    named), for another base model than the one that was edited, and for an `out` that is not an empty folder.
    """
    released = read_released(path)
    model, task = _base_model(released, base)
    edits = {f"{ENCODER if released.head else ''}{name}": edit for name, edit in released.edits.items()}
    sites = _check_sites(released.path, base, model, edits)
    head = {f"{CLASSIFIER}{name}": tensor for name, tensor in released.head.items()}
    _check_head(released.path.with_name(HEAD), base, model, head)
    config = RedConfig(
        sites=sites,
        scale_origin=0.0,  # and no unit has been measured: when it is trained on, both are set
        task_type=task,
        modules_to_save=[CLASSIFIER.rstrip(".")] if head else None,
        base_model_name_or_path=base,
        revision=getattr(model.config, "_commit_hash", None),
        inference_mode=True,
    )
    adapter = Adapter(Path(out), config.to_dict(), edits, dict.fromkeys(edits, 1.0), head)
    write_adapter(adapter)
    return _describe(adapter, model, released.dtype)


def export_released(adapter: Adapter, out: str | Path) -> Exported:
    """Write an adapter to the folder `out` as the released code does: what was imported comes back bit for bit.

    The bias that is written is the effective one, `unit * bias`. Raises `UserError`, before anything is written, for
    modules or a head that the released format has no place for, and for an `out` that is not an empty folder.
    """
    edits = {site.removeprefix(ENCODER): edit for site, edit in adapter.edits.items()}
    if strange := [site for site in adapter.edits if not site.removeprefix(ENCODER).startswith(tuple(MODELS))]:
        raise UserError(
            f"{adapter.folder}: the released code edits RoBERTa, T5, GPT-2 and Llama, which have no {some(strange)}"
        )
    head = {key.removeprefix(CLASSIFIER): tensor for key, tensor in adapter.head.items()}
    if head and (head.keys() != set(HEAD_NAMES) or not all(site.startswith(ENCODER) for site in adapter.edits)):
        raise UserError(
            f"{adapter.folder}: the released format has no place for {some(sorted(adapter.head))}, but only for the "
            "head of RobertaForSequenceClassification"
        )
    files, dtype = write_released(edits, head, Path(out))
    return Exported(files, len(edits), dtype)


def import_table(found: Imported) -> Table:
    table = Table(show_header=False)
    heads = f"{found.head_parameters:,} ({found.num_labels} labels)" if found.num_labels else "none"
    for row in (
        ("base model's class", found.architecture),
        ("sites", f"{found.sites}: {counted(found.modules, 'module')} in {counted(found.layers, 'layer')}"),
        ("parameters of the edits", f"{found.parameters:,}"),
        ("parameters of the head", heads),
        ("dtype", found.dtype),
        ("scale", f"{found.scale_min:.3g} .. {found.scale_max:.3g}, {found.scale_negative:.1%} negative"),
        ("bias: largest", f"{found.bias_max:.3g}"),
        ("bias: RMS, first to last layer", f"{found.bias_rms[0]:.2g} .. {found.bias_rms[-1]:.2g}"),
    ):
        table.add_row(*row)
    return table


def _base_model(released: Released, base: str) -> tuple[PreTrainedModel, str]:
    """The edited model, on the meta device and of the class to load it with, and its task type."""
    first = next(iter(released.edits))
    model_type, task = next((MODELS[start] for start in MODELS if first.startswith(start)), ("", ""))
    config = load_config(base)
    if config.model_type != model_type:
        of = f"of {model_type}" if model_type else "of none of the models that the released code edits"
        raise UserError(
            f"{released.path}: {first} is a module {of}, and {base} is {config.model_type}; name the edited model as "
            "--base"
        )
    if released.head:
        if model_type != "roberta":
            raise UserError(
                f"{released.path.with_name(HEAD)}: the released code has a head for RoBERTa only; move the file away"
            )
        task, config.num_labels = "SEQ_CLS", len(released.head["out_proj.weight"])
    return on_meta(getattr(transformers, AUTO_CLASS.get(task, "AutoModel")), config), task


def _check_sites(path: Path, base: str, model: PreTrainedModel, edits: Mapping[str, EffectiveEdit]) -> str:
    """Which sites these are, "ffn" or "red+": all of them have to be there, in the base model's widths."""
    found = find_sites(model, RED_PLUS)
    widths = {site.name: site.width for site in found}
    if left_over := [name for name in edits if name not in widths]:
        raise UserError(f"{path}: {base} has no {some(left_over)} to edit; name the edited model as --base")
    for name, edit in edits.items():
        if edit.scale.numel() != widths[name]:
            raise UserError(
                f"{path}: {name} has width {edit.scale.numel()}, and {widths[name]} in {base}; name the edited model "
                "as --base"
            )
    ffn = [site.name for site in found if site.kind == "ffn"]
    sites, expected = ("ffn", ffn) if edits.keys() <= set(ffn) else (RED_PLUS, list(widths))
    if missing := [name for name in expected if name not in edits]:
        raise UserError(f"{path}: no tensors for {some(missing)}, which {base} has; name the edited model as --base")
    return sites


def _check_head(path: Path, base: str, model: PreTrainedModel, head: Mapping[str, torch.Tensor]) -> None:
    state = model.state_dict()
    for name, tensor in head.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{path}: {name.removeprefix(CLASSIFIER)} is {tuple(tensor.shape)}, and {tuple(state[name].shape)} on "
                f"{base}; name the edited model as --base"
            )


def _describe(adapter: Adapter, model: PreTrainedModel, dtype: torch.dtype) -> Imported:
    scale = torch.cat([edit.scale for edit in adapter.edits.values()])
    layers = groupby(sorted(adapter.edits, key=in_model_order), key=_layer)
    biases = [torch.cat([adapter.edits[name].bias for name in names]) for _, names in layers]
    notes = []
    if (scale == 1).all():
        notes.append(BIAS_ONLY + (WHY_BIAS_ONLY if dtype == torch.bfloat16 else ""))
    if adapter.config["task_type"] == "FEATURE_EXTRACTION":
        notes.append(NO_HEAD)
    return Imported(
        adapter=adapter.folder,
        architecture=type(model).__name__,
        num_labels=model.config.num_labels if adapter.head else None,
        sites=adapter.config["sites"],
        modules=len(adapter.edits),
        layers=len(biases),
        parameters=2 * scale.numel(),
        head_parameters=sum(tensor.numel() for tensor in adapter.head.values()),
        dtype=dtype_name(dtype),
        scale_min=scale.min().item(),
        scale_max=scale.max().item(),
        scale_negative=(scale < 0).float().mean().item(),
        bias_max=max(bias.abs().max().item() for bias in biases),
        bias_rms=[bias.square().mean().sqrt().item() for bias in biases],
        notes=notes,
    )


def _layer(name: str) -> str:
    """The name up to its first number: `encoder.layer.3` of `encoder.layer.3.output.dense`."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name
