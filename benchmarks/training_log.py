"""What train.jsonl and recipe.yaml tell of a training, finished or still running.

A line of train.jsonl is an object; the last four keys are missing in older logs or where a stage has none:

    {"stage": str, "step": int, "tokens": int, "loss": float, "lr": float, "tokens_per_s": float,
     "seconds": float, "grad_norm": float, "peak_memory_bytes": int, "losses_per_layer": {LAYER: float, ...}}
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import LinearizeError

__all__ = ["HeatMap", "StageLog", "heat_map", "read_train_log", "stage_logs", "thinned"]

COLUMNS = 48  # of a heat map: narrow enough for a phone, fine enough for a curve
POINTS = 400  # of a curve
FINISHED = 0.999  # of a budget in minutes, which older logs tell to a tenth of a token a second
ROLES = ("control", "window")  # trained beside the student, by the settings of `evaluate`


@dataclass(frozen=True)
class StageLog:
    """One stage: its lines, in order, and how far it is.

    `share` is the part of its budget that is used, 0 to 1; None where no recipe tells the budget. `left`: seconds to
    its end at the speed so far; None where that is unknown. A stage that waits for its turn has no lines.
    """

    name: str
    records: tuple[dict[str, Any], ...]
    share: float | None
    left: float | None

    @property
    def seconds(self) -> float | None:
        """Time that the stage has taken so far; None before its first line."""
        return _seconds(self.records[-1]) if self.records else None

    @property
    def finished(self) -> bool:
        """Whether the budget is used; without a recipe, whether there is anything."""
        return bool(self.records) and (self.share is None or self.share >= FINISHED)


@dataclass(frozen=True)
class HeatMap:
    """Losses of layers over a stage: `losses[i][j]` of `layers[i]` in the j-th span of tokens, the spans between
    `edges` being equal; geometric means, None where nothing was logged or a loss is not above 0."""

    layers: tuple[str, ...]
    edges: tuple[float, ...]
    losses: tuple[tuple[float | None, ...], ...]


def read_train_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a train.jsonl. A last line that is cut off (a kill, a look while it is written) is left out.

    Raises:
        LinearizeError: any other line that is not an object with a stage, tokens and a loss; names the line.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    whole, last = lines[:-1], lines[-1]  # a whole line ends in a newline, so the last piece is empty
    records = []
    for position, line in enumerate([*whole, last], 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if position == len(lines):
                break
            raise LinearizeError(f"{path}:{position}: not JSON ({error}); delete that line") from error
        if not isinstance(record, dict) or not {"stage", "tokens", "loss"} <= record.keys():
            raise LinearizeError(f"{path}:{position}: not a line of a training log; it needs stage, tokens and loss")
        records.append(record)
    return records


def stage_logs(log: Sequence[dict[str, Any]], recipe: dict[str, Any] | None) -> list[StageLog]:
    """The stages of a run in their order: those of the log, and the student's that are still to come.

    Args:
        log: lines of a train.jsonl.
        recipe: what recipe.yaml holds; None where there is none.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for record in log:
        found.setdefault(str(record["stage"]), []).append(record)
    budgets = _budgets(recipe or {}, found)
    names = [*budgets, *(name for name in found if name not in budgets)]
    stages = []
    for name in names:
        records, share, left = tuple(found.get(name, ())), None, None
        if budgets.get(name):
            share = _share(budgets[name], records[-1]) if records else 0.0
            seconds = _seconds(records[-1]) if records else None
            left = seconds * (1 - share) / share if seconds and share else None
        stages.append(StageLog(name, records, share, left))
    return stages


def heat_map(records: Sequence[dict[str, Any]]) -> HeatMap | None:
    """The losses per layer of a stage's lines; None where there are none."""
    told = [record for record in records if record.get("losses_per_layer")]
    if not told:
        return None
    layers = tuple(dict.fromkeys(layer for record in told for layer in record["losses_per_layer"]))
    count = min(COLUMNS, len(told))
    first = told[0]["tokens"]
    width = max(told[-1]["tokens"] - first, 1) / count
    spans: list[list[dict[str, float]]] = [[] for _ in range(count)]
    for record in told:
        spans[min(int((record["tokens"] - first) / width), count - 1)].append(record["losses_per_layer"])
    losses = tuple(tuple(_mean([told[layer] for told in span if layer in told]) for span in spans) for layer in layers)
    return HeatMap(layers, tuple(first + width * column for column in range(count + 1)), losses)


def thinned(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about `POINTS` of the lines, evenly, with the last."""
    step = -(-len(records) // POINTS)
    return [*records[:-1:step], records[-1]] if records else []


def _mean(losses: Sequence[float]) -> float | None:
    good = [math.log(loss) for loss in losses if math.isfinite(loss) and loss > 0]
    return math.exp(sum(good) / len(good)) if good else None


def _seconds(record: dict[str, Any]) -> float | None:
    """How long a stage has run; older logs tell the tokens a second since it began."""
    if record.get("seconds"):
        return float(record["seconds"])
    return record["tokens"] / record["tokens_per_s"] if record.get("tokens_per_s") else None


def _share(budget: dict[str, float], record: dict[str, Any]) -> float:
    """As `linearize.distill.loop.progress_of`."""
    used = {"tokens": record["tokens"], "steps": record.get("step", 0), "minutes": (_seconds(record) or 0) / 60}
    return min(max(used[name] / limit for name, limit in budget.items() if name in used and limit), 1.0)


def _budgets(recipe: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Stage -> limits by name, in the order of the run, under the names that `linearize.job` gives the stages."""
    budgets: dict[str, dict[str, float]] = {}
    kinds = []
    for stage in recipe.get("stages") or []:
        ((kind, options),) = stage.items()
        kinds.append(kind)
        count = kinds.count(kind)
        name = kind if count == 1 else f"{kind}-{count}"
        budgets[name] = {key: limit for key, limit in options["budget"].items() if limit}
    evaluate = recipe.get("evaluate") or {}
    for role in ROLES:
        if evaluate.get(role):
            for name in [name for name in budgets if name.startswith(("distill", "extend"))]:
                own = name.replace("distill", role)
                own = own if own != name else f"{role}-{name}"
                # These take the student's steps. Whether they are asked for shows only when they begin.
                if own in found:
                    budgets[own] = {"steps": found[name][-1].get("step", 0)} if name in found else {}
    return budgets
