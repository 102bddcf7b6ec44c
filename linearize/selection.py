"""Which layers stay softmax: from a score for each layer to a list of layers, and into a recipe.

A layer's score says what the model loses when that layer is converted; `linearize.distill.selection` measures it.
Here is only arithmetic: what keeping a layer costs, and the best choice under a limit.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linearize.config import LinearizeConfig
from linearize.console import human_bytes, human_tokens
from linearize.errors import LinearizeError
from linearize.inspection import inspect_config

__all__ = [
    "LayerCosts",
    "Selection",
    "check_recipe",
    "choose_layers",
    "choose_within",
    "keeping_costs",
    "parse_keep",
    "uniform_layers",
    "uniform_within",
    "write_softmax_layers",
]

KEY = "softmax_layers"


@dataclass(frozen=True)
class LayerCosts:
    """Cache bytes of one sequence.

    Attributes:
        context: tokens of the sequence.
        least: the whole cache with every convertible layer converted.
        extra: for each convertible layer, what it caches more if it stays softmax; below 0 where the context is so
            short that the converted layer would cache more.
    """

    context: int
    least: int
    extra: Mapping[int, int]

    def total(self, kept: Sequence[int]) -> int:
        """The whole cache with these convertible layers kept."""
        return self.least + sum(self.extra[index] for index in kept)


@dataclass(frozen=True)
class Selection:
    """A ranking and what was chosen from it.

    Attributes:
        by: the score's name.
        scores: by layer; the higher, the more is lost by converting it. Empty for `uniform`, which measures nothing.
        kept: the layers that stay softmax, ascending.
        costs: cache bytes at the context that was asked for.
    """

    by: str
    scores: Mapping[int, float]
    kept: tuple[int, ...]
    costs: LayerCosts

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able; `softmax_layers` is what a recipe takes."""
        return {KEY: list(self.kept), "cache_bytes": self.costs.total(self.kept)} | {
            key: value for key, value in asdict(self).items() if key != "kept"
        }


def keeping_costs(model_config: Any, config: LinearizeConfig, context: int, dtype: str) -> LayerCosts:
    """What each convertible layer caches more as softmax than converted by `config`, for one sequence of `context`.

    Raises:
        LinearizeError: what `inspect_config` refuses.
    """
    plan = inspect_config(model_config, LinearizeConfig(**config.to_dict() | {KEY: "none"}), [context], dtype)
    extra = {x.layer: x.kv_bytes[0] - x.new_bytes[0] for x in plan.layers if x.converted}
    return LayerCosts(context, plan.new_bytes[0], extra)


