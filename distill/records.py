"""Records that check themselves: frozen dataclasses with limits, from and to plain dicts.

The annotation of a field says its type; `option` adds limits and hints. Every build checks every field, in code and
from a file alike, so a record that exists is valid.
"""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from linearize.errors import LinearizeError

__all__ = ["RecipeError", "Record", "check_keys", "convert_list", "nearest", "option", "plain", "shown"]


class RecipeError(LinearizeError):
    """A problem with one key. `where` is the key's path, `text` the rest of the message."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where}: {text}" if where else text)
        self.where = where
        self.text = text

    def inside(self, parent: str) -> "RecipeError":
        """The same problem, seen from the record that holds this one."""
        joint = "" if not parent or not self.where or self.where.startswith("[") else "."
        return RecipeError(f"{parent}{joint}{self.where}", self.text)


def option(
    default: Any = MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    hint: str = "",
) -> Any:
    """A field with limits on its numbers (in a list: on each item) and a hint for when it is missing."""
    limits = {"least": least, "above": above, "most": most, "below": below}
    return field(default=default, metadata={"limits": limits, "hint": hint})


@dataclass(frozen=True, kw_only=True)
class Record:
    """Converts and checks its fields by their annotations and limits on every build."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            try:
                value = _convert(getattr(self, spec.name), hints[spec.name], spec.metadata)
            except RecipeError as error:
                raise error.inside(spec.name) from None
            object.__setattr__(self, spec.name, value)

    @classmethod
    def from_dict(cls, values: object) -> typing.Self:
        """Build the record from what YAML holds.

        Raises:
            RecipeError: an unknown or missing key, a wrong type, a value out of range.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        settings = check_keys(values, known)
        for spec in dataclasses.fields(cls):
            if spec.default is MISSING and spec.default_factory is MISSING and settings.get(spec.name) is None:
                hint = spec.metadata.get("hint") or f"{cls.__name__} cannot do without it"
                raise RecipeError(spec.name, f"nothing is given; {hint}")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML and JSON can hold; `from_dict` gives an equal record back."""
        pairs = ((spec, getattr(self, spec.name)) for spec in dataclasses.fields(self))
        return {spec.name: plain(value) for spec, value in pairs if value is not None or spec.default is not None}


def _convert(value: object, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` as the annotated type; raises RecipeError with an empty path where it is not of that type."""
    args = typing.get_args(hint)
    if "convert" in metadata:
        return metadata["convert"](value)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        if value is None and type(None) in args:
            return None
        lists = [arg for arg in args if typing.get_origin(arg) is tuple]
        others = [arg for arg in args if arg not in lists and arg is not type(None)]
        if lists and isinstance(value, (list, tuple)):
            return _convert(value, lists[0], metadata)
        try:
            return _convert(value, others[0], metadata)
        except RecipeError as error:
            raise RecipeError("", f"{error.text}; or write a list" if lists else error.text) from None
    if typing.get_origin(hint) is Literal:
        if value not in args:
            raise RecipeError("", f"{shown(value)} is unknown{nearest(str(value), args)}")
        return value
    if typing.get_origin(hint) is tuple:
        return convert_list(value, lambda item: _convert(item, args[0], metadata))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else typing.cast(Any, hint).from_dict(value)
    if hint in (int, float):
        return _convert_number(value, hint, metadata.get("limits", {}))
    if hint is bool:
        if not isinstance(value, bool):
            raise RecipeError("", f"{shown(value)} is neither true nor false; write one of them")
        return value
    if not isinstance(value, str) or not value.strip():
        raise RecipeError("", f"{shown(value)} is not a text; " + (metadata.get("hint") or "write one, in quotes"))
    return value


def convert_list(value: object, convert: Callable[[object], Any]) -> tuple[Any, ...]:
    """Every entry of a list through `convert`; a problem names the entry's place."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecipeError("", f"{shown(value)} is not a list; write one, as in [a, b]")
    items = []
    for index, entry in enumerate(value):
        try:
            items.append(convert(entry))
        except RecipeError as error:
            raise error.inside(f"[{index}]") from None
    return tuple(items)


def _convert_number(value: object, kind: type, limits: Mapping[str, float | None]) -> float:
    number = value
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text: only 1.0e-3 is a number to it.
        with contextlib.suppress(ValueError):
            number = float(value)
    if kind is int and isinstance(number, float) and number.is_integer():
        number = int(number)
    fits = isinstance(number, (int, kind)) and not isinstance(number, bool)
    if not fits or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise RecipeError("", f"{shown(value)} is not {'an integer' if kind is int else 'a number'}; write one")
    bounds = {"least": "at least", "above": "above", "most": "at most", "below": "below"}
    asked = " and ".join(f"{bounds[key]} {limit}" for key, limit in limits.items() if limit is not None)
    least, above, most, below = (limits.get(key) for key in bounds)
    low = (least is not None and number < least) or (above is not None and number <= above)
    if low or (most is not None and number > most) or (below is not None and number >= below):
        raise RecipeError("", f"{shown(value)} is out of range; give a value {asked}")
    return kind(number)


def check_keys(values: object, known: list[str]) -> dict[str, Any]:
    """`values`, known to be a map with known keys only."""
    if not isinstance(values, Mapping):
        raise RecipeError("", f"{shown(values)} is not a map of settings; known settings: {', '.join(known)}")
    for key in values:
        if key not in known:
            raise RecipeError(str(key), f"unknown key{nearest(str(key), known)}")
    return dict(values)


def nearest(value: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(value, known, n=1)
    known_list = f"known: {', '.join(known)}"
    return f", did you mean {close[0]!r}? ({known_list})" if close else f"; {known_list}"


def shown(value: object) -> str:
    """A value as a message quotes it: YAML's word for nothing, and not much of a long one."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(value: object) -> Any:
    """A record or a tuple as what YAML and JSON can hold."""
    if isinstance(value, Record):
        return value.to_dict()
    return [plain(item) for item in value] if isinstance(value, tuple) else value
