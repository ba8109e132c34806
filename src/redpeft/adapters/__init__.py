"""Adapters on disk: read, load and write them, list, describe, inspect, combine and fold them."""

from redpeft.adapters.files import Adapter, EffectiveEdit, load_adapter, read_adapter, write_adapter
from redpeft.adapters.listing import list_adapters

__all__ = ["Adapter", "EffectiveEdit", "list_adapters", "load_adapter", "read_adapter", "write_adapter"]
