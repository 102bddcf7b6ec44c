"""The report's section on a bench.json: time, prefill and bytes by context and batch."""

from typing import Any

from linearize.benchmarks import page, plots
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.headline import batch_of
from linearize.benchmarks.page import Cell, Data, Section
from linearize.benchmarks.plots import Line
from linearize.benchmarks.summary import number, size

__all__ = ["speed_section"]

DASH = "–"
VERDICTS = {"faster": "good", "slower": "bad"}


def speed_section(result: dict[str, Any]) -> Section:
    """Figures and tables, one figure of each kind a batch."""
    batches = sorted({batch_of(cell, result) for cell in result["cells"]})
    figures = [_figures(result, batch, len(batches) > 1) for batch in batches] if plots.available() else []
    several = "" if len(batches) > 1 else f", batch {batches[0]}"
    caption = (
        f"Decoding {result['decode_tokens']} tokens a repeat{several}, on {result['device']}, "
        f"CPU threads: {result['threads']}, {', '.join(sorted(set(result['dtypes'].values())))}"
    )
    return page.section(
        "Speed and memory",
        *figures,
        _time_table(result, f"{caption}; the original’s time over the row’s: above 1 the row is faster"),
        _prefill_table(result),
        _bytes_table(result),
        page.paragraph(
            "Rows take turns within each repeat. The original is measured under a growing cache (dynamic) and a "
            "preallocated one (static); the better one at each context is what others are compared with. "
            "Marks: all repeats agree (time), the ranges do not overlap (prefill). Nothing is compiled.",
            "small",
        ),
    )


def _title(cell: dict[str, Any]) -> str:
    """A row's name, with its cache where that is a choice."""
    return f"{cell['row']}, {cell['cache']} cache" if cell["row"] == BASELINE else cell["row"]


