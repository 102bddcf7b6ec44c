"""The mixers by name. `"none"` has no state and therefore no class."""

from .base import Mixer, State, accumulation_dtype, full_precision, near_part, state_obstacle
from .gla import Gla
from .hedgehog import Hedgehog
from .recurrent import Recurrent

__all__ = [
    "MIXERS",
    "Gla",
    "Hedgehog",
    "Mixer",
    "Recurrent",
    "State",
    "accumulation_dtype",
    "full_precision",
    "near_part",
    "state_obstacle",
]

MIXERS: dict[str, type[Mixer] | None] = {"none": None, "hedgehog": Hedgehog, "gla": Gla}
