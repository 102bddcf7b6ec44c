"""The results of commands as tables on stdout. Notes and progress go to stderr, so results can be piped."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linearize.console import human_bytes, human_tokens

if TYPE_CHECKING:
    from linearize.inspection import Inspection

__all__ = ["print_bench", "print_evaluation", "print_inspection", "print_json", "print_table"]

PIPE_WIDTH = 200  # a file or a pipe has no width to fit into


def print_json(data: Any) -> None:
    """JSON for programs."""
    print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] = ()) -> None:
    """Print a table; columns of numbers align right, `total` is set apart below the rows."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = all(row[index][:1].isdigit() or row[index] == "-" for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_section()
        table.add_row(*total)
    console = Console(file=sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)


def print_inspection(plan: "Inspection") -> None:
    """The plan of a conversion, layer by layer, and what it comes to."""
    contexts = [human_tokens(tokens) for tokens in plan.contexts]
    columns = ["layer", "old attention", "new attention", "kv heads", "head_dim"]
    columns += [*(f"KV at {context}" for context in contexts), "after", "break-even"]
    rows = [
        [
            str(layer.layer),
            layer.old,
            layer.new if layer.converted else "as it is",
            str(layer.kv_heads),
            str(layer.head_dim),
            *map(human_bytes, layer.kv_bytes),
            human_bytes(layer.new_bytes[0]) if layer.converted else "as before",
            str(layer.break_even) if layer.converted else "-",
        ]
        for layer in plan.layers
    ]
    before, after = plan.kv_bytes, plan.new_bytes
    total = ["all", *[""] * 4, *map(human_bytes, before), "", ""]
    print_table(f"{plan.model}: {plan.family}, one sequence, cache in {plan.dtype}", columns, rows, total)
    print(f"{plan.converted} of {len(plan.layers)} layers would be converted. The whole cache of one sequence:")
    for context, old, new in zip(contexts, before, after):
        change = f"{old / new:.3g} times smaller" if old > new else f"{new / old:.3g} times larger"
        print(f"  at {context} tokens  {human_bytes(old)} -> {human_bytes(new)}, {change}")
    even = max(layer.break_even or 0 for layer in plan.layers)
    print(f"A converted layer caches less than the original from {even} tokens on, however long the context becomes.")
    if plan.positions is not None and max(plan.contexts) > plan.positions:
        print(f"The model was made for {plan.positions} tokens; longer contexts show the arithmetic only.")


def print_evaluation(result: dict[str, Any]) -> None:
    """The rows of evaluate.json side by side."""
    part = result["perplexity"]
    columns = ["row", "perplexity", "95 % interval"]
    choices, needle = result["choices"], result["needle"]
    columns += ["multiple choice"] if choices else []
    columns += ["needle first", "needle written"] if needle else []
    rows = []
    for name in result["rows"]:
        found = part["rows"][name]
        row = [name, _number(found["ppl"]), _interval(found["ppl_ci95"])]
        row += [f"{100 * choices['rows'][name]['normalised']['accuracy']:.1f} %"] if choices else []
        if needle:
            row += [f"{100 * needle['rows'][name][key]:.0f} %" for key in ("first", "greedy")]
        rows.append(row)
    print_table(f"{part['n_tokens']} scored tokens, {part['n_sequences']} x {part['seq_len']}", columns, rows)
    for line in result["notes"]:
        print(line)


def print_bench(result: dict[str, Any]) -> None:
    """The cells of bench.json, and from which context on each row is faster."""
    rows = [
        [
            human_tokens(cell["context"]),
            f"{cell['row']}, {cell['cache']} cache" if cell["row"] == result["baseline"] else cell["row"],
            f"{cell['ms_per_token']['p50']:.2f}",
            f"{cell['ms_per_token']['p95']:.2f}",
            f"{cell['prefill_ms']['p50']:.0f}",
            human_bytes(cell["cache_bytes"]["total"]),
        ]
        for cell in result["cells"]
    ]
    title = f"decode, batch {result['batch']}, {result['threads']} threads, {result['device']}"
    print_table(title, ["context", "row", "ms per token", "p95", "prefill ms", "cache"], rows)
    for name, found in result["crossover"].items():
        print(f"{name}: {_crossover(found)}")
    for dropped in result["dropped"]:
        print(f"context {human_tokens(dropped['context'])} left out: {dropped['reason']}")


def _crossover(found: dict[str, Any]) -> str:
    measured = human_tokens(found["measured_to"])
    return {
        "everywhere": "faster than the original at every measured context",
        "at": f"faster than the original from about {found['context'] or 0:.0f} tokens on",
        "never": f"slower than the original at every measured context, up to {measured}",
        "mixed": "faster at some contexts and slower at others: the measurement is too noisy for a crossover",
    }[found["kind"]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
