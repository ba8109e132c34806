"""Which modules of a base model get a table, and which of the engine's modules they are.

Adapters name a site by its path in transformers' model (`model.layers.0.mlp.down_proj`). An engine has a model of its
own, whose modules mostly have the same paths, after the renaming that it does for its checkpoints, and below another
first name (`roberta.encoder` for `encoder`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PretrainedConfig, PreTrainedModel

from redpeft.errors import UserError, first_line
from redpeft.models import checkpoint_class, on_meta, output_width
from redpeft.tuner.sites import find_sites


def widths_of_sites(config: PretrainedConfig, sites: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """The width of each site to edit, by its path in transformers' model of this configuration; and of the sites that
    it does not have, why they cannot be edited.

    `sites`: kinds ("ffn", "attention", "qkv"), or paths. Raises `UserError` for a model that transformers cannot
    build, and one that has no such kinds.
    """
    model = empty_model(config)
    kinds = [site for site in sites if "." not in site]
    found = {site.name: site.width for site in find_sites(model, kinds)} if kinds else {}
    modules = dict(model.named_modules(remove_duplicate=False))
    lacking = {}
    for path in (site for site in sites if "." in site):
        name = find_module(path, modules)
        if name is None:
            lacking[path] = f"{type(model).__name__} has no module {path} to edit"
        else:
            found[path] = output_width(modules[name], model)
    return found, lacking


def find_module(path: str, names: Collection[str]) -> str | None:
    """The one of these names that a path means: itself, or else the only one that ends with it, or it with the name.

    None where there is none or where there are several.
    """
    if path in names:
        return path
    alike = [name for name in names if _same_end(name, path) or _same_end(path, name)]
    return alike[0] if len(alike) == 1 else None


def _same_end(longer: str, shorter: str) -> bool:
    """Whether a path ends with another that names its block (a number): `dense` alone could be anything."""
    return longer.endswith(f".{shorter}") and any(part.isdigit() for part in shorter.split("."))


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The base model without its weights, as transformers has it. `UserError`: it cannot be built."""
    try:
        return on_meta(checkpoint_class(config), config)
    except Exception as error:  # whatever a model's own code does with a configuration
        raise UserError(f"transformers cannot build {config.architectures}: {first_line(error)}") from error
