"""The report's section on a bench.json: time, prefill and bytes by context and batch.

All of it reads a result as `linearize.benchmarks.decode` gives it.
"""

from collections.abc import Callable
from typing import Any

from linearize.benchmarks import page, plots
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.headline import prefills
from linearize.benchmarks.page import Cell, Data, Section
from linearize.benchmarks.plots import Line, Point
from linearize.benchmarks.report_format import DASH, ends, span
from linearize.benchmarks.summary import number, percent, size, smallest_caches
from linearize.benchmarks.verdicts import of_ranges, tone

__all__ = ["speed_section"]

VERDICTS = {"faster": "good", "slower": "bad"}


def speed_section(result: dict[str, Any]) -> Section:
    """The student's speed-ups, figures of every batch, then tables."""
    figures = []
    if plots.available():
        figures = [page.figures(_speedups(result)), *(_figures(result, batch) for batch in result["batches"])]
    return page.section(
        "Speed and memory",
        *figures,
        _time_table(result),
        _prefill_table(result),
        _bytes_table(result),
        page.paragraph(
            "Rows take turns within each repeat. Each is measured in every mode that it has: under a growing cache "
            "(dynamic), a preallocated one (static), with its step compiled, the original also with the converted "
            "model’s way of computing projections on a CPU (projections), where that changes something. At each "
            "context and batch the best mode of the original is compared with the best of each other row. Speed-up is "
            "the original’s time over the row’s: above 1 the row is faster. It is marked where its 95 % interval "
            "leaves out 1; a prefill where the ranges of at least 4 repeats do not overlap. Median steps do not show "
            "what a converted layer does once in W tokens; the mean, in the file, does. Contexts marked ° were filled "
            "in but for their first part, not read.",
            "small",
        ),
    )


def _name(result: dict[str, Any], found: dict[str, Any]) -> str:
    """A row's name, with its mode where it has several."""
    several = len(result["modes"].get(found["row"], ())) > 1
    return f"{found['row']}, {found['mode']}" if several and found["mode"] else found["row"]


