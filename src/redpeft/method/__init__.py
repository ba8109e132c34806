"""The paper's method: the edit, the PEFT tuner around it, where to edit (sites) and how far a step goes (units)."""

from redpeft.method.config import RedConfig
from redpeft.method.layer import RedLayer
from redpeft.method.model import RedModel
from redpeft.method.register import register
from redpeft.method.sites import Site, find_sites
from redpeft.method.units import calibrate

register(RedConfig, RedModel)

__all__ = ["RedConfig", "RedLayer", "RedModel", "Site", "calibrate", "find_sites"]