def uniform_layers(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the layers at equal distances, the last among them: the ones that `every:n` keeps where it fits."""
    return tuple(layers[(j + 1) * len(layers) // count - 1] for j in range(count))


def choose_layers(scores: Mapping[int, float], count: int) -> tuple[int, ...]:
    """The `count` layers of the highest scores, ascending; of equal ones the earlier."""
    return tuple(sorted(sorted(scores, key=lambda index: (-scores[index], index))[:count]))


def choose_within(scores: Mapping[int, float], costs: LayerCosts, limit: int) -> tuple[int, ...]:
    """Greedy under a limit of the whole cache: the best score a byte first, as long as it fits.

    A layer that costs nothing is always kept. One that no longer fits is passed over, and a cheaper one after it may
    still fit. Where all layers cost the same, as in most models, no other choice has a higher sum of scores.

    Raises:
        LinearizeError: a limit below the cache with all layers converted, or one that the original's cache fits into.
    """
    free = check_limit(costs, limit)
    rest = [index for index in scores if index not in free]
    # Divided by its bytes, a score below 0 would look the better the dearer the layer: those come last, undivided.
    order = sorted(rest, key=lambda i: (scores[i] <= 0, -scores[i] / (costs.extra[i] if scores[i] > 0 else 1), i))
    kept = list(free)
    for index in order:
        if costs.total([*kept, index]) <= limit:
            kept.append(index)
    return tuple(sorted(kept))


def uniform_within(costs: LayerCosts, limit: int) -> tuple[int, ...]:
    """As many layers at equal distances as fit under a limit of the whole cache.

    Raises:
        LinearizeError: as `choose_within`.
    """
    check_limit(costs, limit)
    layers = sorted(costs.extra)
    choices = [uniform_layers(layers, count) for count in range(len(layers))]
    return max((kept for kept in choices if costs.total(kept) <= limit), key=len)


def check_limit(costs: LayerCosts, limit: int) -> tuple[int, ...]:
    """The layers that cost nothing to keep, where the limit leaves a choice.

    Raises:
        LinearizeError: it leaves none.
    """
    free = tuple(index for index, extra in costs.extra.items() if extra <= 0)
    at = f"at {human_tokens(costs.context)} tokens"
    if limit < costs.total(free):
        raise LinearizeError(
            f"cache_bytes: {human_bytes(limit)} is less than the {human_bytes(costs.total(free))} that are left {at} "
            "with every layer converted; allow more, or use a smaller window or feature_dim"
        )
    whole = costs.total(tuple(costs.extra))
    if limit >= whole:
        raise LinearizeError(
            f"cache_bytes: {human_bytes(limit)} has room for the original's own {human_bytes(whole)} {at}, so no layer "
            "need be converted; allow less, or name a longer context"
        )
    return free


def parse_keep(text: str, layers: int) -> int:
    """How many of `layers` stay: `"8"` or `"25%"`, the percentage rounded to the nearest layer.

    Raises:
        LinearizeError: no such number, or one that leaves nothing to keep or nothing to convert.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", text.strip())
    if match is None or (not match[2] and not match[1].isdecimal()):
        raise LinearizeError(f"keep: {text!r} is not understood; give a number of layers as 8, or a share as 25%")
    count = int(float(match[1]) * layers / 100 + 0.5) if match[2] else int(match[1])
    if not 1 <= count < layers:
        raise LinearizeError(
            f"keep: {text} is {count} of the {layers} layers that can be converted; keep 1 to {layers - 1} of them"
        )
    return count


def write_softmax_layers(path: Path, layers: Sequence[int]) -> None:
    """Put the list into the line `softmax_layers:` of a recipe's `convert` part; nothing else in the file changes.

    Raises:
        LinearizeError: as `check_recipe`.
    """
    path.write_bytes(_edited(path, list(layers)).encode("utf-8"))


def check_recipe(path: Path) -> None:
    """Whether `write_softmax_layers` could do its work.

    Raises:
        LinearizeError: no file, no recipe, or no line `softmax_layers:` of its own; the message has what to paste.
    """
    _edited(path, [0])


def _edited(path: Path, layers: list[int]) -> str:
    """The recipe's text with another list; read as YAML it differs in that setting only."""
    import yaml

    paste = f"paste this below convert: as a line of its own, and call again: {KEY}: none"
    if not path.is_file():
        raise LinearizeError(f"write: {str(path)!r} is no file; give a recipe's YAML, such as a copy of a preset")
    try:
        text = path.read_bytes().decode("utf-8")
        before = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise LinearizeError(f"write: {path} is not valid YAML: {' '.join(str(error).split())}; correct it") from None
    if not isinstance(before, dict) or not isinstance(before.get("convert"), dict):
        raise LinearizeError(
            f"write: {path} has no map 'convert', so it is no recipe of a conversion; add one, and {paste}"
        )
    wanted = before | {"convert": before["convert"] | {KEY: layers}}
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        # A value on the same line, or none, then perhaps a comment.
        match = re.fullmatch(
            rf"(\s+{KEY}\s*:)([ \t]*(?:\[[^\]#]*\]|[^\s#\[][^#\r\n]*?))?([ \t]*(?:#[^\r\n]*)?[\r\n]*)", line
        )
        if match is not None:
            edited = "".join([*lines[:number], f"{match[1]} {layers}{match[3]}", *lines[number + 1 :]])
            if _loads_as(edited, wanted):
                return edited
    raise LinearizeError(f"write: {path} has no line '{KEY}: ...' of its own below convert; {paste}")


def _loads_as(text: str, wanted: Any) -> bool:
    import yaml

    try:
        return bool(yaml.safe_load(text) == wanted)
    except yaml.YAMLError:
        return False
