"""Whether an adapter was trained on the base model that is served, as far as that one's files tell."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel

from redpeft.adapters import Adapter
from redpeft.adapters.fold.base import checkpoint_fingerprint
from redpeft.adapters.fold.checkpoint import Checkpoint
from redpeft.adapters.fold.names import Names
from redpeft.errors import UserError, first_line
from redpeft.models import fingerprint_difference
from redpeft.serving.sites import empty_model

logger = logging.getLogger("vllm.redpeft")


class Base:
    """The served base model. `name` is its folder, or its name on the Hub, whose files the engine has downloaded.

    The engine's own weights are cast, split and packed; those on disk are what a fingerprint was taken of. Of these
    some 32 numbers are read, once for all adapters that edit the same sites.
    """

    def __init__(self, name: str, config: PretrainedConfig, revision: str | None = None, cache: str | None = None):
        self.name, self.config, self.revision, self.cache = name, config, revision, cache
        self._known: dict[frozenset[tuple[str, str]], dict | None] = {}

    def check(self, adapter: Adapter, sites: Mapping[str, str]) -> None:
        """Refuse an adapter of other weights (`UserError`). What cannot be compared is let through, with a word in the
        log. `sites`: the modules that the adapter edits, by its own names of them."""
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
    def _files(self) -> tuple[PreTrainedModel, Checkpoint, Names]:
        model, checkpoint = empty_model(self.config), Checkpoint(self._folder())
        return model, checkpoint, Names(checkpoint.keys, model)

    def _folder(self) -> Path:
        folder = Path(self.name)
        if folder.is_dir():
            return folder
        return Path(snapshot_download(self.name, revision=self.revision, cache_dir=self.cache, local_files_only=True))
