"""The paper's method as a PEFT tuner.

edit.py        the edit: two vectors a site, and the arithmetic
config.py      what to edit and how
layer.py       the layer that wraps a module and edits its output
model.py       the tuner: puts layers on a model, merges, mixes, loads
sites.py       where to edit
units.py       how far a step of the bias goes
mixed.py       batches that mix adapters
compose.py     sums and sequences of edits
heads.py       modules that are trained in full and saved beside the edits
first_step.py  warnings at the first step of an optimiser
register.py    makes RED a method that PEFT knows
"""

from redpeft.tuner.config import RedConfig
from redpeft.tuner.layer import RedLayer
from redpeft.tuner.model import RedModel
from redpeft.tuner.register import register
from redpeft.tuner.sites import Site, find_sites
from redpeft.tuner.units import calibrate

register(RedConfig, RedModel)

__all__ = ["RedConfig", "RedLayer", "RedModel", "Site", "calibrate", "find_sites"]
