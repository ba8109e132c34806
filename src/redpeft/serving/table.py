"""The edits of a server's adapters at one site, and which of them each token gets.

    rows (slots + 1, 2, width)  ──gather by token──>  (tokens, 2, width)  ──>  h'[t] = scale[t] * h[t] + bias[t]

One gather and one multiply-add, whatever the number of adapters. The table and the tokens' slots keep their addresses
in memory and are filled in place, so that the edit can be compiled and captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from redpeft.adapters import EffectiveEdit
from redpeft.tuner.edit import apply_edit


class SlotTable(nn.Module):
    """`rows`: fp32 (slots + 1, 2, width), a scale and a bias each. The last row, index -1, is the identity.

    `token_slots`: integers (most tokens of a batch,); the first ones are the slots of the batch's tokens, -1 for none.
    `partial`: the site's output is this rank's part of a sum; another rank adds the biases.
    """

    rows: torch.Tensor

    def __init__(self, slots: int, width: int, token_slots: torch.Tensor, partial: bool = False) -> None:
        super().__init__()
        self.width = width
        self.partial = partial
        self.token_slots = token_slots
        rows = torch.empty(slots + 1, 2, width, dtype=torch.float32, device=token_slots.device)
        self.register_buffer("rows", rows, persistent=False)
        for slot in range(slots + 1):
            self.fill(slot, None)

    @torch.no_grad()
    def fill(self, slot: int, edit: EffectiveEdit | None) -> None:
        """Put an edit into a slot; None is the identity.

        The identity's bias is -0.0, which leaves every number as it is; +0.0 would turn -0.0 into 0.0.
        """
        scale, bias = self.rows[slot]
        if edit is None:
            scale.fill_(1.0)
            bias.fill_(-0.0)
            return
        scale.copy_(edit.scale)
        if self.partial:
            bias.fill_(-0.0)
        else:
            bias.copy_(edit.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., width): each token's edit applied, in hidden's dtype. The tokens are in the order of
        `token_slots`, in one dimension or, where the engine runs transformers' own model, in two."""
        tokens = hidden.reshape(-1, self.width)
        edits = self.rows[self.token_slots[: tokens.shape[0]]]
        return apply_edit(tokens, edits[:, 0], edits[:, 1]).reshape(hidden.shape)

    def added_hook(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """The forward hook of a module whose output g the model adds to the site's output h: it scales g, so that with
        `hook` on h the sum is `scale * (h + g) + bias`."""
        tokens = output.reshape(-1, self.width)
        scales = self.rows[self.token_slots[: tokens.shape[0]], 0]
        return (tokens * scales).to(output.dtype).reshape(output.shape)

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook of the site's module. The engine's linear layers return their output and a bias that is
        still to be added; `check_site` has refused modules with such a bias."""
        if isinstance(output, tuple):
            return self(output[0]), *output[1:]
        return self(output)
