"""The results of commands as tables on stdout. Notes and progress go to stderr, so results can be piped."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from linearize.console import human_bytes, human_tokens

if TYPE_CHECKING:
    from linearize.inspection import Inspection
    from linearize.training_memory import TrainingMemory

__all__ = [
    "print_bench",
    "print_evaluation",
    "print_families",
    "print_inspection",
    "print_json",
    "print_regression",
    "print_table",
    "print_training",
]

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


def print_families() -> None:
    """The known families, and those that are refused by name."""
    from linearize.families import FAMILIES, REFUSED, own_features

    rows = [[name, family.models, "; ".join(own_features(family)) or "-"] for name, family in FAMILIES.items()]
    print_table("Families that can be converted", ["model_type", "models", "attention, beside Llama's"], rows)
    print("Tested on small random models: with a window that covers the text, the converted model is the original.")
    print("Layers that have a sliding window of their own stay as they are. Refused:")
    for why in dict.fromkeys(REFUSED.values()):
        print(f"  {', '.join(name for name in REFUSED if REFUSED[name] == why)}: {why}")


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


def print_training(memory: "TrainingMemory") -> None:
    """The memory of one GPU in each training stage, part by part."""
    parts = ["weights", "teacher", "trained", *(["gathered"] if memory.fsdp else []), "kept", "logits", "layer"]
    rows = []
    for stage in memory.stages:
        sizes = [getattr(stage, part) for part in parts] + [stage.total]
        name = f"{stage.stage}, checkpointing" if stage.checkpointing else stage.stage
        rows.append([name, *(human_bytes(size) if size else "-" for size in sizes)])
    title = f"{memory.model}: {memory.family}, {memory.parameters / 1e9:.3g}e9 parameters, {memory.dtype}"
    print_table(title, ["one GPU", *parts, "at the peak"], rows)
    spread = "one GPU" if memory.processes == 1 else f"{memory.processes} GPUs"
    if memory.processes > 1:
        spread += ", frozen weights divided by FSDP2" if memory.fsdp else ", everything on each (DDP)"
    print(f"{spread}; {memory.batch_size} x {memory.seq_len} tokens on each.")
    print("The peak is weights, teacher, trained and gathered, and the larger of kept + logits and kept + layer.")
    print("Computed, not measured: allow 0.5 to 1 GiB for the GPU's own and 5 to 20 % for the allocator.")


def print_evaluation(result: dict[str, Any]) -> None:
    """The rows of evaluate.json side by side."""
    columns, cells = _evaluation_columns(result)
    if not columns:
        print("Nothing was measured for all rows.")
    else:
        rows = [[name, *(cell(name) for cell in cells)] for name in result["rows"]]
        part = result["perplexity"]
        title = f"{part['n_tokens']} scored tokens, {part['n_sequences']} x {part['seq_len']}" if part else "evaluation"
        print_table(title, ["row", *columns], rows)
    # A result of an older version has no such keys.
    for key, show in (
        ("needle", _print_needle),
        ("recall", _print_recall),
        ("letters", _print_letters),
        ("attention", _print_attention),
        ("lm_eval", _print_harness),
    ):
        if result.get(key):
            show(result[key], result["baseline"])
    for line in result["notes"]:
        print(line)


def _print_needle(part: dict[str, Any], baseline: str) -> None:
    """By kind and number of keys, where several were hidden."""
    sorts = list(dict.fromkeys((c.get("kind", "digits"), c.get("keys", 1)) for c in part["rows"][baseline]["cells"]))
    if len(sorts) < 2:
        return

    def share(row: str, sort: tuple[str, int], score: str) -> str:
        cells = [cell for cell in part["rows"][row]["cells"] if (cell["kind"], cell["keys"]) == sort]
        return _percent(sum(cell[score] * cell["trials"] for cell in cells) / sum(cell["trials"] for cell in cells))

    heads = [f"{kind}, {keys} {'key' if keys == 1 else 'keys'}" for kind, keys in sorts]
    rows = [[row, *(f"{share(row, s, 'greedy')} / {share(row, s, 'first')}" for s in sorts)] for row in part["rows"]]
    print_table("needle: written / ranked first of ten", ["row", *heads], rows)


def _print_recall(part: dict[str, Any], baseline: str) -> None:
    """One table a probe: how often the answer is the likeliest of its candidates, and of the whole vocabulary."""
    for probe, found in part["probes"].items():
        cells = found["rows"][baseline]["cells"]
        heads = [f"at {human_tokens(c['length'])}" + (f", {c['pairs']} pairs" if c["pairs"] else "") for c in cells]
        minus = {one["row"]: one for one in found["comparisons"] if one["against"] == baseline}
        rows = [
            [
                name,
                _percent(row["first"]),
                _percents(row["first_ci95"]),
                _signed(minus.get(name), "first_difference", "first_ci95"),
                _percent(row["greedy"]),
                *(_percent(cell["first"]) for cell in row["cells"]),
            ]
            for name, row in found["rows"].items()
        ]
        chance = [
            "guessing",
            _percent(found["chance_first"]),
            "",
            "",
            "",
            *(_percent(c["chance_first"]) for c in cells),
        ]
        title = f"recall, {probe}: {found['n_answers']} answers in {found['n_prompts']} prompts"
        columns = ["row", "first", "95 % interval", f"minus {baseline}", "greedy", *heads]
        print_table(title, columns, rows, chance)


def _print_letters(part: dict[str, Any], baseline: str) -> None:
    """One table a task."""
    for task, found in part.items():
        minus = {one["row"]: one for one in found["comparisons"] if one["against"] == baseline}
        rows = [
            [
                name,
                _percent(row["accuracy"]),
                _percents(row["ci95"]),
                _signed(minus.get(name), "accuracy_difference", "ci95"),
                _percent(row["consistency"]),
                *map(_percent, row["letters"]),
            ]
            for name, row in found["rows"].items()
        ]
        right = ["guessing; right", _percent(found["chance"]), "", "", _percent(found["chance_consistency"])]
        title = f"{task} by letter: {found['n_items']} questions in every cyclic order"
        columns = ["row", "right", "95 % interval", f"minus {baseline}", "same in all orders", *found["letters"]]
        print_table(title, columns, rows, [*right, *map(_percent, found["true"])])


def _print_attention(part: dict[str, Any], baseline: str) -> None:
    """Means over layers and heads, and heads that bypass the state."""
    rows = []
    for name, row in part["rows"].items():
        bypassed = row["bypassed"]
        share = "-" if bypassed is None or name == baseline else f"{bypassed['heads']} of {bypassed['of']}"
        rows.append([name, *(_percent(row["mean"][key]) for key in ("sinks", "window", "older")), share])
    title = f"attention at {human_tokens(part['seq_len'])} tokens, mean of converted layers and heads"
    if rows:
        print_table(title, ["row", "sinks", "window", "older", "heads that bypass the state"], rows)
    for name, reason in part["not_measured"].items():
        print(f"attention of {name}: not measured; {reason}")


def _print_harness(part: dict[str, Any], baseline: str) -> None:
    """One line a row and metric, and what is kept above guessing where that is known."""
    for task, found in part.items():
        rows = [
            [
                name,
                metric,
                _decimals(one["value"]),
                _decimals(one["stderr"]),
                "-" if one["retention_over_chance"] is None else _kept(one["retention_over_chance"]),
            ]
            for name, row in found["rows"].items()
            for metric, one in row.items()
        ]
        questions = "" if found["n_samples"] is None else f", {found['n_samples']} questions"
        columns = ["row", "metric", "value", "standard error", f"kept of {baseline} above guessing"]
        print_table(f"lm-eval: {task}{questions}", columns, rows)


def _evaluation_columns(result: dict[str, Any]) -> tuple[list[str], list[Callable[[str], str]]]:
    """Heads of columns, and for each what a row's cell says; what was not measured has none."""
    columns: list[tuple[str, Callable[[str], str]]] = []

    def perplexity(head: str, part: dict[str, Any], interval: bool) -> None:
        columns.append((head, lambda row: _number(part["rows"][row]["ppl"])))
        if interval:
            columns.append(("95 % interval", lambda row: _interval(part["rows"][row]["ppl_ci95"])))

    def accuracy(head: str, task: dict[str, Any]) -> None:
        kind = "normalised" if "normalised" in task["rows"][result["baseline"]] else "raw"
        columns.append((head, lambda row: f"{100 * task['rows'][row][kind]['accuracy']:.1f} %"))

    parts = [(text, part) for text, by_context in result["texts"].items() for part in by_context.values()]
    for text, part in parts:
        name = text if len(result["texts"]) > 1 else "perplexity"
        perplexity(name if len(parts) == 1 else f"{name} at {human_tokens(part['seq_len'])}", part, len(parts) == 1)
    for name, task in result["tasks"].items():
        accuracy(name, task)
    needle, kl, generation = result["needle"], result["kl"], result["generation"]
    if needle:
        columns.append(("needle first", lambda row: f"{100 * needle['rows'][row]['first']:.0f} %"))
        columns.append(("needle written", lambda row: f"{100 * needle['rows'][row]['greedy']:.0f} %"))
    if kl:
        columns.append(("KL", lambda row: _decimals(kl["rows"][row]["kl"]) if row in kl["rows"] else "0"))
    if generation:
        columns.append(("ended", lambda row: f"{100 * generation['rows'][row]['end_rate']:.0f} %"))
        columns.append(("repeated", lambda row: f"{100 * generation['rows'][row]['repetition']:.0f} %"))
    return [head for head, _ in columns], [cell for _, cell in columns]


