"""Near-and-far attention: softmax over a near window and sinks, a constant-size state for everything older.

`reference` is the formula, `chunked` the linear-time PyTorch form, `memory` the decode step, `ops` the public
function with its checks.
"""

from .memory import Memory, near_far_step
from .mixers import MIXERS, Hedgehog, Mixer, State
from .ops import near_far_attention
from .reference import near_far_reference

__all__ = [
    "MIXERS",
    "Hedgehog",
    "Memory",
    "Mixer",
    "State",
    "near_far_attention",
    "near_far_reference",
    "near_far_step",
]
