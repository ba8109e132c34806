"""Write the folded checkpoint: the base's files one after another, with the tensors of edited layers changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import PreTrainedModel

from redpeft.adapters.files import Adapter
from redpeft.adapters.fold.checkpoint import INDEX, Checkpoint, companions
from redpeft.adapters.fold.names import Names
from redpeft.adapters.fold.plan import Plan
from redpeft.adapters.fold.survey import FoldedSite, rows
from redpeft.errors import UserError
from redpeft.models import FLOATS, ensure_pad_token, load_tokenizer
from redpeft.tuner.edit import fold_edit


@dataclass
class Changes:
    """What happens to the base's tensors, by their keys in its checkpoint.

    `added` are new tensors, by the key beside which they are written and their own names; `copied` are the names that
    a tensor of the base gets beside its own.
    """

    scaled: dict[str, FoldedSite] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    copied: dict[str, list[str]] = field(default_factory=dict)
    added: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def add(self, beside: str, name: str, tensor: torch.Tensor) -> None:
        self.added.setdefault(beside, {})[name] = tensor


def changes(sites: list[FoldedSite], plan: Plan, zeros: set[str], names: Names, dtype: torch.dtype) -> Changes:
    """What to change in the base's checkpoint. `zeros`: biases of its model that are new and that no edit fills."""
    found, state = Changes(), plan.model.state_dict()
    for group in plan.untied:
        there = [key for key, name in names.written.items() if name in group]
        found.copied[there[0]] = [name for name in group if name not in map(names.written.get, there)]
    for site in sites:
        if site.key is not None and site.scale is not None:
            found.scaled[site.key] = site
        if site.key is not None and site.bias is not None:
            key = site.key.removesuffix("weight") + "bias"
            if key in names.written:
                found.replaced[key] = site.bias
            else:
                found.add(site.key, names.written[site.key].removesuffix("weight") + "bias", site.bias)
    for name in sorted(zeros):
        key = names.find(name.removesuffix("bias") + "weight")
        found.add(key, names.written[key].removesuffix("weight") + "bias", torch.zeros(state[name].shape, dtype=dtype))
    return found


def write_weights(
    folder: Path,
    checkpoint: Checkpoint,
    changes: Changes,
    names: Mapping[str, str],
    model: PreTrainedModel,
    head: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    convert: bool,
) -> None:
    """Write the base's tensors under their new `names`, those without a name left out, with those of the head in their
    places or after the last.

    Files are split as the base's are. `dtype` is that of what is new or folded; of all else too with `convert`.
    """
    weight_map: dict[str, str] = {}
    total = 0
    new = dict(head)
    files = list(checkpoint.files.items())
    for file, keys in track(files, "Folding", console=Console(stderr=True), disable=len(files) == 1):
        tensors: dict[str, torch.Tensor] = {}
        with checkpoint.open(file) as shard:
            metadata = shard.metadata()  # torchao keeps there what its tensors are
            for key in keys:
                if key in names:
                    tensor = _changed(key, shard.get_tensor(key), changes, model, dtype, convert).contiguous()
                    tensors |= {name: tensor.clone() for name in changes.copied.get(key, ()) if name not in head}
                    tensors[names[key]] = new.pop(names[key]).to(dtype).contiguous() if names[key] in new else tensor
                    tensors |= changes.added.get(key, {})
        if file == files[-1][0]:
            tensors |= {name: tensor.to(dtype).contiguous() for name, tensor in new.items()}
        if tensors:
            save_file(tensors, folder / file, metadata={**(metadata or {}), "format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_rest(folder: Path, base: Path, adapter: Adapter, model: PreTrainedModel) -> None:
    """The configuration, and what lies beside the weights: tokenizer (the adapter's, if it has one), templates, ..."""
    for source in (base, adapter.folder):
        for path in companions(source):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)
    model.config.architectures = [type(model).__name__]
    if getattr(model.config, "pad_token_id", None) is None and (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)
        if tokenizer.pad_token is None:
            ensure_pad_token(tokenizer)  # as in training
            tokenizer.save_pretrained(folder)
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config.save_pretrained(folder)


def _changed(
    key: str, tensor: torch.Tensor, changes: Changes, model: PreTrainedModel, dtype: torch.dtype, convert: bool
) -> torch.Tensor:
    if key in changes.replaced:
        return changes.replaced[key]
    if key not in changes.scaled:
        if not convert or tensor.dtype not in FLOATS:
            return tensor
        converted = tensor.to(dtype)
        if not converted.isfinite().all() and tensor.isfinite().all():
            raise UserError(f"{key} of the base model has values beyond the range of {dtype}; fold to bf16 or fp32")
        return converted
    site = changes.scaled[key]
    assert site.scale is not None
    module = model.get_submodule(site.site)
    scale = site.scale.to(torch.promote_types(tensor.dtype, torch.float32))
    folded, _ = fold_edit(rows(tensor, module), None, scale, torch.zeros_like(scale))
    return rows(folded, module).to(dtype)
