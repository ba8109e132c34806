"""A trained edit as a thing on disk: read it, load it onto its base model, look into it, describe it."""

from redpeft.adapters.files import Adapter, Edit, find_adapter, find_run, load_adapter, read_adapter, write_adapter

__all__ = ["Adapter", "Edit", "find_adapter", "find_run", "load_adapter", "read_adapter", "write_adapter"]