def print_bench(result: dict[str, Any]) -> None:
    """The cells of bench.json, a table for each batch, and from which context on each row is faster."""
    best = {(pair["row"], pair["context"], pair["batch"], pair["mode"]): pair for pair in result["comparisons"]}
    columns = [
        "context",
        "row",
        "mode",
        "ms per token",
        "p95",
        "tokens/s",
        "of bound",
        "times as fast",
        "prefill ms",
        "cache",
    ]
    for batch in result["batches"]:
        rows = []
        for cell in result["cells"]:
            if cell["batch"] != batch:
                continue
            pair = best.get((cell["row"], cell["context"], batch, cell["mode"]))
            rows.append(
                [
                    human_tokens(cell["context"]),
                    cell["row"],
                    cell["mode"],
                    f"{cell['ms_per_token']['p50']:.2f}",
                    f"{cell['ms_per_token']['p95']:.2f}",
                    f"{cell['tokens_per_s']:.1f}",
                    "-" if cell["share_of_bound"] is None else f"{100 * cell['share_of_bound']:.0f} %",
                    "-" if pair is None else _speedup(pair["speedup"]),
                    "-" if cell["prefill_ms"] is None else f"{cell['prefill_ms']['p50']:.0f}",
                    human_bytes(cell["cache_bytes"]["total"]),
                ]
            )
        title = f"decode, batch {batch}, {result['threads']} threads, {result['device']}"
        print_table(title, columns, rows)
    if result["prefill"]:
        rows = [
            [human_tokens(found["length"]), found["row"], f"{found['ms']['p50']:.0f}"] for found in result["prefill"]
        ]
        print_table(f"prefill, batch {result['prefill'][0]['batch']}", ["tokens", "row", "ms"], rows)
    for found in result["crossover"]:
        batch = f", batch {found['batch']}" if len(result["batches"]) > 1 else ""
        print(f"{found['row']}{batch}: {_crossover(found)}")
    for line in _bench_notes(result):
        print(line)


