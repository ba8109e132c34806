"""The PEFT layer of RED: wraps a module and edits its output.

                    ┌──────────────┐             ┌────────── redpeft_edit ──────────┐
    arguments ────> │  base_layer  │ ──── h ───> │ h' = scale * h + unit * bias     │ ──> h'
                    │   (frozen)   │             │ (one Edit per adapter, by name)  │
                    └──────────────┘             └──────────────────────────────────┘

The edit touches the output only, so it does not matter what computes it: a linear layer, a quantised one of any maker,
a mixture-of-experts block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from redpeft.errors import UserError
from redpeft.models import FLOATS, device_and_dtype
from redpeft.tuner.compose import Combination
from redpeft.tuner.config import RedConfig
from redpeft.tuner.edit import Edit, fold_edit

# Edits an output in place of a layer's active adapters: (hidden, with_bias) -> hidden, as `Edit.forward`.
Editor = Callable[[torch.Tensor, bool], torch.Tensor]


class RedLayer(nn.Module, BaseTunerLayer):
    """Edits the output of `base_layer`, whose last dimension is `width`.

    Parameters are named `redpeft_edit.<adapter>.scale_offset` and `.bias`. A base layer that returns a tuple (some
    mixture-of-experts blocks) has its first element edited. Several active adapters act one after another.
    """

    adapter_layer_names = ("redpeft_edit",)
    editor: Editor | None = None  # set by `replaced`

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RedConfig, *, width: int, site: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.redpeft_edit = nn.ModuleDict()
        self.width = width
        self.site = site
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        for name in ("original_weight", "original_bias"):  # while merged: they move and cast as the base layer does
            self.register_buffer(name, None, persistent=False)
        self.added: RemovableHandle | None = None  # the hook of `edit_too`
        if isinstance(base_layer, Conv1D):  # what PEFT's layers have, and other linears have of their own
            self.in_features, self.out_features = base_layer.weight.shape[0], base_layer.nf
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: RedConfig) -> None:
        """Add an adapter's edit, on the base layer's device. Its unit is a sibling's, if that has been measured: the
        unit describes the base layer's output, and TRL's reference adapter gets copies of the parameters alone."""
        device, dtype = device_and_dtype(self.get_base_layer())
        edit = Edit(
            self.width,
            unit=config.unit,
            origin=config.scale_origin,
            use_scale=config.use_scale,
            use_bias=config.use_bias,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            device=device,
        )
        measured = next((e for e in self.edits if e.auto_unit and not e.unit_pending), None)
        if edit.unit_pending and measured is not None:
            edit.express(unit=float(measured.unit))
        if not config.init_weights:
            edit.randomize()
        self.redpeft_edit[adapter_name] = edit.train(self.get_base_layer().training)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own looks for `weight`, which a mixture-of-experts block has not, and casts to the base's dtype.
        device = device or device_and_dtype(self.get_base_layer())[0]
        if adapter_name in self.redpeft_edit and not self.redpeft_edit[adapter_name].bias.is_meta:
            self.redpeft_edit[adapter_name].to(device)

    def set_scale(self, adapter: str, scale: float) -> None:
        """PEFT's name for an adapter's strength: 0 is the identity, 1 the edit as it was learned. Nothing stored
        changes, and nothing of it is saved. A layer without this adapter ignores it; a merged one refuses."""
        if self.merged:
            raise UserError("the strength of a merged adapter is fixed: call model.unmerge_adapter() first")
        if adapter in self.redpeft_edit:
            self.redpeft_edit[adapter].set_strength(float(scale))

    def combine(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination: Combination
    ) -> None:
        """Fill the edit of `adapter_name` with a combination of those of other adapters, in the first one's unit, or 1
        where not all of them have been measured."""
        pairs = zip(adapters, weights, strict=True)
        here = [(self.redpeft_edit[name], weight) for name, weight in pairs if name in self.redpeft_edit]
        if here:
            edits, used = zip(*here, strict=True)
            d, bias = combination([edit.difference for edit in edits], used)
            unit = torch.ones_like(edits[0].unit) if any(edit.unit_pending for edit in edits) else edits[0].unit
            combined = self.redpeft_edit[adapter_name]
            offset = d + (1 - combined.origin)
            combined.load_state_dict({combined.scale_name: offset, "bias": bias / unit, "unit": unit})

    @property
    def edits(self) -> list[Edit]:
        return list(self.redpeft_edit.values())

    @property
    def active_edits(self) -> list[Edit]:
        return [self.redpeft_edit[name] for name in self.active_adapters if name in self.redpeft_edit]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.merged and self.disable_adapters:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        if isinstance(output, tuple):
            return self._edit(output[0]), *output[1:]
        return self._edit(output)

    def _edit(self, hidden: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        if self.editor is not None:
            return self._edit_by_editor(hidden, with_bias)
        if self.disable_adapters or self.merged:
            return hidden
        for edit in self.active_edits:
            if not edit.unit_known and edit.training:
                self._check_unit(edit)
            hidden = edit(hidden, with_bias)
        return hidden

    @torch.compiler.disable  # or every editor would be compiled anew
    def _edit_by_editor(self, hidden: torch.Tensor, with_bias: bool) -> torch.Tensor:
        assert self.editor is not None
        return self.editor(hidden, with_bias)

    def _check_unit(self, edit: Edit) -> None:
        if edit.trainable and not edit.unit.is_meta and edit.unit_pending:
            raise UserError(
                f"the unit of the bias at {self.site} has not been measured: it was loaded for inference, or the "
                "base model's own forward was not called; call redpeft.calibrate(model) before training"
            )

    # One edit, two modules: GraniteMoeShared adds a shared expert to its experts in the block's own forward. The edit
    # of the sum is `scale * (h + g) + bias = (scale * h + bias) + scale * g`: by this layer, and by a hook on the
    # other module.

    def edit_too(self, module: nn.Module) -> None:
        """Let the edit act on the sum of this layer's output and `module`'s."""
        self.added = module.register_forward_hook(self._edit_added)

    def _edit_added(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self._edit(output, with_bias=False)

    # Merging. PEFT calls it merge; a merged layer is a folded one.

    def check_mergeable(self) -> None:
        """Raise `UserError` where the edit cannot be folded into the base layer's weights."""
        base = self.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)):
            reason = f"{type(base).__name__} is not a linear layer"
        elif type(base.weight) is not nn.Parameter or base.weight.dtype not in FLOATS:
            reason = f"the weights of {type(base).__name__} are quantised or sharded"
        else:
            return
        raise UserError(
            f"this model cannot be merged: {reason} (at {self.site}). Keep the adapter unmerged, which costs one pass "
            "over each edited output, or merge into the unquantised model"
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the adapters (the active ones by default) into the base layer's weight and bias.

        The arithmetic is fp32 (fp64 on an fp64 base) from the original weights, rounded once; a layer without a bias
        gets one if the adapters add anything. Raises `UserError` for a layer that cannot be folded, and with
        `safe_merge` for a result that is not finite in the layer's dtype; nothing is changed then.
        """
        if adapter_names is not None and not adapter_names:
            return  # PEFT's check would warn of a merged layer
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.redpeft_edit]
        if not names:
            return
        self.check_mergeable()
        base, (own_weight, own_bias) = self.get_base_layer(), self.originals
        transposed = isinstance(base, Conv1D)  # (in, out)
        weight, bias = own_weight.T if transposed else own_weight, own_bias
        for name in [*self.merged_adapters, *names]:
            weight, bias = fold_edit(weight, bias, *self.redpeft_edit[name].effective)
        weight = (weight.T if transposed else weight).to(own_weight.dtype).contiguous()
        if bias is not None:
            bias = bias.to(own_weight.dtype) if own_bias is not None or bias.any() else None  # none for scales alone
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise UserError(
                f"{self.site}: NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be "
                f"broken, or goes beyond the range of {weight.dtype}"
            )
        self.register_buffer("original_weight", own_weight, persistent=False)
        self.register_buffer("original_bias", own_bias, persistent=False)
        base.weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
        base.bias = None if bias is None else nn.Parameter(bias, requires_grad=base.weight.requires_grad)
        self.merged_adapters = [*self.merged_adapters, *names]

    @property
    def originals(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The base layer's weight and bias as they are without the adapters, merged or not."""
        base = self.get_base_layer()
        return (self.original_weight, self.original_bias) if self.merged else (base.weight, base.bias)

    def unmerge(self) -> None:
        """Put the original weight and bias back, bit for bit: dividing by a scale near 0 could not."""
        if not self.merged:
            return
        base = self.get_base_layer()
        for name in ("weight", "bias"):
            original = getattr(self, f"original_{name}")
            if original is not None and not isinstance(original, nn.Parameter):  # it was moved or cast meanwhile
                original = nn.Parameter(original.detach(), requires_grad=base.weight.requires_grad)
            setattr(base, name, original)
            self.register_buffer(f"original_{name}", None, persistent=False)
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Any:
        """What the model asks of the wrapped module (`in_features`, `gate`, `experts`, ...), that answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not yet set while copying or unpickling
                raise
            return getattr(self.base_layer, name)


def red_layers(model: nn.Module) -> dict[str, RedLayer]:
    """The layers of a model by their names; one that stands in several places once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RedLayer)}


def edits_of(model: nn.Module, adapter: str) -> dict[str, Edit]:
    """An adapter's edits, by the names of their layers."""
    layers = red_layers(model).items()
    return {name: layer.redpeft_edit[adapter] for name, layer in layers if adapter in layer.redpeft_edit}


@contextmanager
def replaced(name: str, values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """While inside, modules have these values as their attribute `name`: a layer's `editor`, or a head's `forward`."""
    before = {module: vars(module)[name] for module in values if name in vars(module)}
    for module, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for module in values:
            delattr(module, name)
        for module, value in before.items():
            setattr(module, name, value)
