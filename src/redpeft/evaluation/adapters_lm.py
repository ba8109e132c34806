"""Adapters as a model of EleutherAI's lm-evaluation-harness. Importing this module registers it there as `redpeft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from peft import PeftModel

from redpeft.evaluation.language_model import attach, detach, load_language_model
from redpeft.models import positions


@register_model("redpeft")
class AdaptersLM(HFLM):
    """lm-eval's own model of transformers: one base model, on which adapters of any PEFT type come and go.

    Args:
        pretrained: folder or hub name of the base model.
        adapter: what is on it at first; None is the base model alone.
        batch_size: requests computed together, or "auto".
        kwargs: HFLM's, of those that do not say how to load a model.

    Raises `UserError` for a base model or adapter that cannot be loaded, or that do not belong together.
    """

    _model: Any
    _max_length: int | None

    def __init__(
        self, pretrained: str, adapter: str | Path | None = None, batch_size: int | str = 8, **kwargs: Any
    ) -> None:
        base, tokenizer = load_language_model(pretrained)
        super().__init__(base, tokenizer=tokenizer, batch_size=batch_size, **kwargs)
        self._asked_length = self._max_length
        self.pretrained = pretrained  # its name, by which lm-eval looks up the revision
        self.use(adapter)

    def use(self, adapter: str | Path | None) -> None:
        """Remove the adapter that is on the base model, and put `adapter` on it, if any."""
        if isinstance(self._model, PeftModel):
            self._model = detach(self._model)
        if adapter is not None:
            self._model = attach(self._model, adapter)
        own = positions(self._model)  # fewer where the adapter has virtual tokens
        self._max_length = min((length for length in (self._asked_length, own and own.tokens) if length), default=None)