def _where(result: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The columns of `_where_titles`."""
    filled = "°" if found.get("filled") else ""
    return [f"{found['context']}{filled}", str(found["batch"])][: len(_where_titles(result))]


def _where_titles(result: dict[str, Any]) -> list[str]:
    """Context, and batch where there are several."""
    return ["context", "batch"] if len(result["batches"]) > 1 else ["context"]


def _speedups(result: dict[str, Any]) -> str:
    """How many times as fast as the original the student decodes, at every context and batch."""
    pairs = [pair for pair in result["comparisons"] if pair["row"] == STUDENT]
    if not pairs:
        return ""
    pairs.sort(key=lambda pair: (pair["batch"], pair["context"]))
    points = [
        Point(STUDENT, pair["speedup"]["p50"], _interval(pair), ", batch ".join(_where(result, pair))) for pair in pairs
    ]
    title = "Speed-up of the student over the original while decoding"
    places = "context and batch" if len(result["batches"]) > 1 else "context"
    rows = [[pair["context"], pair["batch"], point.value, *ends(point.ci95)] for pair, point in zip(pairs, points)]
    data = Data("speed-ups", ["context", "batch", "speed-up", "low", "high"], rows)
    svg = plots.plot_intervals("speedups", title, points, "times as fast; right is better", 1)
    return page.figure(svg, f"{title}, by {places}. At the line: as fast as the original.", data)


def _interval(pair: dict[str, Any]) -> tuple[float, float]:
    """The 95 % interval of a speed-up; the range of the repeats where there is none."""
    low, high = pair["speedup"]["ci95"] or (pair["speedup"]["min"], pair["speedup"]["max"])
    return low, high


def _figures(result: dict[str, Any], batch: int) -> str:
    """Time, prefill and bytes by context at one batch."""
    at = f", batch {batch}" if len(result["batches"]) > 1 else ""
    cells = [cell for cell in result["cells"] if cell["batch"] == batch]
    read = [found for found in prefills(result) if found["batch"] == batch]
    times = _lines(result, cells, lambda cell: cell["ms_per_token"])
    seconds = _lines(result, read, lambda found: {key: value / 1e3 for key, value in found["ms"].items()})
    held = _held(result, batch)
    plans = [
        ("decode", f"Time per token while decoding{at}", "ms per token", times, "bars span the repeats’ medians"),
        ("prefill", f"Time of the prefill{at}", "seconds", seconds, "bars span the repeats"),
        ("cache", f"Bytes held between two tokens{at}", "cache, MiB", held, "in the mode that holds least"),
    ]
    figures = []
    for name, title, unit, lines, remark in plans:
        if not lines:
            continue
        contexts = sorted({int(x) for line in lines for x in line.x})
        svg = plots.plot_lines(f"{name}{batch}", title, lines, "context in tokens", unit, ticks=contexts)
        rows: list[list[Any]] = []
        for line in lines:
            bars = [] if line.low is None or line.high is None else [line.low, line.high]
            rows += [[line.name, *values] for values in zip(line.x, line.y, *bars)]
        head = ["row", "context", unit, "low", "high"][: len(rows[0])]
        data = Data(f"{name}-batch-{batch}", head, rows)
        figures.append(page.figure(svg, f"{title}; {remark}. Lower is better.", data))
    return page.figures(*figures)


def _lines(
    result: dict[str, Any], found: list[dict[str, Any]], spread: Callable[[dict[str, Any]], dict[str, float]]
) -> list[Line]:
    """One line a row and mode; the first mode of a row is drawn solid."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in sorted(found, key=lambda one: one["context"]):
        by_name.setdefault(_name(result, one), []).append(one)
    lines = []
    for name, points in by_name.items():
        parts = [spread(point) for point in points]
        lines.append(
            Line(
                points[0]["row"],
                [point["context"] for point in points],
                [part["p50"] for part in parts],
                # The median of all steps may lie outside the range of the repeats' medians.
                [min(part["min"], part["p50"]) for part in parts],
                [max(part["max"], part["p50"]) for part in parts],
                label=name,
                hollow=points[0]["mode"] not in ("", "dynamic"),
            )
        )
    return lines


def _held(result: dict[str, Any], batch: int) -> list[Line]:
    """The smallest cache of each row by context; rows that hold nothing are left out."""
    held: dict[str, dict[int, int]] = {}
    for (context, size_of_batch), rows in smallest_caches(result).items():
        if size_of_batch == batch:
            for row, total in rows.items():
                held.setdefault(row, {})[context] = total
    return [
        Line(row, sorted(known), [known[context] / 2**20 for context in sorted(known)])
        for row, known in held.items()
        if all(known.values())
    ]


def _time_table(result: dict[str, Any]) -> str:
    def key(found: dict[str, Any]) -> tuple[Any, ...]:
        return found["row"], found["context"], found["batch"], found["mode"]

    pairs = {key(pair): pair for pair in result["comparisons"]}
    body, rows = [], []
    for cell in result["cells"]:
        times, pair = cell["ms_per_token"], pairs.get(key(cell))
        line: list[str | Cell] = [_name(result, cell), *_where(result, cell), number(times["p50"])]
        line += [span((times["min"], times["max"])), number(times["p95"]), number(cell["tokens_per_s"])]
        line.append(DASH if cell["share_of_bound"] is None else percent(cell["share_of_bound"]))
        speedup: list[float | None] = [None, None, None]
        if pair is None:
            line.append(DASH)
        else:
            middle, interval = pair["speedup"]["p50"], _interval(pair)
            speedup = [middle, *ends(interval)]
            line.append(Cell(f"{number(middle)} ({span(interval)})", VERDICTS.get(pair["verdict"], "")))
        body.append([*line, f"{cell['repeats']}{', compiled again' if cell['recompiles'] else ''}"])
        rows.append(
            [cell["row"], cell["mode"], cell["context"], cell["batch"]]
            + [times[part] for part in ("p50", "min", "max", "p95", "mean")]
            + [cell["tokens_per_s"], *speedup, cell["repeats"], cell["recompiles"], cell["weight_bytes"]]
            + [cell["bound_ms"], cell["share_of_bound"]]
        )
    head = [
        "row",
        *_where_titles(result),
        "ms per token, median",
        "repeats’ medians",
        "p95",
        "tokens/s",
        "of the bound",
        "speed-up",
    ]
    columns = ["row", "mode", "context", "batch", "ms p50", "ms low", "ms high", "ms p95", "ms mean", "tokens/s"]
    columns += [
        "speed-up",
        "speed-up low",
        "speed-up high",
        "repeats",
        "recompiles",
        "weight bytes",
        "bound ms",
        "share of bound",
    ]
    batch = "" if len(result["batches"]) > 1 else f", batch {result['batches'][0]}"
    caption = (
        f"Decoding {result['decode_tokens']} tokens a repeat{batch}, on {result['device']}, "
        f"CPU threads: {result['threads']}, {', '.join(sorted(set(result['dtypes'].values())))}"
    )
    return page.table(caption, [*head, "repeats"], body, strong=STUDENT, data=Data("decode-times", columns, rows))


def _prefill_table(result: dict[str, Any]) -> str:
    found = sorted(prefills(result), key=lambda one: (one["context"], one["batch"]))
    if not found:
        return ""
    best: dict[tuple[int, int], dict[str, float]] = {}
    for one in found:
        place = one["context"], one["batch"]
        if one["row"] == BASELINE and (place not in best or one["ms"]["p50"] < best[place]["p50"]):
            best[place] = one["ms"]
    body, rows = [], []
    for one in found:
        times, theirs = one["ms"], best.get((one["context"], one["batch"]))
        line: list[str | Cell] = [_name(result, one), *_where(result, one), number(times["p50"])]
        line.append(span((times["min"], times["max"])))
        ratio = None
        if theirs is None or one["row"] == BASELINE:
            line.append(DASH)
        else:
            ratio = theirs["p50"] / times["p50"]
            verdict = of_ranges((times["min"], times["max"]), (theirs["min"], theirs["max"]), one["repeats"])
            line.append(Cell(number(ratio), tone(verdict)))
        body.append([*line, str(one["repeats"])])
        rows.append(
            [one["row"], one["mode"], one["context"], one["batch"], times["p50"], times["min"], times["max"], ratio]
        )
    head = ["row", *_where_titles(result), "ms, median", "range", "speed-up", "repeats"]
    columns = ["row", "mode", "context", "batch", "ms p50", "ms low", "ms high", "speed-up"]
    data = Data("prefill-times", columns, rows)
    return page.table("Prefill: the context read into the cache", head, body, strong=STUDENT, data=data)


def _bytes_table(result: dict[str, Any]) -> str:
    parts = ("total", "softmax", "window", "state")
    smallest = smallest_caches(result)
    body, rows = [], []
    for cell in result["cells"]:
        held, other = cell["cache_bytes"], smallest[cell["context"], cell["batch"]][BASELINE]
        verdict = ""
        if cell["row"] != BASELINE:
            verdict = "good" if held["total"] < other else "bad" if held["total"] > other else ""
        line: list[str | Cell] = [_name(result, cell), *_where(result, cell), Cell(size(held["total"]), verdict)]
        body.append([*line, *(size(held[part]) for part in parts[1:])])
        rows.append([cell["row"], cell["mode"], cell["context"], cell["batch"], *(held[part] for part in parts)])
    head = ["row", *_where_titles(result), "all", "of it softmax layers", "window", "state"]
    data = Data("cache-bytes", ["row", "mode", "context", "batch", *parts], rows)
    return page.table("Bytes of the cache, without the model’s weights", head, body, strong=STUDENT, data=data)
