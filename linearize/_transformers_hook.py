"""Lets `AutoModelForCausalLM` load saved students after `import linearize`, without importing transformers for it.

transformers takes seconds to import and many users of `linearize` never need it. So the registration waits: when
transformers' own registry of configs is imported, now or later, `linearize.modeling.register` runs right after it.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["install"]

_REGISTRY = "transformers.models.auto.configuration_auto"


class _Then(Loader):
    """A loader that runs the real one and then registers."""

    def __init__(self, real: Any):
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Finder(MetaPathFinder):
    """Finds the registry as everybody else would, and only that."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            spec.loader = _Then(spec.loader)
        return spec


def _register(registry: ModuleType) -> None:
    """Put the reader of saved students into transformers' registry of configs."""
    # The class is not imported here: this runs in the middle of transformers' import, and it needs most of it.
    registry.CONFIG_MAPPING._extra_content.setdefault("linearize", _LazyConfig)


class _LazyConfig:
    """Stands in the registry for `linearize.modeling.SavedStudentConfig` until somebody reads a checkpoint."""

    __module__ = __name__
    model_type = "linearize"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from linearize.modeling import SavedStudentConfig

        return SavedStudentConfig.from_dict(config_dict, **kwargs)


def install() -> None:
    """Register now if transformers is there, else as soon as it is."""
    registry = sys.modules.get(_REGISTRY)
    if registry is not None:
        _register(registry)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
