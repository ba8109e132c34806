"""Fleets: many edits of one base model trained in one step."""

from redpeft.fleet.adamw import Rates
from redpeft.fleet.fleet import Fleet
from redpeft.fleet.scheduler import train_fleets

__all__ = ["Fleet", "Rates", "train_fleets"]
