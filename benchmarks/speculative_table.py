"""What `linearize.benchmarks.speculative` measured, as Markdown tables: speed, then equality.

    python -m linearize.benchmarks.speculative_table LABEL=FILE ...

Each file is a measurement, and its label the first column of its lines.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.benchmarks.distillation_table import grid
from linearize.benchmarks.files import read_json
from linearize.benchmarks.speculative import KIND
from linearize.console import human_tokens
from linearize.errors import LinearizeError

__all__ = ["equality_table", "main", "speed_table"]


def speed_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A line for each (label, result) and context; "" where no speed was measured."""
    lines = [
        (f"{label}, {human_tokens(cell['context'])} tokens", _speed(cell))
        for label, result in results
        for cell in result["cells"]
    ]
    return grid("drafts by", lines) if lines else ""


def _speed(cell: dict[str, Any]) -> dict[str, str]:
    alone, ours, times = cell["original"][cell["mode"]], cell["speculative"], cell["speedup"]
    growing = cell["original"].get("dynamic")
    default = {} if growing is None else {"in a growing cache": f"{growing['ms_per_token']['p50']:.1f}"}
    return {
        "original alone, ms a token": f"{alone['ms_per_token']['p50']:.1f} ({cell['mode']})",
        **default,
        "with drafts": f"{ours['ms_per_token']['p50']:.1f}",
        "times as fast (range)": f"{times['p50']:.2f} ({times['min']:.2f} to {times['max']:.2f})",
        "tokens a block": f"{ours['acceptance_length']:.2f}",
        "drafts that stand": f"{ours['acceptance_rate']:.0%}",
        "a draft, ms": f"{ours['draft_ms'] / ours['draft_length']:.1f}",
        "a pass of the original, ms": f"{ours['verify_ms']:.1f}",
    }


def equality_table(results: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A line for each (label, result) whose texts were compared; "" where none were."""
    lines = [(label, _equality(result["equality"])) for label, result in results if result["equality"] is not None]
    return grid("drafts by", lines) if lines else ""


def _equality(found: dict[str, Any]) -> dict[str, str]:
    itself, margins = found["original_against_itself"], [one["margin"] for one in found["differences"]]
    return {
        "texts equal": f"{found['equal']} of {found['prompts']}",
        "tokens": str(found["tokens"]),
        "largest margin where they part": max((f"{x:.1g}" for x in margins), default="", key=float),
        "tokens a block": f"{found['acceptance_length']:.2f}",
        "drafts that stand": f"{found['acceptance_rate']:.0%}",
        "the original's own pass differs in": f"{itself['tokens']} tokens of {itself['prompts']} texts",
    }


def main(words: Sequence[str] | None = None) -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m linearize.benchmarks.speculative_table", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="LABEL=FILE")
    results = []
    try:
        for word in parser.parse_args(words).results:
            label, equals, file = word.partition("=")
            if not equals:
                raise LinearizeError(f"results: {word!r} is not LABEL=FILE; give each file a label")
            results.append((label, read_json(Path(file), KIND)))
    except LinearizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(table for table in (speed_table(results), equality_table(results)) if table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
