"""Activation checkpointing: a layer's activations are computed again in the backward pass instead of kept."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from linearize.attention import Switch
from linearize.convert import base_model, switch_of
from linearize.families import family_of

__all__ = ["checkpointed_layers"]


@contextmanager
def checkpointed_layers(model: Any, enabled: bool = True) -> Iterator[None]:
    """Inside, each decoder layer keeps its input alone: a third more time for activations of one layer at a time.

    What the switch says in the forward pass, such as another window, holds in the pass that computes it again. Dropout
    stays as it is: only the layers' own flags change, which transformers asks, not those of the modules in them.
    """
    if not enabled:
        yield
        return
    base = base_model(model)
    switch = switch_of(base)
    layers = list(base.get_submodule(family_of(base.config).layers).children())
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    before = [{name: vars(layer)[name] for name in names if name in vars(layer)} for layer in layers]
    run = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _as_now(switch)))
    for layer in layers:
        vars(layer).update(dict(zip(names, (True, run, True))))
    try:
        yield
    finally:
        for layer, values in zip(layers, before):
            for name in names:
                vars(layer).pop(name, None)
            vars(layer).update(values)


def _as_now(switch: Switch) -> AbstractContextManager[None]:
    """Inside, whenever that is, the switch is what it is now."""
    held = copy.copy(vars(switch))

    @contextmanager
    def again() -> Iterator[None]:
        before = copy.copy(vars(switch))
        vars(switch).update(held)
        try:
            yield
        finally:
            vars(switch).update(before)

    return again()
