"""The unit of the bias: the typical size of the output that it is added to.

    unit = 1.4826 * median |h|     over channels and positions

1.4826 times the median of |h| is the standard deviation of a normal sample. It is a median because a few outlier
channels, 20 to 40 times the rest and more, are common in transformers and would set a root mean square.
"""

from __future__ import annotations

import torch

from redpeft.errors import UserError

MAX_VALUES = 2**20
STD_PER_MEDIAN = 1.4826


@torch.compiler.disable
@torch.no_grad()
def typical_size(hidden: torch.Tensor, site: str) -> torch.Tensor:
    """The unit of a site from its output: hidden (..., width) -> () in hidden's precision, at least fp32.

    Taken from at most about a million values (whole positions, evenly spaced), and the mean over the ranks of a
    distributed run, so that all of them hold the same. Values that are exactly zero (padding, a ReLU) say nothing of
    the size and are left out where they are the majority. Raises `UserError` for an output that is zero everywhere.
    """
    positions = hidden.detach().reshape(-1, hidden.shape[-1])
    every = max(1, -(-positions.numel() // MAX_VALUES))
    sizes = positions[::every].abs().flatten().to(torch.promote_types(hidden.dtype, torch.float32))
    median = sizes.median()
    if median == 0 and bool(sizes.any()):
        median = sizes[sizes > 0].median()
    unit = STD_PER_MEDIAN * _mean_over_ranks(median)
    if not bool(torch.isfinite(unit)) or unit == 0:
        what = "zero everywhere" if unit == 0 else "not finite"
        raise UserError(
            f"the output of {site} is {what}, so the bias has no unit there: "
            "give the unit as a number (unit=1), or leave the module out with exclude_modules"
        )
    # An automatic unit of exactly 1 means "not measured yet" (see Edit).
    return unit if unit != 1 else torch.nextafter(unit, torch.full_like(unit, 2.0))


def _mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()
