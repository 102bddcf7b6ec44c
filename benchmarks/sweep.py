"""One recipe with one thing changed at a time, trained and measured alike: what each choice is worth.

Run it as `python -m linearize.benchmarks.sweep SWEEP.yaml --out FOLDER`. The file:

    recipe: base.yaml            # or a preset
    set: [dtype=bfloat16]        # settings for all variants
    rows: [student]              # measured of each variant
    base_rows: [window + sinks, student]     # of the first one; the original comes by itself
    evaluate: {text: [...], ...} # as in a recipe
    variants:
      base: []
      no calibration: [stages.0.transfer.calibration_tokens=0]

Each variant is a run of its own in FOLDER/<variant>, so a sweep that was stopped goes on where it was. sweep.json and
sweep.md in FOLDER are written again after each variant. Every variant's student is compared with the first one's on the
same tokens; a variant of the first with another seed shows how much of a difference is chance.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from linearize.benchmarks.distillation_table import grid, ratios
from linearize.benchmarks.distillation_table import table as rows_table
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.files import write_json, write_text
from linearize.console import note
from linearize.distill.options import EvaluateOptions
from linearize.distill.recipe import StrictLoader, load_recipe
from linearize.distill.records import check_keys, convert_list
from linearize.errors import LinearizeError

__all__ = ["KIND", "Sweep", "load_sweep", "main", "run_sweep", "table"]

KIND = "linearize.sweep"
FIRST = "student of the first variant"  # as a row beside the other variants'


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says; see the module. `variants` holds the settings of each, by name."""

    recipe: str
    settings: tuple[str, ...]
    rows: tuple[str, ...]
    base_rows: tuple[str, ...]
    evaluate: EvaluateOptions
    variants: dict[str, tuple[str, ...]]


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file; every variant's recipe is built once, so that a mistake shows before anything is trained.

    Raises:
        LinearizeError: a file or setting that does not fit, with the variant's name.
    """
    file = Path(path)
    if not file.is_file():
        raise LinearizeError(f"{file}: no such file; write one as `python -m linearize.benchmarks.sweep --help` says")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LinearizeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        given = check_keys(values, ["recipe", "set", "rows", "base_rows", "evaluate", "variants"])
        lists = {key: _texts(given.get(key, default)) for key, default in _LISTS.items()}
        variants = {str(name): _texts(settings) for name, settings in _variants(given.get("variants")).items()}
        sweep = Sweep(
            recipe=str(given["recipe"]),
            settings=lists["set"],
            rows=lists["rows"],
            base_rows=lists["base_rows"],
            evaluate=EvaluateOptions.from_dict(given.get("evaluate", {})),
            variants=variants,
        )
    except KeyError as error:
        raise LinearizeError(f"{file}: {error.args[0]}: nothing is given; name a recipe") from None
    except LinearizeError as error:
        raise LinearizeError(f"{file}: {error}") from None
    folders: dict[str, str] = {}
    for name, settings in variants.items():
        other = folders.setdefault(_folder(name), name)
        if other != name:
            raise LinearizeError(f"{file}: variants: {other!r} and {name!r} would share a folder; rename one")
        try:
            load_recipe(sweep.recipe, (*sweep.settings, *settings))
        except LinearizeError as error:
            raise LinearizeError(f"{file}: variants: {name!r}: {error}") from None
    for key, rows in (("rows", sweep.rows), ("base_rows", sweep.base_rows)):
        if STUDENT not in rows:
            raise LinearizeError(f"{file}: {key}: {list(rows)} lack {STUDENT!r}, which all variants are compared by")
    return sweep


_LISTS: dict[str, list[str]] = {"set": [], "rows": [STUDENT], "base_rows": [STUDENT]}


def _texts(value: object) -> tuple[str, ...]:
    return convert_list(value, str)


def _variants(value: object) -> dict[Any, Any]:
    """`value`, known to be a map with at least one entry."""
    if not isinstance(value, dict) or not value:
        raise LinearizeError("variants: nothing is given; name at least one, such as base: []")
    return value


def run_sweep(sweep: Sweep, out: Path) -> dict[str, Any]:
    """Train and measure every variant that is not done; returns and writes sweep.json.

    Raises:
        LinearizeError: whatever a run refuses.
    """
    from linearize.job import Job
    from linearize.tasks import evaluate_model

    result: dict[str, Any] = {"kind": KIND, "schema": 1, "recipe": sweep.recipe, "variants": []}
    also: list[str] = []
    seed = load_recipe(sweep.recipe, sweep.settings).seed  # of questions and needles: the same for all
    for number, (name, settings) in enumerate(sweep.variants.items(), 1):
        note(f"[{number}/{len(sweep.variants)}] {name}")
        folder = out / _folder(name)
        recipe = load_recipe(sweep.recipe, (*sweep.settings, *settings))
        job = Job(recipe, folder)
        student = job.run([STUDENT])[0]
        rows = sweep.rows if also else sweep.base_rows
        measured = evaluate_model(
            str(student),
            None,
            sweep.evaluate,
            folder / "evaluate.json",
            recipe.dtype,
            None,
            seed,
            rows=[*(row for row in rows if row != BASELINE), *([FIRST] if also else [])],
            also=also,
            # The original and the first variant's student are the same for all: measured once.
            work=out / "measurements",
        )
        result["variants"].append({"name": name, "settings": list(settings), "evaluate": measured})
        also = also or [f"{FIRST}={student}"]
        write_json(out / "sweep.json", result)
        write_text(out / "sweep.md", table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown of sweep.json: a line a variant and row, the variants' students against the first, what was changed."""
    variants = result["variants"]
    first = variants[0]["name"]
    shown = [(v["name"], v["evaluate"]) for v in variants[:1]]
    for variant in variants[1:]:
        rows = [row for row in variant["evaluate"]["rows"] if row not in (BASELINE, FIRST)]
        shown.append((variant["name"], variant["evaluate"] | {"rows": rows}))
    parts = [rows_table(shown).replace(f"| {first}: {BASELINE} |", f"| {BASELINE} |", 1)]
    if len(variants) > 1:
        parts.append(_against_first(variants))
    changed = [f"- {v['name']}: {', '.join(f'`{s}`' for s in v['settings']) or 'as it is'}" for v in variants]
    return "\n".join([*parts, "Variants:", "", *changed]) + "\n"


def _against_first(variants: Sequence[dict[str, Any]]) -> str:
    """Perplexity of the variants' students over that of the first one's, on the same tokens."""
    lines = [(variant["name"], ratios(variant["evaluate"], FIRST)) for variant in variants[1:]]
    told = f"Perplexity over that of {variants[0]['name']!r}, with a paired 95 % interval:"
    return f"{told}\n\n{grid('student', lines)}\n"


def _folder(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(words: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m linearize.benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", help="the YAML file")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs and of the table")
    asked = parser.parse_args(words)
    try:
        run_sweep(load_sweep(asked.sweep), asked.out)
    except LinearizeError as error:
        sys.exit(f"error: {error}")
    print(asked.out / "sweep.md")


if __name__ == "__main__":
    main()
