"""Turn a pretrained causal language model into one whose attention keeps a fixed-size memory.

The names below load on first use: `import linearize` itself costs milliseconds and imports none of the heavy
libraries. Start with `LinearizeConfig` and `convert`; `linearize --help` shows the command line.
"""

# First: a checkout that is not installed finds linearize.kernels and its siblings through this module.
from . import _checkout as _checkout

# isort: split
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .cache import cache_bytes as cache_bytes
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .config import LinearizeConfig as LinearizeConfig
    from .convert import convert as convert
    from .convert import original_attention as original_attention
    from .convert import revert as revert
    from .convert import state_off as state_off
    from .convert import window_off as window_off
    from .errors import LinearizeError as LinearizeError
    from .export import export as export
    from .kernels.near_far import near_far_attention as near_far_attention
    from .models import load_model as load_model
    from .prompt_cache import load_cache as load_cache
    from .prompt_cache import save_cache as save_cache
    from .speculative import speculative_generate as speculative_generate

# Public name -> the module it comes from. Type checkers read the imports above; a test keeps the two alike.
_EXPORTS = {
    "LinearizeConfig": "linearize.config",
    "LinearizeError": "linearize.errors",
    "cache_bytes": "linearize.cache",
    "convert": "linearize.convert",
    "export": "linearize.export",
    "load": "linearize.checkpoint",
    "load_cache": "linearize.prompt_cache",
    "load_model": "linearize.models",
    "near_far_attention": "linearize.kernels.near_far",
    "original_attention": "linearize.convert",
    "revert": "linearize.convert",
    "save": "linearize.checkpoint",
    "save_cache": "linearize.prompt_cache",
    "speculative_generate": "linearize.speculative",
    "state_off": "linearize.convert",
    "window_off": "linearize.convert",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public name on first use and keep it."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps a public name that is also a submodule's name (`convert`) bound to the public object.

    Importing `linearize.convert` makes the import system set `linearize.convert` to the module. Without this class
    `linearize.convert(model)` would work or fail depending on what was imported before.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _EXPORTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

from . import _transformers_hook  # noqa: E402  (after the names above are in place)

_transformers_hook.install()
