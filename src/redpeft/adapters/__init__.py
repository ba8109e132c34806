"""Trained adapters on disk.

folder.py       an adapter folder: the one reader, the one writer, and loading onto a base model
listing.py      the adapters below a folder
card.py         the model card
stats.py        what an adapter has learned, how two differ, how large one would be
arithmetic.py   sums, sequences and inverses of adapters
released.py     checkpoints of the paper's own code
checkpoint.py   a base model's checkpoint on disk, tensor by tensor
fold/           an adapter becomes part of its base model
"""

from redpeft.adapters.folder import Adapter, EffectiveEdit, load_adapter, read_adapter, write_adapter
from redpeft.adapters.listing import list_adapters

__all__ = ["Adapter", "EffectiveEdit", "list_adapters", "load_adapter", "read_adapter", "write_adapter"]
