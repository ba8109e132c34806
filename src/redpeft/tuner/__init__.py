"""The paper's method: the edit, the PEFT tuner around it, where to edit (sites) and how far a step goes (units)."""

from redpeft.tuner.config import RedConfig
from redpeft.tuner.layer import RedLayer
from redpeft.tuner.model import RedModel
from redpeft.tuner.register import register
from redpeft.tuner.sites import Site, find_sites
from redpeft.tuner.units import calibrate

register(RedConfig, RedModel)

__all__ = ["RedConfig", "RedLayer", "RedModel", "Site", "calibrate", "find_sites"]
