"""What to edit and how: the configuration of one RED adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from redpeft.errors import UserError
from redpeft.models import plain_name
from redpeft.tuner.register import REDPEFT
from redpeft.tuner.sites import site_kinds

FORMAT = 2  # of adapter folders: docs/reference/adapter-format.md


@dataclass
class RedConfig(PeftConfig):
    """Configuration of RED, Representation EDiting (arXiv 2402.15179): `h' = scale * h + unit * bias` at each site.

    Args:
        sites: Where to edit: 'ffn' (the FFN's output, the paper's choice and the default), 'attention' (the
            attention's output projection), 'qkv' (its query, key and value projections), a list of these (or
            'ffn,qkv'), or 'red+' (all five, the paper's enhanced variant). Found by structure in self-attention
            blocks.
        target_modules: Names of the modules to edit instead of `sites`: PEFT's rules (a list of names or name
            endings, or one regular expression). Once the adapter is in a model: the full names of the edited modules.
        exclude_modules: Names of modules to leave out, by PEFT's rules (a list of endings, or one expression).
        layers_to_transform: Indices of the blocks to edit; all of them when not given.
        use_scale: Learn the scale (False: the paper's bias-only ablation).
        use_bias: Learn the bias (False: the paper's scale-only ablation).
        unit: The unit in which the bias is learned. 'auto': the typical size of the output that it is added to,
            measured in the first training forward; a number: that number (1 is the paper's own rule).
        scale_origin: What the scale is counted from: 1, so that weight decay leads to the identity, or 0, the paper's
            own rule (for its weight decay, and for optimisers that scale a step by a parameter's size). The scale is
            learned as `scale_origin + scale_offset`.
        modules_to_save: Modules to train in full and save beside the edits, such as a new head.
        init_weights: Start as the identity (scale 1, bias 0). False: random edits, for tests only.
        resolved: Set by redpeft: `target_modules` holds the full names of the edited modules.
        base_fingerprint: Set by redpeft: tells the base model's weights from others of the same shape.
        unit_measured: Set by redpeft: the units of an automatic `unit` have been measured.
        format: Set by redpeft: the version of the adapter's files, 2 for those of today.

    Raises `UserError` for choices that contradict each other or leave nothing to learn.
    """

    sites: str | list[str] | None = None
    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    use_scale: bool = True
    use_bias: bool = True
    unit: float | str = "auto"
    scale_origin: float = 1.0
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    resolved: bool = False
    base_fingerprint: dict | None = None
    unit_measured: bool = False
    format: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = REDPEFT
        if isinstance(self.sites, str) and "," in self.sites:
            self.sites = [kind.strip() for kind in self.sites.split(",")]
        if self.format is None:  # version 1 did not store its version, but the full names of its modules
            self.format = 1 if self.resolved else FORMAT
        check_format(self.format)
        if self.format == 1:
            self.scale_origin = 0.0
        self._check_where()
        if not (self.use_scale or self.use_bias):
            raise UserError("use_scale and use_bias are both False: nothing would be learned; set one of them")
        if self.unit != "auto" and not _is_positive_number(self.unit):
            raise UserError(f"unit must be 'auto' or a positive number, not {self.unit!r}")
        if self.scale_origin not in (0, 1):
            raise UserError(f"scale_origin must be 1, or 0 for the paper's own rule, not {self.scale_origin!r}")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            names = {plain_name(name) for name in self.target_modules}
            if self.resolved and names != set(self.target_modules):
                self.base_fingerprint = None  # it was taken with the names of a compiled model
            self.target_modules = names
        self._model_configs: dict[str, PeftConfig] = {}  # all configurations of the model that this one belongs to
        self._resolved: dict[str, tuple[Any, Any]] = {}  # by field: the value asked for, and the one set by `resolve`

    def _check_where(self) -> None:
        """Check the fields that say where to edit."""
        if self.target_modules is not None and not self.target_modules:
            raise UserError("target_modules is empty: name at least one module, or leave it out and choose sites")
        if self.layers_to_transform is not None and self.layers_to_transform in ([], ()):
            raise UserError("layers_to_transform is empty: name at least one block, or leave it out for all of them")
        if self.sites is not None and self.target_modules is not None and not self.resolved:
            raise UserError(
                f"sites={self.sites!r} and target_modules={self.target_modules!r} both say where to edit; give one"
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str) and not self.resolved:
            raise UserError("layers_to_transform has no effect on a target_modules expression; put the blocks into it")
        if self.sites is None and self.target_modules is None:
            self.sites = "ffn"
        if self.sites is not None:
            site_kinds(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's, with each head once: PEFT adds the heads of a task again whenever it is given the object."""
        heads = self.modules_to_save
        return {**super().to_dict(), "modules_to_save": heads and list(dict.fromkeys(heads))}

    def enter_model(self, configs: dict[str, PeftConfig], adapter_name: str) -> None:
        """Become the configuration of an adapter of a model, whose configurations are `configs`.

        PEFT keeps the caller's object, which may belong to another adapter already. That adapter gets a copy, and the
        fields that `resolve` has set go back to what was asked for.
        """
        for name, config in self._model_configs.items():
            if config is self:
                self._model_configs[name] = copy.copy(self)
        for name, (asked, found) in self._resolved.items():
            if getattr(self, name) == found:  # the caller may have set another value since
                setattr(self, name, asked)
        self._model_configs, self._resolved = configs, {}
        configs[adapter_name] = self

    def resolve(self, **found: Any) -> None:
        """Set fields to what was found in the model, and remember what was asked for."""
        for name, value in found.items():
            asked, _ = self._resolved.get(name, (getattr(self, name), None))
            self._resolved[name] = asked, value
            setattr(self, name, value)


def check_format(version: Any, where: str = "") -> None:
    """Raise `UserError`, which begins with `where`, for the files of a later version. `version`: `format` in them."""
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(
            f"{where}an adapter of format {version}, and this redpeft reads formats up to {FORMAT}: upgrade redpeft"
        )


def _is_positive_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
