"""What a conversion is: one frozen, validated record."""

import difflib
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from linearize.errors import LinearizeError

__all__ = ["MIXERS", "MIXES", "MIX_INPUTS", "TAUGHT_MIXERS", "LinearizeConfig"]

MIXERS = ("none", "hedgehog", "gla")
MIXES = ("normalizer", "gate", "peak")
MIX_INPUTS = ("query", "head", "fixed")
# Mixers whose state is the far side alone, which has a target of its own: attention transfer can teach them.
TAUGHT_MIXERS = ("hedgehog",)


@dataclass(frozen=True)
class LinearizeConfig:
    """Which layers are converted, and to what.

    Attributes:
        mixer: what becomes of the keys and values that leave the window. `"hedgehog"` keeps them in a
            linear-attention state under a learned softmax feature map; `"none"` forgets them (window + sinks);
            `"gla"` runs gated linear attention over all tokens beside the window, without a parameter of its own.
        window: W, the chunk length in tokens, >= 1. A query sees its own chunk and the one before exactly:
            between W and 2W - 1 recent tokens.
        sinks: S, how many of a sequence's first tokens stay exact for every query, >= 0.
        mix: how near and far are weighed. `"normalizer"`: one shared softmax denominator, with a learned
            log-scale on the far side. `"peak"`: the same, but near weights are measured from the largest of them.
            `"gate"`: a learned sigmoid, which is what gla takes.
        softmax_layers: the layers left as they are. `"none"`, `"every:n"` (layers n-1, 2n-1, ...) or layer indices.
        feature_dim: columns of the feature map's projection per head; the state has twice as many rows.
            `None` means the model's head_dim.
        mix_input: what the mix depends on. `"query"`: a linear function of the query for each head. `"head"`: a learned
            number for each head. `"fixed"`: `mix_start`, and nothing is learned.
        mix_start: log-odds of the far side at the untrained start, the same in all heads.
        feature_scale: hedgehog's projection starts as the identity times this. `None` means the mixer's own choice.

    Raises:
        LinearizeError: a value outside what is described above.
    """

    mixer: str = "hedgehog"
    window: int = 64
    sinks: int = 4
    mix: str = "normalizer"
    softmax_layers: str | tuple[int, ...] = "none"
    feature_dim: int | None = None
    mix_input: str = "query"
    mix_start: float = 0.0
    feature_scale: float | None = None

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise LinearizeError(f"mixer: {self.mixer!r} is unknown{_nearest(self.mixer, MIXERS)}")
        if self.mix not in MIXES:
            raise LinearizeError(f"mix: {self.mix!r} is unknown{_nearest(self.mix, MIXES)}")
        if self.mix_input not in MIX_INPUTS:
            raise LinearizeError(f"mix_input: {self.mix_input!r} is unknown{_nearest(self.mix_input, MIX_INPUTS)}")
        _check_number("mix_start", self.mix_start, "0 weighs both sides alike, 2.3 the far side ten times as much")
        if self.feature_scale is not None:
            _check_number("feature_scale", self.feature_scale, "leave it out to use the mixer's own")
        if self.mixer == "gla":
            self._check_gla()
        _check_int("window", self.window, 1, "the smallest window is 1 token; use 16 to 128 for most models")
        _check_int("sinks", self.sinks, 0, "use 0 for no sinks, 4 for most models")
        if self.feature_dim is not None:
            _check_int("feature_dim", self.feature_dim, 1, "leave it out to use the model's head_dim")
        object.__setattr__(self, "softmax_layers", _check_softmax_layers(self.softmax_layers))

    def _check_gla(self) -> None:
        if self.mix != "gate":
            raise LinearizeError(
                f"mix: {self.mix!r} weighs the far side by its mass, and mixer 'gla' has none; use mix 'gate'"
            )
        for name in ("feature_dim", "feature_scale"):
            if getattr(self, name) is not None:
                raise LinearizeError(
                    f"{name}: {getattr(self, name)!r} is for a learned feature map, and mixer 'gla' has none; remove it"
                )

    def kept_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a `num_layers` model that stay softmax, ascending.

        Raises:
            LinearizeError: a layer index outside the model.
        """
        if self.softmax_layers == "none":
            return ()
        if isinstance(self.softmax_layers, str):
            every = int(self.softmax_layers.removeprefix("every:"))
            return tuple(range(every - 1, num_layers, every))
        for index in self.softmax_layers:
            if not 0 <= index < num_layers:
                raise LinearizeError(
                    f"softmax_layers: layer {index} is out of range, the model has layers 0 to {num_layers - 1}; "
                    "name layers inside that range"
                )
        return self.softmax_layers

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; `LinearizeConfig.from_dict` gives the same config back."""
        values = asdict(self)
        if isinstance(self.softmax_layers, tuple):
            values["softmax_layers"] = list(self.softmax_layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LinearizeConfig":
        """The config that `to_dict` wrote. An unknown key is an error that names the nearest known one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise LinearizeError(f"{key}: unknown setting of a conversion{_nearest(key, known)}")
        return cls(**values)


def _nearest(value: object, known: list[str] | tuple[str, ...]) -> str:
    """`"; did you mean 'x'?"` where something is near, else the list of what is known."""
    close = difflib.get_close_matches(str(value), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _check_int(name: str, value: object, least: int, way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LinearizeError(f"{name}: {value!r} is not an integer >= {least}; {way_out}")


def _check_number(name: str, value: object, way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LinearizeError(f"{name}: {value!r} is not a finite number; {way_out}")


def _check_softmax_layers(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        count = value.removeprefix("every:")
        if value == "none" or (value.startswith("every:") and count.isdecimal() and int(count) >= 1):
            return value
    elif isinstance(value, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return tuple(sorted(set(value))) if value else "none"
    raise LinearizeError(
        f"softmax_layers: {value!r} is not understood; use 'none', 'every:4' (every fourth layer stays softmax) "
        "or a list of layer indices"
    )
