"""A trained edit as a thing on disk: read it, load it onto its base model, look into it, describe it, pack many."""

from redpeft.adapters.files import Adapter, EffectiveEdit, load_adapter, read_adapter, write_adapter
from redpeft.adapters.listing import list_adapters
from redpeft.adapters.pack import open_pack, unpack_adapters
from redpeft.adapters.packing import pack_adapters

__all__ = [
    "Adapter",
    "EffectiveEdit",
    "list_adapters",
    "load_adapter",
    "open_pack",
    "pack_adapters",
    "read_adapter",
    "unpack_adapters",
    "write_adapter",
]