def _lines(result: dict[str, Any], batch: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(row, cache) -> its cells of one batch, by context."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in sorted(result["cells"], key=lambda cell: cell["context"]):
        if batch_of(cell, result) == batch:
            lines.setdefault((cell["row"], cell["cache"]), []).append(cell)
    return lines


def _figures(result: dict[str, Any], batch: int, several: bool) -> str:
    found, at = _lines(result, batch), f", batch {batch}" if several else ""
    contexts = sorted({cell["context"] for cells in found.values() for cell in cells})

    def spread(key: str, scale: float = 1.0) -> list[Line]:
        lines = []
        for (row, cache), cells in found.items():
            parts = [cell[key] for cell in cells]
            lines.append(
                Line(
                    row,
                    [cell["context"] for cell in cells],
                    [part["p50"] * scale for part in parts],
                    [min(part["min"], part["p50"]) * scale for part in parts],
                    [max(part["max"], part["p50"]) * scale for part in parts],
                    label=f"{row}, {cache}" if row == BASELINE else "",
                    hollow=cache == "static",
                )
            )
        return lines

    held = [
        Line(row, [cell["context"] for cell in cells], [cell["cache_bytes"]["total"] / 2**20 for cell in cells])
        for (row, cache), cells in found.items()
        if cache == "dynamic" and all(cell["cache_bytes"]["total"] for cell in cells)
    ]
    plans = [
        (
            "decode",
            f"Time per token while decoding{at}",
            "ms per token",
            spread("ms_per_token"),
            "bars span the repeats’ medians",
        ),
        ("prefill", f"Time of the prefill{at}", "seconds", spread("prefill_ms", 1e-3), "bars span the repeats"),
        ("cache", f"Bytes held between two tokens{at}", "cache, MiB", held, "preallocated caches left out"),
    ]
    figures = []
    for name, title, unit, lines, remark in plans:
        if not lines:
            continue
        svg = plots.plot_lines(f"{name}{batch}", title, lines, "context in tokens", unit, ticks=contexts)
        head, rows = ["row", "context", unit], []
        if lines[0].low is not None:
            head += ["low", "high"]
        for line in lines:
            ends = [] if line.low is None or line.high is None else [line.low, line.high]
            rows += [[line.name, *values] for values in zip(line.x, line.y, *ends)]
        figures.append(
            page.figure(svg, f"{title}; {remark}. Lower is better.", Data(f"{name}-batch-{batch}", head, rows))
        )
    return page.figures(*figures)


def _where(result: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """A cell's context, and its batch where there are several."""
    return [str(cell["context"]), str(batch_of(cell, result))][: len(_where_titles(result))]


def _where_titles(result: dict[str, Any]) -> list[str]:
    return ["context", "batch"] if len({batch_of(cell, result) for cell in result["cells"]}) > 1 else ["context"]


def _time_table(result: dict[str, Any], caption: str) -> str:
    pairs = {(pair["row"], pair["context"], batch_of(pair, result)): pair for pair in result["comparisons"]}
    # Shares of the bound are there where a bandwidth was measured.
    bounded = any(_share(cell) is not None for cell in result["cells"])
    body, rows = [], []
    for cell in result["cells"]:
        times, pair = cell["ms_per_token"], pairs.get((cell["row"], cell["context"], batch_of(cell, result)))
        line: list[str | Cell] = [_title(cell), *_where(result, cell), number(times["p50"])]
        line += [
            f"{number(times['min'])} to {number(times['max'])}",
            number(times["p95"]),
            number(cell["tokens_per_s"]),
        ]
        speedup: list[float | None] = [None, None, None]
        if pair is None:
            line.append(DASH)
        else:
            ratio = pair["speedup"]
            speedup = [ratio["p50"], ratio["min"], ratio["max"]]
            text = f"{number(ratio['p50'])} ({number(ratio['min'])} to {number(ratio['max'])})"
            line.append(Cell(text, VERDICTS.get(pair["verdict"], "")))
        if bounded:
            share = _share(cell)
            line.append(DASH if share is None else f"{100 * share:.0f} %")
        body.append([*line, str(cell["repeats"])])
        rows.append(
            [cell["row"], cell["cache"], cell["context"], batch_of(cell, result)]
            + [times[key] for key in ("p50", "min", "max", "p95", "mean")]
            + [cell["tokens_per_s"], *speedup, _share(cell), cell["repeats"]]
        )
    head = ["row", *_where_titles(result), "ms per token, median", "repeats’ medians", "p95", "tokens/s", "speed-up"]
    head += (["share of the bandwidth bound"] if bounded else []) + ["repeats"]
    columns = ["row", "cache", "context", "batch", "ms p50", "ms low", "ms high", "ms p95", "ms mean", "tokens/s"]
    columns += ["speed-up", "speed-up low", "speed-up high", "share of bound", "repeats"]
    return page.table(caption, head, body, strong=STUDENT, data=Data("decode-times", columns, rows))


def _share(cell: dict[str, Any]) -> float | None:
    """The part of its bound, bytes that must move over the bandwidth, that a cell reaches; None where not known."""
    return cell.get("bound_share")


def _prefill_table(result: dict[str, Any]) -> str:
    best: dict[tuple[int, int], dict[str, float]] = {}
    for cell in result["cells"]:
        if cell["row"] == BASELINE:
            key = cell["context"], batch_of(cell, result)
            if key not in best or cell["prefill_ms"]["p50"] < best[key]["p50"]:
                best[key] = cell["prefill_ms"]
    body, rows = [], []
    for cell in result["cells"]:
        times, theirs = cell["prefill_ms"], best.get((cell["context"], batch_of(cell, result)))
        line: list[str | Cell] = [_title(cell), *_where(result, cell), number(times["p50"])]
        line.append(f"{number(times['min'])} to {number(times['max'])}")
        ratio = None if theirs is None or cell["row"] == BASELINE else theirs["p50"] / times["p50"]
        if ratio is None or theirs is None:
            line.append(DASH)
        else:
            apart = "good" if times["max"] < theirs["min"] else "bad" if times["min"] > theirs["max"] else ""
            line.append(Cell(number(ratio), apart))
        body.append(line)
        rows.append(
            [cell["row"], cell["cache"], cell["context"], batch_of(cell, result)]
            + [times[key] for key in ("p50", "min", "max")]
            + [ratio]
        )
    head = ["row", *_where_titles(result), "ms, median", "range", "speed-up"]
    columns = ["row", "cache", "context", "batch", "ms p50", "ms low", "ms high", "speed-up"]
    data = Data("prefill-times", columns, rows)
    return page.table("Prefill: the context read into the cache", head, body, strong=STUDENT, data=data)


def _bytes_table(result: dict[str, Any]) -> str:
    parts = ("total", "softmax", "window", "state")
    theirs = {
        (cell["context"], batch_of(cell, result)): cell["cache_bytes"]["total"]
        for cell in result["cells"]
        if (cell["row"], cell["cache"]) == (BASELINE, "dynamic")
    }
    body, rows = [], []
    for cell in result["cells"]:
        held, other = cell["cache_bytes"], theirs.get((cell["context"], batch_of(cell, result)))
        verdict = ""
        if other is not None and cell["row"] != BASELINE:
            verdict = "good" if held["total"] < other else "bad" if held["total"] > other else ""
        line: list[str | Cell] = [_title(cell), *_where(result, cell), Cell(size(held["total"]), verdict)]
        body.append([*line, *(size(held[part]) for part in parts[1:])])
        rows.append(
            [cell["row"], cell["cache"], cell["context"], batch_of(cell, result), *(held[part] for part in parts)]
        )
    head = ["row", *_where_titles(result), "all", "of it softmax layers", "window", "state"]
    data = Data("cache-bytes", ["row", "cache", "context", "batch", *parts], rows)
    return page.table("Bytes of the cache, without the model’s weights", head, body, strong=STUDENT, data=data)
