"""Write the folded checkpoint: the base's files one after another, with the tensors of edited layers changed.

One file of the base is in memory at a time.
"""

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

from redpeft.adapters.checkpoint import INDEX, companions
from redpeft.adapters.fold.layers import FoldedSite, FoldSpec, as_rows
from redpeft.adapters.folder import Adapter
from redpeft.errors import UserError
from redpeft.models import FLOATS, ensure_pad_token, load_tokenizer, loading_report
from redpeft.tuner.edit import fold_edit


@dataclass
class Changes:
    """What happens to the base's tensors, by their keys in its checkpoint.

    `scaled`: weights whose rows are scaled; `replaced`: biases with new values; `copied`: the further names that a
    tensor of the base gets; `added`: new tensors by name, by the key of the tensor beside which they are written.
    """

    scaled: dict[str, FoldedSite] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    copied: dict[str, list[str]] = field(default_factory=dict)
    added: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def find_changes(spec: FoldSpec, sites: list[FoldedSite], original: PreTrainedModel) -> Changes:
    """What to change in the base's checkpoint. `original`: the base's model, without the biases that the plan adds."""
    found, written, state = Changes(), spec.keys.written, spec.plan.model.state_dict()
    for group in spec.plan.untied:
        there = [key for key, name in written.items() if name in group]
        found.copied[there[0]] = [name for name in group if name not in map(written.get, there)]
    new_biases = {}  # by name, with the key of the layer's weight
    for site in sites:
        if site.key is not None and site.scale is not None:
            found.scaled[site.key] = site
        if site.key is not None and site.bias is not None:
            if site.bias_key in written:
                found.replaced[site.bias_key] = site.bias
            else:
                new_biases[f"{site.site}.bias"] = site.key, site.bias
    filled = {f"{site.site}.bias" for site in sites if site.bias is not None}
    for name in sorted(state.keys() - original.state_dict().keys() - filled):  # the switch adds more than is edited
        zeros = torch.zeros(state[name].shape, dtype=spec.dtype)
        new_biases[name] = spec.keys.key_of(name.removesuffix("bias") + "weight"), zeros
    for key, bias in new_biases.values():
        found.added.setdefault(key, {})[written[key].removesuffix("weight") + "bias"] = bias
    return found


def write_weights(folder: Path, spec: FoldSpec, changes: Changes) -> None:
    """Write the base's tensors under the names of the new checkpoint, split into files as the base's are.

    Tensors that its model does not have (of another head) are left out. Tensors of the adapter's head replace the
    base's, or stand after the last one.
    """
    names, head = _written_names(spec), dict(spec.adapter.head)
    weight_map: dict[str, str] = {}
    total = 0
    files = list(spec.checkpoint.files.items())
    for file, keys in track(files, "Folding", console=Console(stderr=True), disable=len(files) == 1):
        tensors: dict[str, torch.Tensor] = {}
        with spec.checkpoint.open(file) as shard:
            metadata = shard.metadata()  # torchao describes its tensors there
            for key in keys:
                if key not in names:
                    continue
                tensor = _changed(key, shard.get_tensor(key), spec, changes).contiguous()
                for name in changes.copied.get(key, ()):
                    if name not in spec.adapter.head:
                        tensors[name] = tensor.clone()
                name = names[key]
                tensors[name] = head.pop(name).to(spec.dtype).contiguous() if name in head else tensor
                tensors |= changes.added.get(key, {})
        if file == files[-1][0]:
            tensors |= {name: tensor.to(spec.dtype).contiguous() for name, tensor in head.items()}
        if tensors:
            save_file(tensors, folder / file, metadata={**(metadata or {}), "format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _written_names(spec: FoldSpec) -> Mapping[str, str]:
    keys, model = spec.keys, spec.plan.model
    if getattr(model.config, "quantization_config", None):
        return keys.written
    unexpected = set(loading_report(model, spec.checkpoint.folder)["unexpected_keys"])
    return {key: name for key, name in keys.written.items() if not {key, name, keys.in_model[key]} & unexpected}


def _changed(key: str, tensor: torch.Tensor, spec: FoldSpec, changes: Changes) -> torch.Tensor:
    if key in changes.replaced:
        return changes.replaced[key]
    if key in changes.scaled:
        site = changes.scaled[key]
        assert site.scale is not None
        module = spec.plan.model.get_submodule(site.site)
        scale = site.scale.to(torch.promote_types(tensor.dtype, torch.float32))
        folded, _ = fold_edit(as_rows(tensor, module), None, scale, torch.zeros_like(scale))
        return as_rows(folded, module).to(spec.dtype)
    if not spec.convert or tensor.dtype not in FLOATS:
        return tensor
    converted = tensor.to(spec.dtype)
    if not converted.isfinite().all() and tensor.isfinite().all():
        raise UserError(f"{key} of the base model has values beyond the range of {spec.dtype}; fold to bf16 or fp32")
    return converted


def write_other_files(folder: Path, base: Path, adapter: Adapter, model: PreTrainedModel) -> None:
    """Write the configuration, and copy the files besides the weights: the base's, then the adapter's (a
    tokenizer)."""
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
