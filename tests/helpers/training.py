"""A few steps of training, for tests of what moves."""

from __future__ import annotations

from typing import Any

import torch


def learn(model: torch.nn.Module, rate: float, steps: int, **inputs: Any) -> set[str]:
    """Train on one batch and check that the loss falls: the names of the parameters that moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
