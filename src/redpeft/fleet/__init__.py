"""Fleets: many edits of one base model, trained in one step.

fleet.py            the table of slots, and its passes
stacked_heads.py    heads of many jobs in one call
adamw.py            AdamW for many jobs; losses.py: the loss of each row
memory.py           how many slots fit into memory
template_model.py   the model on which jobs are prepared, and which recipes a fleet can train
queue.py            the queue that jobs come from, with successive halving
job.py              one job as it trains, and its checkpoint
scheduler.py        trains the jobs of a queue: fills slots, chooses batches
"""

from redpeft.fleet.adamw import Rates
from redpeft.fleet.fleet import Fleet
from redpeft.fleet.scheduler import train_fleets

__all__ = ["Fleet", "Rates", "train_fleets"]
