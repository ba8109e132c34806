"""The model that an adapter belongs to, without its weights: its class, and a head of the adapter's labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from redpeft.adapters.card import AUTO_CLASS
from redpeft.adapters.files import Adapter
from redpeft.errors import UserError
from redpeft.models import on_meta
from redpeft.storage import TASK


def outline(adapter: Adapter, config: PretrainedConfig, run: Path) -> PreTrainedModel:
    """The adapted model on the meta device, as the class that the adapter's task type says.

    The labels of its head have the names in `run`/task.json, if that is there. Raises `UserError` for a head that no
    number of labels fits.
    """
    model_class = _model_class(adapter, config)
    task = json.loads((run / TASK).read_text(encoding="utf-8")) if (run / TASK).is_file() else {}
    if names := task.get("label_names"):
        config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    if kind := task.get("problem_type"):
        config.problem_type = kind
    sizes = sorted({len(tensor) for tensor in adapter.head.values() if tensor.ndim})
    for labels in [config.num_labels, *sizes]:
        if labels != config.num_labels:
            config.num_labels = labels
        model = on_meta(model_class, config)
        state = model.state_dict()
        if all(key in state and state[key].shape == tensor.shape for key, tensor in adapter.head.items()):
            return model
    raise UserError(f"the head of {adapter.folder} ({', '.join(adapter.head)}) does not fit {type(model).__name__}")


def _model_class(adapter: Adapter, config: PretrainedConfig) -> Any:
    task, mapping = adapter.config.get("task_type"), adapter.config.get("auto_mapping") or {}
    named = [mapping.get("base_model_class"), *(config.architectures or [])]
    if task in AUTO_CLASS:
        return getattr(transformers, AUTO_CLASS[task])
    return next((getattr(transformers, name) for name in named if name and hasattr(transformers, name)), AutoModel)
