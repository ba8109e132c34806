"""The base model that is served: where it can be edited, and whether an adapter was trained on it.

Adapters name a site by its path in transformers' model (`model.layers.0.mlp.down_proj`). The engine has its own model.
Most of its modules have the same paths, after the renaming that it does for checkpoints and below another first name
(`roberta.encoder` for `encoder`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel

from redpeft.adapters import Adapter
from redpeft.adapters.checkpoint import Checkpoint, KeyMap, checkpoint_fingerprint
from redpeft.errors import UserError, first_line
from redpeft.models import checkpoint_class, find_base, fingerprint_difference, on_meta, output_width
from redpeft.tuner.sites import find_sites

logger = logging.getLogger("vllm.redpeft")


def engine_folder(base: str | Path) -> Path:
    """The folder of a base model that vLLM can load, or its name on the Hub. `UserError`: it is a GGUF file."""
    files = find_base(base)
    if files.gguf_file is not None:
        raise UserError(
            f"{base} is a GGUF file, which vLLM cannot serve with adapters: write a folder first with redpeft "
            f"export-base {base} --out FOLDER, and give that as the base"
        )
    return files.folder


class ServedBase:
    """The served base model. `name` is its folder, or its name on the Hub, whose files the engine has downloaded.

    Fingerprints are compared with the files, since the engine casts, splits and packs the weights in memory. Some 32
    numbers are read from the files, once for all adapters that edit the same sites.
    """

    def __init__(self, name: str, config: PretrainedConfig, revision: str | None = None, cache: str | None = None):
        self.name, self.config, self.revision, self.cache = name, config, revision, cache
        self._known: dict[frozenset[tuple[str, str]], dict | None] = {}

    def check(self, adapter: Adapter, sites: Mapping[str, str]) -> None:
        """Refuse an adapter that was trained on other weights (`UserError`). Where this cannot be known the adapter is
        accepted, and the log says so. `sites`: the edited modules, by the adapter's names of them."""
        saved = adapter.config.get("base_fingerprint")
        if saved and (differs := fingerprint_difference(saved, self._fingerprint(sites))):
            raise UserError(f"{adapter.folder} is for another base model than {self.name}: {differs}")

    def _fingerprint(self, sites: Mapping[str, str]) -> dict | None:
        key = frozenset(sites.items())
        if key not in self._known:
            found, why = None, "its weights are quantised, or a mixture of experts"
            try:
                found = checkpoint_fingerprint(sites, *self._files)
            except (UserError, OSError, ValueError) as error:
                why = first_line(error)
            if found is None:
                logger.info("adapters of another base model than %s cannot be detected: %s", self.name, why)
            self._known[key] = found
        return self._known[key]

    @cached_property
    def _files(self) -> tuple[PreTrainedModel, Checkpoint, KeyMap]:
        model, checkpoint = empty_model(self.config), Checkpoint(self._folder())
        return model, checkpoint, KeyMap(checkpoint.keys, model)

    def _folder(self) -> Path:
        folder = Path(self.name)
        if folder.is_dir():
            return folder
        return Path(snapshot_download(self.name, revision=self.revision, cache_dir=self.cache, local_files_only=True))


def widths_of_sites(config: PretrainedConfig, sites: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """The output width of each site, by its path in transformers' model of this configuration; and, by path, why the
    other sites cannot be edited.

    `sites`: kinds ("ffn", "attention", "qkv"), or paths. Raises `UserError` for a model that transformers cannot
    build, and for one without sites of these kinds.
    """
    model = empty_model(config)
    kinds = [site for site in sites if "." not in site]
    found = {site.name: site.width for site in find_sites(model, kinds)} if kinds else {}
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = {}
    for path in (site for site in sites if "." in site):
        name = find_module(path, modules)
        if name is None:
            missing[path] = f"{type(model).__name__} has no module {path} to edit"
        else:
            found[path] = output_width(modules[name], model)
    return found, missing


def find_module(path: str, names: Collection[str]) -> str | None:
    """The name that a path means: the equal one, or else the only one of which one ends with the other.

    None where there is no such name, or more than one.
    """
    if path in names:
        return path
    alike = [name for name in names if _ends_with_block(name, path) or _ends_with_block(path, name)]
    return alike[0] if len(alike) == 1 else None


def _ends_with_block(longer: str, shorter: str) -> bool:
    """Whether a path ends with another that has its block's number: `dense` alone could be any module."""
    return longer.endswith(f".{shorter}") and any(part.isdigit() for part in shorter.split("."))


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The base model without its weights, as transformers builds it. `UserError`: it cannot be built."""
    try:
        return on_meta(checkpoint_class(config), config)
    except Exception as error:  # a model's own code can raise anything
        raise UserError(f"transformers cannot build {config.architectures}: {first_line(error)}") from error