def _speedup(speedup: dict[str, Any]) -> str:
    """A ratio with its 95 % interval."""
    return f"{speedup['p50']:.2f} ({_interval(speedup['ci95'])})"


def _bench_notes(result: dict[str, Any]) -> list[str]:
    """What else was found, what was left out, and what went wrong."""
    lines = [
        f"{found['row']}: prefill of {human_tokens(found['to'])} tokens takes {found['ratio']:.1f} times as long as of "
        f"{human_tokens(found['from'])}"
        for found in result["prefill_growth"]
    ]
    filled = sorted({cell["context"] for cell in result["cells"] if cell["filled"]})
    if filled:
        contexts = ", ".join(map(human_tokens, filled))
        lines.append(f"context {contexts}: a part was read and the rest filled in, in the larger batches at least")
    for dropped in result["dropped"]:
        place = f"{human_tokens(dropped['context'])}, batch {dropped['batch']}"
        lines.append(f"{'context' if dropped['what'] == 'decode' else 'prefill'} {place} left out: {dropped['reason']}")
    lines += [f"{skipped['row']}, {skipped['mode']} left out: {skipped['reason']}" for skipped in result["skipped"]]
    for cell in result["cells"]:
        where = f"{cell['row']}, {cell['mode']}, context {human_tokens(cell['context'])}, batch {cell['batch']}"
        if cell["recompiles"]:
            lines.append(f"{where}: compiled {cell['recompiles']} times during timed steps; do not trust its time")
        if cell["skipped_graphs"]:
            lines.append(f"{where}: {cell['skipped_graphs']} graphs ran without CUDA graphs")
    moved = sum(block["moved"] for block in result["blocks"])
    if moved:
        blocks = len(result["blocks"])
        lines.append(f"the machine's own speed moved by more than 10 % in {moved} of {blocks} blocks")
    return lines


