"""Do something once another package is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[], object]


def after_import(package: str, action: Action) -> None:
    """Call `action` as soon as `package` is whole: now if it is imported, else at the end of its import.

    `action` may be called twice, where two threads import at once.
    """
    module = sys.modules.get(package)
    spec = getattr(module, "__spec__", None)
    if module is None:
        sys.meta_path.insert(0, _Finder(package, action))
    elif getattr(spec, "_initializing", False):  # by another thread, or by what imports this module
        _Unfinished.watch(spec, action)
    else:
        action()


class _Finder(MetaPathFinder):
    """Finds the package as the other finders do, with the action behind its loader. Being asked alone, as by
    `importlib.util.find_spec`, does nothing. When all is done it stays: to take it out of `sys.meta_path` would make
    other threads, which walk through that list, miss a finder."""

    def __init__(self, package: str, action: Action) -> None:
        self.package, self.action, self.done = package, action, False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.package or self.done:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _Finder))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """The package's own loader, which the module gets back before it runs."""

    def __init__(self, own: Any, finder: _Finder) -> None:
        self.own, self.finder = own, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        self.finder.action()
        self.finder.done = True


class _Unfinished(ModuleSpec):
    """The spec of a module whose import has begun: importlib sets its `_initializing` to False at the end."""

    @classmethod
    def watch(cls, spec: Any, action: Action) -> None:
        spec.__dict__["action"] = action
        spec.__class__ = cls
        if not spec._initializing:  # it ended meanwhile
            action()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if self.name in sys.modules:  # it did not fail
                self.__dict__.pop("action")()
