"""Fleets: many edits of one base model trained in one step."""

from redpeft.fleet.adamw import Rates
from redpeft.fleet.crew import train_fleets
from redpeft.fleet.fleet import Fleet

__all__ = ["Fleet", "Rates", "train_fleets"]
