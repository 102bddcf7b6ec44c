"""The mixers by name. `"none"` has no state and therefore no class."""

from .base import Mixer, State, accumulation_dtype, full_precision, state_obstacle
from .hedgehog import Hedgehog

__all__ = ["MIXERS", "Hedgehog", "Mixer", "State", "accumulation_dtype", "full_precision", "state_obstacle"]

MIXERS: dict[str, type[Mixer] | None] = {"none": None, "hedgehog": Hedgehog}
