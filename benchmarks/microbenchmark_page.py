"""The result of the microbenchmark as a page: times, growth, crossover, and what the times are worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.benchmarks.files import write_json, write_text

__all__ = ["markdown", "write_result"]


def write_result(path: Path, result: dict[str, Any]) -> tuple[Path, Path]:
    """`path` as JSON, and the page beside it with the ending .md."""
    return write_json(path, result), write_text(path.with_suffix(".md"), markdown(result))


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    shape, machine = result["shape"], result["machine"]
    cpu = machine["cpu"]
    where = (
        machine["gpu"]["name"]
        if machine["gpu"] and result["device"] != "cpu"
        else f"{cpu['model']}, {cpu['usable']} cores"
    )
    load = "" if result["load"] is None else f", load before {result['load'][0]}"
    lines = [
        f"# Near-and-far attention alone: {result['model']}, {result['device']}",
        "",
        f"One layer, batch {shape['batch']}, {shape['heads']} query heads, {shape['kv_heads']} key-value heads of "
        f"{shape['head_dim']}, {2 * shape['feature_dim']} features, W = {shape['window']}, S = {shape['sinks']}. "
        f"{where}, {machine['threads']} threads{load}; torch {machine['versions']['torch']}, linearize "
        f"{machine['versions']['linearize']}, {machine['date'][:10]}; written by `{machine['command']}`.",
        "",
        f"Milliseconds: median (least to most) of {result['repeats']} interleaved repeats, warm. A fixed matrix "
        f"product took {result['matmul_ms']['before']:.2f} ms before and {result['matmul_ms']['after']:.2f} ms after.",
    ]
    for what, dtype in dict.fromkeys((cell["what"], cell["dtype"]) for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if (cell["what"], cell["dtype"]) == (what, dtype)]
        rows = list(dict.fromkeys(cell["row"] for cell in cells))
        title = {"forward": "Forward", "backward": "Forward and backward", "decode": "One decoded token"}[what]
        lines += ["", f"## {title}, {dtype}", ""]
        lines += _row(["tokens", *rows, *(f"{row}, tokens/s" for row in rows)])
        lines += _row(["---"] * (2 * len(rows) + 1))
        for tokens in dict.fromkeys(cell["tokens"] for cell in cells):
            by_row = {cell["row"]: cell for cell in cells if cell["tokens"] == tokens}
            lines += _row(
                [
                    str(tokens),
                    *(_ms(by_row[row]["ms"]) for row in rows),
                    *(f"{by_row[row]['tokens_per_s']:.0f}" for row in rows),
                ]
            )
        lines.append("")
        for growth in result["growth"]:
            if (growth["what"], growth["dtype"]) == (what, dtype):
                lines.append(
                    f"- {growth['row']}: {growth['to']} tokens take {growth['p50']:.2f} times as long as "
                    f"{growth['from']} (by the least times {growth['min']:.2f})."
                )
        for cross in result["crossover"]:
            if (cross["what"], cross["dtype"]) == (what, dtype):
                lines.append(f"- {cross['row']} {_crossover(cross)}.")
        lines += _worth_table(cells)
    lines += _footnotes(result)
    return "\n".join(lines) + "\n"


def _worth_table(cells: Sequence[dict[str, Any]]) -> list[str]:
    """What the times of one section are worth; nothing where none was counted."""
    rows = []
    for cell in cells:
        work = cell["work"]
        if work is not None:
            share = f"{100 * work['of_bound']:.0f} %"
            rates = f"{work['gb_s']:.3g}", f"{work['tflop_s']:.3g}", f"{work['bound_ms']:.3g}", share
            rows += _row([str(cell["tokens"]), cell["row"], *rates])
    if not rows:
        return []
    head = ["tokens", "row", "GB/s", "TFLOP/s", "bound, ms", "reached"]
    return ["", *_row(head), *_row(["---"] * len(head)), *rows]


def _footnotes(result: dict[str, Any]) -> list[str]:
    """The rates behind the bounds, and which rows are missing and why."""
    rates = result["bandwidth"]
    products = ", ".join(f"{rate:.4g} GFLOP/s in {dtype}" for dtype, rate in rates["matmul_gflop_s"].items())
    lines = [
        "",
        f"Bounds are at what was measured on this device before: {rates['read_gb_s']:.4g} GB/s read from memory, "
        f"matrix products {products}. Bytes and operations are counted by formula, and those of a backward pass "
        "include the forward pass; `reached` is the bound over the median, and may pass 100 % where inputs fit into "
        "the caches.",
    ]
    reasons: dict[str, list[str]] = {}
    for absent in result["absent"]:
        where = "" if absent["what"] is None else f" ({absent['what']}, {absent['dtype']})"
        reasons.setdefault(absent["reason"], []).append(f"{absent['row']}{where}")
    return lines + [line for reason, rows in reasons.items() for line in ("", f"No {', '.join(rows)}: {reason}.")]


def _row(columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |"]


def _ms(ms: dict[str, float]) -> str:
    return f"{ms['p50']:.3g} ({ms['min']:.3g} to {ms['max']:.3g})"


def _crossover(cross: dict[str, Any]) -> str:
    return {
        "at": f"is faster than SDPA from about {cross['context'] or 0:.0f} tokens on",
        "everywhere": f"is faster than SDPA at every length, up to {cross['measured_to']}",
        "never": f"is not faster than SDPA at any length up to {cross['measured_to']}",
        "mixed": f"is faster than SDPA at some lengths only, up to {cross['measured_to']}",
    }[cross["kind"]]