def print_regression(found: dict[str, Any]) -> None:
    """Two results of the kernels side by side, the cells that changed first."""
    order = ("slower", "faster", "same")
    rows = [
        [
            cell["verdict"],
            cell["what"],
            cell["dtype"],
            cell["row"],
            human_tokens(cell["tokens"]),
            *(f"{ms:.3g}" for ms in cell["min_ms"]),
            f"{cell['ratio_min']:.3f}",
            f"{cell['ratio_p50']:.3f}",
            " and ".join(f"{100 * noise:.0f} %" for noise in cell["noise"]),
        ]
        for cell in sorted(found["cells"], key=lambda cell: order.index(cell["verdict"]))
    ]
    columns = ["", "what", "dtype", "row", "tokens", "least ms, old", "new", "ratio", "ratio of medians", "noise"]
    title = f"old and new, beyond {found['tolerance']:g} % and the noise of both"
    print_table(title, columns, rows)
    print(", ".join(f"{found[verdict]} {verdict}" for verdict in order))
    print(f"A fixed matrix product takes {found['matmul_ratio']:.2f} times as long as then.")
    for difference in found["differences"]:
        print(f"not the same: {difference}")
    for name, cells in (("old", found["only_old"]), ("new", found["only_new"])):
        if cells:
            print(f"only in the {name} one: {len(cells)} cells, such as {', '.join(map(str, cells[0]))}")


def _crossover(found: dict[str, Any]) -> str:
    measured = human_tokens(found["measured_to"])
    return {
        "everywhere": "faster than the original at every measured context",
        "at": f"faster than the original from about {found['context'] or 0:.0f} tokens on",
        "never": f"slower than the original at every measured context, up to {measured}",
        "mixed": "faster at some contexts and slower at others: the measurement is too noisy for a crossover",
    }[found["kind"]]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _percents(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f} %"


def _signed(comparison: dict[str, Any] | None, key: str, interval: str) -> str:
    """A difference of shares, in points."""
    if comparison is None:
        return ""
    ends = comparison[interval]
    span = "" if ends is None else f" ({100 * ends[0]:+.0f} to {100 * ends[1]:+.0f})"
    return f"{100 * comparison[key]:+.0f}{span}"


def _kept(kept: dict[str, Any]) -> str:
    return "-" if kept["value"] is None else f"{_percent(kept['value'])} ({_percents(kept['ci95'])})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
