"""The one reader of adapter folders, and a writer besides PEFT's own.

    adapter_config.json         what was edited and on which base model
    adapter_model.safetensors   base_model.model.<module path>.redpeft_edit.scale_offset | bias | unit, and the head's

Everything that needs a trained adapter (inspect, model card, fold, serve) reads it here, so all of them refuse the
same folders with the same messages. Only safetensors files are read, never pickles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import nn

from redpeft.errors import UserError, shorten_list
from redpeft.models import compile_in_place, fingerprint, fingerprint_difference, output_width, plain_name
from redpeft.storage import CONFIG_NAME, WEIGHTS_NAME, new_folder
from redpeft.tuner.config import FORMAT, check_format
from redpeft.tuner.edit import ORIGINS, effective_edit, name_of_scale

PREFIX = "base_model.model."
EDIT = ".redpeft_edit."


class EffectiveEdit(NamedTuple):
    """One site's edit, `h' = scale * h + bias`, with the bias in the output's own size: vectors of shape (width,).

    Edits that are read from a folder are fp64, which is exact: written again they give the same numbers.
    """

    scale: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter folder in memory. `edits` and `units` go by module path, `head` by parameter name."""

    folder: Path
    config: dict[str, Any]
    edits: dict[str, EffectiveEdit]
    units: dict[str, float]
    head: dict[str, torch.Tensor]


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter of any PEFT type. `UserError`: no such folder or file, or another
    content."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder")
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG_NAME} there, so this is not an adapter folder")
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{path}: no peft_type, so this is not an adapter's configuration")
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(config.get(name), str | None):
            raise UserError(f"{path}: {name} is not a text; set it to null to go without")
    if config["peft_type"] == "REDPEFT":
        check_format(config.get("format") or 1, f"{path}: ")
    saved = config.get("base_fingerprint")
    if saved is not None and not (
        isinstance(saved, dict)
        and isinstance(saved.get("shapes"), str)
        and isinstance(samples := saved.get("samples"), list)
        and all(isinstance(value, int | float) for value in samples)
    ):
        raise UserError(f"{path}: base_fingerprint is not one that redpeft wrote; set it to null to go without")
    return config


def read_adapter(folder: str | Path) -> Adapter:
    """Read a RED adapter folder and check that it is whole.

    Raises `UserError` for a folder that is missing or holds another kind of adapter, a file that is corrupt, truncated
    or a pickle, tensors missing or left over against `target_modules`, shapes that disagree and values not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config["peft_type"] != "REDPEFT":
        raise UserError(f"{folder}: this is a {config['peft_type']} adapter, not a RED adapter (REDPEFT)")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    head = {}
    for key, tensor in sorted(read_tensors(folder).items()):  # safetensors has no fixed order
        if (named := _split_key(key)) is not None:
            parts.setdefault(named[0], {})[named[1]] = tensor.double()
        else:
            head[plain_name(key).removeprefix(PREFIX)] = tensor
    config = _with_plain_names(config)
    name = _check_keys(folder, config.get("target_modules"), parts)
    for site, part in parts.items():
        _check_tensors(f"{folder / WEIGHTS_NAME}: {site}", part)
    units = {site: part["unit"].item() for site, part in parts.items()}
    config = {**config, "format": FORMAT, "scale_origin": abs(ORIGINS[name])}
    if "unit_measured" not in config:
        config["unit_measured"] = config.get("unit") == "auto" and any(unit != 1 for unit in units.values())
    edits = {
        site: EffectiveEdit(*effective_edit(part[name], part["bias"], part["unit"], ORIGINS[name]))
        for site, part in parts.items()
    }
    return Adapter(folder, config, edits, units, head)


def read_sites(folder: str | Path) -> list[str]:
    """The modules that a RED adapter edits, by the names of its tensors; only the file's header is read.

    Raises `UserError` for a file that is missing, corrupt, truncated or a pickle, or that holds no edits.
    """
    with _weights(Path(folder)) as path, safe_open(path, framework="pt") as file:
        keys = list(file.keys())
    sites = dict.fromkeys(named[0] for key in keys if (named := _split_key(key)) is not None)
    if not sites:
        raise UserError(f"{path}: no edits in it")
    return list(sites)


def _split_key(key: str) -> tuple[str, str] | None:
    """The module that a tensor of this name edits, and the vector's name; None: it is not part of an edit."""
    site, is_edit, vector = plain_name(key).removeprefix(PREFIX).rpartition(EDIT)
    return (site, vector) if is_edit else None


def write_adapter(adapter: Adapter) -> None:
    """Write `adapter` into `adapter.folder`, where `read_adapter` and `PeftModel.from_pretrained` read it back.

    The configuration is `adapter.config`, with the sites of the edits as its `target_modules`. Vectors are rounded to
    fp32: the scale after subtraction of its origin, the bias after division by its unit; the head is written as it is.
    Raises `UserError` for a folder that is not empty or cannot be written, for no edits, shapes that disagree and
    values that are not finite in fp32; nothing is left behind then.
    """
    if not adapter.edits:
        raise UserError(f"{adapter.folder}: no site is left to edit, so there is nothing to write")
    tensors = {f"{PREFIX}{key}": tensor.contiguous().clone() for key, tensor in adapter.head.items()}
    name = name_of_scale(adapter.config.get("scale_origin", 1.0))
    for site, edit in adapter.edits.items():
        unit = adapter.units[site]
        part = {name: edit.scale - abs(ORIGINS[name]), "bias": edit.bias / unit, "unit": torch.tensor([unit])}
        part = {key: tensor.float() for key, tensor in part.items()}
        _check_tensors(f"{adapter.folder}: {site}", part)
        tensors |= {f"{PREFIX}{site}{EDIT}{name}": tensor.contiguous().clone() for name, tensor in part.items()}
    config = {**adapter.config, "peft_type": "REDPEFT", "format": FORMAT, "resolved": True}
    config |= {"target_modules": sorted(adapter.edits), "scale_origin": abs(ORIGINS[name])}
    with new_folder(adapter.folder) as folder:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(
    base_model: nn.Module, folder: str | Path, *, is_trainable: bool = False, adapter_name: str = "default"
) -> PeftModel:
    """`PeftModel.from_pretrained` that refuses what PEFT would load with a warning only, or silently. A `PeftModel`
    gets one adapter more.

    Raises `UserError` for whatever `read_adapter` refuses, and for an adapter of another base model: other module
    names, other widths, a head of other shapes, or other weights (by fingerprint). The base is untouched then.
    """
    adapter, base_model = read_adapter(folder), compile_in_place(base_model)
    trained_on = adapter.config.get("base_model_name_or_path") or "a base model that it does not name"
    problem = _misfit(base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model, adapter)
    if problem:
        raise UserError(f"{adapter.folder}: this adapter is for another base model ({trained_on}): {problem}")
    if isinstance(base_model, PeftModel):
        base_model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
        return base_model
    return PeftModel.from_pretrained(base_model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of any PEFT type. `UserError`: no file, a pickle, or a damaged file."""
    with _weights(folder) as path:
        # not load_file: it maps the file into memory, and a file that is truncated meanwhile would end a server
        return load(path.read_bytes())


@contextmanager
def _weights(folder: Path) -> Iterator[Path]:
    """The file with an adapter's tensors. Errors while it is read become a `UserError`."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"; {', '.join(pickles)} may be a pickle, and redpeft reads safetensors only" if pickles else ""
        raise UserError(f"{folder}: no {WEIGHTS_NAME} there{found}")
    try:
        yield path
    except SafetensorError as error:
        raise UserError(f"{path}: corrupt or truncated, not a safetensors file ({error}); copy it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _with_plain_names(config: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes of a compiled model's names; a fingerprint of such names matches no plain model."""
    targets = config.get("target_modules")
    names = [plain_name(str(name)) for name in targets] if isinstance(targets, list) else targets
    return config if names == targets else {**config, "target_modules": names, "base_fingerprint": None}


def _check_keys(folder: Path, targets: Any, parts: dict[str, dict[str, torch.Tensor]]) -> str:
    """Check that every target has a site, every site has a target, and every site has its three tensors. Returns the
    name of the scale's tensors, which tells the version of the file."""
    if not targets or not isinstance(targets, list):
        raise UserError(f"{folder / CONFIG_NAME}: target_modules is not a list of the edited modules' names")
    name = next((name for name in ORIGINS if any(name in part for part in parts.values())), "scale_offset")
    expected = {name, "bias", "unit"}
    missing = [target for target in targets if not any(_matches(target, site) for site in parts)]
    missing += [f"{site}{EDIT}{each}" for site, part in parts.items() for each in sorted(expected - part.keys())]
    left_over = [site for site in parts if not any(_matches(target, site) for target in targets)]
    left_over += [f"{site}{EDIT}{each}" for site, part in parts.items() for each in sorted(part.keys() - expected)]
    for what, names in (
        ("has no tensors for", missing),
        (f"has tensors that {CONFIG_NAME} does not name:", left_over),
    ):
        if names:
            raise UserError(
                f"{folder / WEIGHTS_NAME}: {what} {shorten_list(names)}; the folder is damaged or was mixed up"
            )
    return name


def _matches(target: str, site: str) -> bool:
    """PEFT's rule: a full name, or the end of one (PEFT shortens long lists to common endings)."""
    return site == target or site.endswith(f".{target}")


def _check_tensors(where: str, part: dict[str, torch.Tensor]) -> None:
    """`part`: the scale, the bias and the unit by name."""
    bias, unit = part["bias"], part["unit"]
    if bias.ndim != 1 or unit.shape != (1,) or any(part[name].shape != bias.shape for name in part if name in ORIGINS):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in part.values())
        raise UserError(f"{where}: {', '.join(part)} should be of shapes (width,), (width,), (1,), not {shapes}")
    for name, tensor in part.items():
        if not tensor.float().isfinite().all():
            raise UserError(f"{where}: {name} has values that are not finite (NaN, or too large for fp32)")
    if unit <= 0:
        raise UserError(f"{where}: the unit is {unit.item():g}, and a unit is a positive number")
    if not (unit * bias).float().isfinite().all():
        raise UserError(f"{where}: the bias in units of {unit.item():g} is too large for fp32")


def _misfit(base_model: nn.Module, adapter: Adapter) -> str | None:
    """Why the adapter does not fit this base model, as the end of a sentence; None if it fits."""
    modules = dict(base_model.named_modules(remove_duplicate=False))
    unknown = [site for site in adapter.edits if site not in modules]
    if unknown:
        return f"this one ({type(base_model).__name__}) has no module {shorten_list(unknown)}"
    for site, edit in adapter.edits.items():
        module: Any = modules[site]
        width = output_width(module.get_base_layer() if hasattr(module, "get_base_layer") else module, base_model)
        if width != edit.scale.numel():
            return f"the output of {site} has width {width} here and {edit.scale.numel()} in the adapter"
    return _head_misfit(base_model, adapter) or fingerprint_difference(
        adapter.config.get("base_fingerprint"), fingerprint(base_model, adapter.edits)
    )


def _head_misfit(base_model: nn.Module, adapter: Adapter) -> str | None:
    state = base_model.state_dict()
    saved = tuple(adapter.config.get("modules_to_save") or ())
    heads = [name for name, _ in base_model.named_modules() if name.endswith(saved)] if saved else []
    expected = {key for key in state if any(key.startswith(f"{name}.") for name in heads)}
    if missing := sorted(expected - adapter.head.keys()):
        return f"the adapter has no tensors for its head {shorten_list(missing)}"
    for key, tensor in adapter.head.items():
        if key not in state:
            return f"this one ({type(base_model).__name__}) has no head {key}"
        if state[key].shape != tensor.shape:
            return f"the head {key} is {tuple(state[key].shape)} here and {tuple(tensor.shape)} in the adapter"
    return None
