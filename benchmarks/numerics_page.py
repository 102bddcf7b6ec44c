"""The tables of docs/numerics.md, from the results of `numerics`. The prose between them is written by hand.

A table stands between two lines of the page:

    <!-- numbers: NAME -->
    <!-- end -->
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from linearize.errors import LinearizeError

__all__ = ["renew", "tables"]

MARKERS = re.compile(r"<!-- numbers: (\w+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)
TERMS = {1: "one 16-bit term", 2: "two 16-bit terms"}
Row = dict[str, Any]


def renew(page: str, found: dict[str, str]) -> str:
    """`page` with each of `found` (name -> Markdown) between its markers.

    Raises:
        LinearizeError: the page's markers and the tables do not have the same names.
    """
    names = MARKERS.findall(page)
    if sorted(names) != sorted(found):
        raise LinearizeError(
            f"page: its markers are {', '.join(names) or 'none'}, the tables {', '.join(found)}; "
            "give each table one pair of markers"
        )
    return MARKERS.sub(lambda match: f"<!-- numbers: {match[1]} -->\n{found[match[1]]}\n<!-- end -->", page)


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Every table as Markdown, by name."""

    def scale(row: Row) -> str:
        return f"{row['scale']:g}"

    def error(row: Row) -> str:
        return number(row["error"])

    def error_and_worst(row: Row) -> str:
        return f"{number(row['error'])} ({number(row['worst'])})"

    who = ("dtype", "backend")
    return {
        "machine": machine(data),
        "inherent": pivot(data["inherent"], ("rounded",), scale, error),
        "logits": pivot(data["logits"], ("mix", *who), scale, error_and_worst),
        "features": pivot(data["features"], who, lambda row: str(row["feature_dim"]), error),
        "lengths": pivot(data["lengths"], who, lambda row: tokens(row["length"]), error),
        "growth": growth(data["growth"]),
        "gradients": pivot(data["gradients"], ("mix", "scale", *who), lambda row: row["of"], error),
        "weights": pivot(data["weights"], ("dtype", "norm"), lambda row: TERMS[row["terms"]], error),
        "decode": decode(data["decode"]),
    }


def machine(data: dict[str, Any]) -> str:
    """What the numbers were measured on, in a sentence or two."""
    where, versions = data["machine"], data["machine"]["versions"]
    device = where["gpu"]["name"] if where["gpu"] else where["cpu"]["model"] or "a CPU"
    triton = {
        "compiled": f" Triton {versions['triton']}, kernels compiled.",
        "interpreted": f" Triton {versions['triton']}, kernels in its interpreter on the CPU, not on a GPU.",
        None: " Triton's kernels were not run.",
    }[data["triton"]]
    return (
        f"Measured {where['date'][:10]} on {device} ({where['threads']} thread{'s' * (where['threads'] > 1)}), "
        f"torch {versions['torch']}, in {data['seconds']:.0f} s.{triton} Seed {where['seed']}."
    )


def growth(rows: Sequence[Row]) -> str:
    """The table of the state's size."""
    errors = ("scan_s", "scan_z", "update_s", "update_z")
    columns = ["tokens", "largest in s", "largest in z", "s, chunked", "z, chunked", "s, decoding", "z, decoding"]
    return table(
        columns,
        [
            [tokens(row["length"]), f"{row['s']:.0f}", f"{row['z']:.0f}", *(number(row[name]) for name in errors)]
            for row in rows
        ],
    )


def decode(rows: Sequence[Row]) -> str:
    """The table of states in bfloat16, values without and with a mean."""
    columns = ["W", "values' mean", "tokens", "chunks", "size kept", "error of far value", "of output"]
    return table(
        [*columns, "of output, state float32"],
        [
            [
                str(row["window"]),
                f"{row['mean']:g}",
                tokens(row["length"]),
                str(row["chunks"]),
                f"{100 * row['kept']:.1f} %",
                *(number(row[name]) for name in ("far", "out", "out_float32")),
            ]
            for row in rows
        ],
    )


def pivot(rows: Sequence[Row], keys: Sequence[str], column: Callable[[Row], str], cell: Callable[[Row], str]) -> str:
    """A table with a line for each combination of `keys`, in the order in which they come, and a column for each value
    of `column`; what was not measured is a dash."""
    columns = list(dict.fromkeys(column(row) for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(label(row[key]) for key in keys), {})[column(row)] = cell(row)
    return table([*keys, *columns], [[*key, *(line.get(c, "-") for c in columns)] for key, line in lines.items()])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def label(value: Any) -> str:
    """A key as its column shows it: 100.0 is "100"."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(x: float | None) -> str:
    """Two digits and an exponent, which is what an error is good for."""
    return "not finite" if x is None else f"{x:.1e}"


def tokens(length: int) -> str:
    """65536 -> "64k"."""
    return str(length) if length % 1024 else f"{length // 1024}k"
