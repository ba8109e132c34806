"""Row by row the same as torch.optim.AdamW."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redpeft.fleet.adamw import Rates, adamw, clip

rates = st.floats(1e-4, 1.0)
jobs = st.lists(st.tuples(rates, st.sampled_from([0.0, 0.01, 0.3]), st.integers(1, 6)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(jobs=jobs, seed=st.integers(0, 1000), numbers=st.integers(1, 7))
def test_every_row_is_a_run_of_its_own(jobs, seed, numbers):
    """Rows with their own rate, decay and number of steps, of gradients that span ten orders of magnitude."""
    torch.manual_seed(seed)
    start = torch.randn(len(jobs), numbers, dtype=torch.float64) * 10
    gradients = torch.randn(6, len(jobs), numbers, dtype=torch.float64) * 10 ** torch.empty(6, 1, numbers).uniform_(
        -8, 2
    )
    values, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    rate = torch.tensor([[job[0]] for job in jobs], dtype=torch.float64)
    decay = torch.tensor([[job[1]] for job in jobs], dtype=torch.float64).expand(-1, numbers)
    for step in range(1, 7):
        taking = [row for row, job in enumerate(jobs) if step <= job[2]]
        rows = [table[taking] for table in (values, first, second)]
        adamw(*rows, gradients[step - 1][taking], torch.full((len(taking), 1), step), rate[taking], decay[taking])
        for table, row in zip((values, first, second), rows, strict=True):
            table[taking] = row
    for row, (lr, weight_decay, steps) in enumerate(jobs):
        alone = start[row].clone().requires_grad_()
        optimiser = torch.optim.AdamW([alone], lr=lr, weight_decay=weight_decay)
        for step in range(steps):
            alone.grad = gradients[step][row]
            optimiser.step()
        torch.testing.assert_close(values[row], alone.detach(), rtol=1e-12, atol=1e-12)


def test_without_decay():
    values = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    first, second = torch.zeros_like(values), torch.zeros_like(values)
    adamw(
        values,
        first,
        second,
        torch.tensor([[3.0, -1e-3]], dtype=torch.float64),
        torch.tensor([[1]]),
        torch.tensor([[0.1]]),
    )
    torch.testing.assert_close(values, torch.tensor([[0.9, -1.9]], dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 3.0, 1e9])
def test_every_row_is_clipped_by_its_own_norm(max_norm):
    torch.manual_seed(0)
    gradient = torch.randn(3, 50) * torch.tensor([[1e-3], [1.0], [1e4]])
    clipped = clip(gradient, torch.tensor([[max_norm]] * 3))
    for row, own in zip(gradient, clipped, strict=True):
        parameter = torch.nn.Parameter(torch.zeros(50))
        parameter.grad = row.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        torch.testing.assert_close(own, parameter.grad)


def test_rates_of_several_jobs_are_columns():
    stacked = Rates.stack([Rates(0.1, 0.2), Rates(0.3, 0.4, 0.5, 0.6)], torch.zeros(1, dtype=torch.float64))
    assert stacked.edit.tolist() == [[0.1], [0.3]]
    assert stacked.max_grad_norm.tolist() == [[0.0], [0.6]]
    assert stacked.weight_decay.shape == (2, 1)
