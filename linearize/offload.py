"""Mixers whose weights accelerate has put away."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["loaded"]


@contextmanager
def loaded(mixer: nn.Module | None) -> Iterator[None]:
    """Inside, an offloaded mixer is on its device. accelerate loads a module when its `forward` is called, and a mixer
    has none: its hook is asked by hand."""
    hook: Any = None if mixer is None else getattr(mixer, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(mixer)
    try:
        yield
    finally:
        hook.post_forward(mixer, None)
