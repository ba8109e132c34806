"""Checkpoints of the paper's own code: into adapter folders, and back bit for bit.

The released code (repository mlwu22/RED) edits RoBERTa, T5, GPT-2 and Llama, at the FFN's output (RED) or at five
places of a layer (RED++, our "red+"), by `h' = scaling * h + bias`: our edit in units of 1. It names the modules of
RoBERTa's bare encoder, which a model with a head has under `roberta.`; its head is `RobertaClassificationHead`. Its
files:

    delta_vector.pth   <module>.delta_vector.activation_bias | activation_scaling, each of shape (1, width)
    classifier.pth     for RoBERTa: dense.weight | dense.bias | out_proj.weight | out_proj.bias

They are pickles, the only ones that redpeft reads, and only if they hold nothing but tensors. The vectors are fp32,
Llama's bf16. A file is written in bf16 if every value is a bf16 value, otherwise in fp32. So nothing is rounded, and
the dtype of an imported file need not be stored: vectors trained in fp32 do not have all lower bits zero.
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
from redpeft.adapters.folder import Adapter, EffectiveEdit, write_adapter
from redpeft.console import counted
from redpeft.errors import UserError, shorten_list
from redpeft.models import dtype_name, load_config, on_meta
from redpeft.storage import new_folder
from redpeft.tuner.config import RedConfig
from redpeft.tuner.sites import RED_PLUS, find_sites

WEIGHTS, HEAD = "delta_vector.pth", "classifier.pth"
MARK = ".delta_vector."
BIAS, SCALE = "activation_bias", "activation_scaling"
HEAD_NAMES = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
DTYPES = (torch.float32, torch.bfloat16)
# Parts of names in the order in which the models have them; the others follow in the order of the alphabet.
ORDER = ("encoder", "decoder", "attention", "self", "query", "key", "value", "output")
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

    `base` is the base model: a Hub name, or a folder with at least a config.json. Values are kept, in fp32. Raises
    `UserError`, before anything is written, for files that are not in the released format (it names the tensor), for
    another base model than the one that was edited, and for an `out` that is not an empty folder.
    """
    released = read_released(path)
    model, task = _base_model(released, base)
    edits = {f"{ENCODER if released.head else ''}{name}": edit for name, edit in released.edits.items()}
    sites = _check_sites(released.path, base, model, edits)
    head = {f"{CLASSIFIER}{name}": tensor for name, tensor in released.head.items()}
    _check_head(released.path.with_name(HEAD), base, model, head)
    config = RedConfig(
        sites=sites,
        scale_origin=0.0,  # this and the unit are set when the adapter is trained further
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
    """Write an adapter to the folder `out` as the released code does; an imported checkpoint comes back bit for bit.

    The bias that is written is the effective one, `unit * bias`. Raises `UserError`, before anything is written, for
    modules or a head that the released format cannot hold, and for an `out` that is not an empty folder.
    """
    edits = {site.removeprefix(ENCODER): edit for site, edit in adapter.edits.items()}
    if strange := [site for site in adapter.edits if not site.removeprefix(ENCODER).startswith(tuple(MODELS))]:
        raise UserError(
            f"{adapter.folder}: the released code edits RoBERTa, T5, GPT-2 and Llama, which have no "
            f"{shorten_list(strange)}"
        )
    head = {key.removeprefix(CLASSIFIER): tensor for key, tensor in adapter.head.items()}
    if head and (head.keys() != set(HEAD_NAMES) or not all(site.startswith(ENCODER) for site in adapter.edits)):
        raise UserError(
            f"{adapter.folder}: the released format has no place for {shorten_list(sorted(adapter.head))}, but only "
            "for the head of RobertaForSequenceClassification"
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
        raise UserError(f"{path}: {base} has no {shorten_list(left_over)} to edit; name the edited model as --base")
    for name, edit in edits.items():
        if edit.scale.numel() != widths[name]:
            raise UserError(
                f"{path}: {name} has width {edit.scale.numel()}, and {widths[name]} in {base}; name the edited model "
                "as --base"
            )
    ffn = [site.name for site in found if site.kind == "ffn"]
    sites, expected = ("ffn", ffn) if edits.keys() <= set(ffn) else (RED_PLUS, list(widths))
    if missing := [name for name in expected if name not in edits]:
        raise UserError(
            f"{path}: no tensors for {shorten_list(missing)}, which {base} has; name the edited model as --base"
        )
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


# --- the files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Released:
    """The files in memory. `edits` go by the released code's module names, in fp32; `dtype` is that of the file."""

    path: Path
    edits: dict[str, EffectiveEdit]
    dtype: torch.dtype
    head: dict[str, torch.Tensor]  # empty without a classifier.pth


def read_released(path: str | Path) -> Released:
    """Read a `delta_vector.pth`, or the folder that holds it, and the `classifier.pth` beside it if there is one.

    Raises `UserError`, which names the tensor, for files that hold anything else than the released code writes, and
    for values that are not finite.
    """
    path = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    edits, dtype = _read_edits(path)
    beside = path.with_name(HEAD)
    return Released(path, edits, dtype, _read_head(beside) if beside.is_file() else {})


def write_released(
    edits: Mapping[str, EffectiveEdit], head: Mapping[str, torch.Tensor], out: Path
) -> tuple[list[Path], str]:
    """Write the files into a new folder; returns their paths and the dtype. `UserError` if `out` is not empty."""
    dtype = torch.bfloat16 if all(_is_bf16(vector) for edit in edits.values() for vector in edit) else torch.float32
    tensors = {}
    for name in sorted(edits, key=in_model_order):
        tensors[f"{name}{MARK}{BIAS}"] = edits[name].bias[None].to(dtype)
        tensors[f"{name}{MARK}{SCALE}"] = edits[name].scale[None].to(dtype)
    files = {WEIGHTS: tensors}
    if head:
        files[HEAD] = {name: head[name] for name in HEAD_NAMES}
    with new_folder(out) as folder:
        for name, content in files.items():
            torch.save(content, folder / name)
    return [out / name for name in files], dtype_name(dtype)


def in_model_order(name: str) -> list[tuple[int, str]]:
    """Sorts modules as the models of the released code have them: layer 10 after 9, the encoder before the decoder."""
    return [
        (int(part), "") if part.isdigit() else (ORDER.index(part) if part in ORDER else len(ORDER), part)
        for part in name.split(".")
    ]


def _read_edits(path: Path) -> tuple[dict[str, EffectiveEdit], torch.dtype]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    tensors = _load(path)
    dtype = next(iter(tensors.values())).dtype
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(MARK)
        if not name or part not in (BIAS, SCALE):
            raise UserError(
                f"{path}: {key} is neither the {SCALE} nor the {BIAS} of a module, and redpeft reads only these"
            )
        if tensor.ndim != 2 or tensor.shape[0] != 1 or tensor.dtype != dtype:
            raise UserError(
                f"{path}: {key} is {dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}, and not "
                f"{dtype_name(dtype)}, as the first tensor is, of shape (1, width)"
            )
        parts.setdefault(name, {})[part] = tensor[0].float()
    for name, part_of in parts.items():
        if missing := {BIAS, SCALE} - part_of.keys():
            raise UserError(f"{path}: {name} has no {missing.pop()}; an edit has both vectors")
        if part_of[BIAS].shape != part_of[SCALE].shape:
            raise UserError(f"{path}: the {SCALE} and the {BIAS} of {name} differ in width")
    return {name: EffectiveEdit(part[SCALE], part[BIAS]) for name, part in parts.items()}, dtype


def _read_head(path: Path) -> dict[str, torch.Tensor]:
    head = _load(path)
    if head.keys() != set(HEAD_NAMES) or head["out_proj.weight"].ndim != 2:
        raise UserError(
            f"{path}: it holds {shorten_list(list(head))}, which is not RoBERTa's head ({', '.join(HEAD_NAMES)})"
        )
    return head


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"no such file: {path}; give a {WEIGHTS} of the released code, or the folder that holds it")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on broken bytes torch raises almost anything
        raise UserError(f"{path}: corrupt, or a pickle of more than tensors, which redpeft does not load") from error
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(key, str) for key in tensors):
        raise UserError(f"{path}: it holds no tensors by name")
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            kind = dtype_name(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(f"{path}: {key} is {kind}, and the released code writes float32 or bfloat16 tensors")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {key} has values that are not finite (NaN or infinite); take another checkpoint")
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _is_bf16(vector: torch.Tensor) -> bool:
    return torch.equal(vector, vector.bfloat16().to(vector.dtype))
