"""What a checkpoint on disk tells of a base model, to be compared with what an adapter says of its own."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from redpeft.adapters.fold.checkpoint import Checkpoint
from redpeft.adapters.fold.names import Names
from redpeft.adapters.fold.plan import is_quantised
from redpeft.models import fingerprint_of


def checkpoint_fingerprint(
    sites: Mapping[str, str], model: PreTrainedModel, checkpoint: Checkpoint, names: Names
) -> dict | None:
    """As `fingerprint`, of a checkpoint's tensors, of which only the sampled values are read.

    `sites`: an adapter's names of the edited modules, and those of `model`, which needs no weights. None where it
    cannot be computed: quantised weights, modules without a weight of their own (mixtures of experts). Raises
    `UserError` where a tensor cannot be told, as `Names.find` does.
    """
    found = sites.values()
    plain = all(hasattr(model.get_submodule(site), "weight") for site in found)
    if not plain or any(is_quantised(model.config, site) for site in found):
        return None
    return fingerprint_of({name: checkpoint.read(names.find(f"{site}.weight")) for name, site in sites.items()})
