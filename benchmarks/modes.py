"""The ways in which a model can decode: under which cache, and whether its step is compiled.

    dynamic          the cache that the model makes itself: DynamicCache, with the layers of a converted model
    static           transformers' StaticCache, allocated once at its full length
    static+compile   the same, and the whole step is one graph of torch.compile
    dynamic+projections, static+projections
                     an original with the projections that a converted model has on a CPU where they are the faster
                     ones (`linearize.projections`): what is faster in the student by these is not to be had from
                     its attention

A compiled step is the function that transformers' `generate` compiles, called as it calls it: the prefill runs without,
every shape has a graph of its own (`dynamic=False`), and on a GPU the graph is a CUDA graph (mode "reduce-overhead").
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from linearize.cache import install_layers
from linearize.convert import converted_layers, is_converted, switch_of
from linearize.projections import apply_to, obstacle

__all__ = [
    "MODES",
    "Mode",
    "compilations",
    "compile_obstacle",
    "compiled_call",
    "cuda_graphs_skipped",
    "mode_obstacle",
    "modes_of",
    "preallocated",
]


@dataclass(frozen=True)
class Mode:
    """A way to decode; the module's docstring has them."""

    name: str
    static: bool = False
    compiled: bool = False
    projections: bool = False


DYNAMIC = Mode("dynamic")
STATIC = Mode("static", static=True)
STATIC_COMPILE = Mode("static+compile", static=True, compiled=True)
DYNAMIC_PROJECTIONS = Mode("dynamic+projections", projections=True)
STATIC_PROJECTIONS = Mode("static+projections", static=True, projections=True)
MODES = {mode.name: mode for mode in (DYNAMIC, STATIC, STATIC_COMPILE, DYNAMIC_PROJECTIONS, STATIC_PROJECTIONS)}


def modes_of(model: Any) -> tuple[Mode, ...]:
    """The modes that a model decodes in, by what its caches say of themselves.

    Args:
        model: a causal language model of transformers, converted or not.
    """
    helped = not is_converted(model) and apply_to(model.device, model.dtype)
    compileable = preallocated(model, 1).is_compileable
    return tuple(
        mode
        for mode in (DYNAMIC, DYNAMIC_PROJECTIONS, STATIC, STATIC_PROJECTIONS, STATIC_COMPILE)
        if (helped or not mode.projections) and (compileable or not mode.compiled)
    )


def preallocated(model: Any, capacity: int) -> Any:
    """A StaticCache for `capacity` tokens, with the layers of a converted model."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=capacity)
    if layers := _converted(model):
        install_layers(cache, layers)
    return cache


def _converted(model: Any) -> list[int]:
    """The layers that now run converted."""
    return list(converted_layers(model)) if is_converted(model) and switch_of(model).converted else []


def compile_options(device: torch.device) -> dict[str, Any]:
    """What torch.compile is told. Without `dynamic=False` the second context would get a graph for all lengths."""
    return {"dynamic": False, "mode": "reduce-overhead" if device.type == "cuda" else "default"}


def compiled_call(model: Any, device: torch.device) -> Callable[..., Any]:
    """The model's compiled forward pass, made once a model; `generate` would take the same."""
    from transformers import CompileConfig

    return model.get_compiled_call(CompileConfig(**compile_options(device)))


def mode_obstacle(mode: Mode, device: torch.device) -> str | None:
    """Why a mode that a model has cannot be measured on this machine, or would change nothing here; or None."""
    if mode.projections:
        return obstacle()
    return compile_obstacle(device) if mode.compiled else None


@lru_cache
def compile_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot be used on a device, in one line, or None. Asked by compiling an addition, since what
    may be missing is a C++ compiler, Python's headers, Triton, or a GPU that it knows."""
    try:
        torch.compile(_add_one, **compile_options(device))(torch.ones(8, device=device))
    except Exception as error:  # every way to fail is an answer here
        return f"torch.compile does not work on this machine: {first_line(error)}"
    return None


def _add_one(x: Tensor) -> Tensor:
    return x + 1


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that PyTorch adds below."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def compilations() -> int:
    """How many functions torch.compile has compiled in this process so far."""
    return torch._dynamo.utils.counters["frames"]["total"]


def cuda_graphs_skipped() -> int:
    """How many graphs of mode "reduce-overhead" have become no CUDA graph in this process so far."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
