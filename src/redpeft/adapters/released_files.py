"""The files of the paper's own code (repository mlwu22/RED): read with care, and written as that code writes them.

    delta_vector.pth   <module>.delta_vector.activation_bias | activation_scaling, each of shape (1, width)
    classifier.pth     beside it for RoBERTa: dense.weight | dense.bias | out_proj.weight | out_proj.bias

They are pickles, the only ones that redpeft reads, and only if tensors are all that is in them. The released code has
vectors in fp32, but for Llama's in bf16.

A file is written in bf16 if every value is a bf16 value, and in fp32 otherwise. So nothing has to be remembered of the
file that an adapter came from, and nothing is rounded: vectors trained in fp32 never have all their lower bits zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from redpeft.adapters.files import EffectiveEdit
from redpeft.errors import UserError, some
from redpeft.storage import new_folder

WEIGHTS, HEAD = "delta_vector.pth", "classifier.pth"
MARK = ".delta_vector."
BIAS, SCALE = "activation_bias", "activation_scaling"
HEAD_NAMES = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
DTYPES = (torch.float32, torch.bfloat16)
# Parts of names in the order in which the models have them; the others follow in the order of the alphabet.
ORDER = ("encoder", "decoder", "attention", "self", "query", "key", "value", "output")


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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_edits(path: Path) -> tuple[dict[str, EffectiveEdit], torch.dtype]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    tensors = _load(path)
    dtype = next(iter(tensors.values())).dtype
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(MARK)
        if not name or part not in (BIAS, SCALE):
            raise UserError(f"{path}: {key} is no {SCALE} and no {BIAS} of a module, and redpeft reads these alone")
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
        raise UserError(f"{path}: it holds {some(list(head))}, which is not RoBERTa's head ({', '.join(HEAD_NAMES)})")
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
