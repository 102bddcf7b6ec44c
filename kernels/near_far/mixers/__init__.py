"""The mixers by name. `"none"` has no state and therefore no class."""

from .base import Mixer, State, accumulation_dtype, state_obstacle
from .hedgehog import Hedgehog

__all__ = ["MIXERS", "Hedgehog", "Mixer", "State", "accumulation_dtype", "state_obstacle"]

MIXERS: dict[str, type[Mixer] | None] = {"none": None, "hedgehog": Hedgehog}
