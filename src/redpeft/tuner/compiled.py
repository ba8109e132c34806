"""Names without what `torch.compile` puts into them.

`torch.compile(module)` wraps the module, and all names in it get `_orig_mod.` in front: an adapter with such names
would fit compiled models only. `module.compile()` compiles the same module in place and leaves its names alone.
"""

from __future__ import annotations

from torch import nn

WRAPPED = "_orig_mod"  # torch's name of what a compiled module wraps


def plain_name(name: str) -> str:
    """A name as in the model that is not compiled, of a module or of a tensor."""
    return ".".join(part for part in name.split(".") if part != WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or this one."""
    while WRAPPED in module._modules:
        module = module._modules[WRAPPED]  # type: ignore[assignment]
    return module


def compile_in_place(model: nn.Module) -> nn.Module:
    """The model with every wrapper of `torch.compile` taken off, and the modules within compiled in place in the same
    way. It computes what it did before; the model that is returned is that within its own wrapper."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if WRAPPED in child._modules and name != WRAPPED:
                setattr(parent, name, _in_place(child))
    return _in_place(model)


def _in_place(module: nn.Module) -> nn.Module:
    inner = unwrapped(module)
    if inner is not module:
        inner._compiled_call_impl = module.dynamo_ctx(inner._call_impl)  # what `inner.compile(...)` sets
    return inner
