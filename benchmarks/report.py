"""One page of HTML from the results in a run's folder.

Reads what is there of evaluate.json, bench.json, train.jsonl and recipe.yaml, and writes report.html: a single file
without scripts or anything from the network. A training that is still running is shown as far as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from linearize.benchmarks import decode, evaluate, page, plots
from linearize.benchmarks.evaluate import BASELINE, STUDENT
from linearize.benchmarks.files import read_json, write_text
from linearize.benchmarks.summary import difference, number, percent, quality_sentences, size, speed_sentences
from linearize.benchmarks.training_log import HeatMap, StageLog, heat_map, read_train_log, stage_logs, thinned
from linearize.errors import LinearizeError

__all__ = ["read_train_log", "write_report"]

NO_PLOTS = "This report has no plots: they need matplotlib (pip install 'linearize[report]')."


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from the results in `folder`, and return its path.

    The same results give the same bytes.

    Raises:
        LinearizeError: no results in the folder, or a file that cannot be read.
    """
    folder = Path(folder)
    paths = {name: folder / name for name in ("evaluate.json", "bench.json", "train.jsonl", "recipe.yaml")}
    quality = read_json(path, evaluate.KIND) if (path := paths["evaluate.json"]).is_file() else None
    speed = decode.read_bench(path) if (path := paths["bench.json"]).is_file() else None
    log = read_train_log(path) if (path := paths["train.jsonl"]).is_file() else []
    if quality is None and speed is None and not log:
        raise LinearizeError(
            f"{folder}: no evaluate.json, bench.json or train.jsonl to report on; "
            "run `linearize evaluate` or `linearize bench` first, or wait for a training's first step"
        )
    recipe = path.read_text(encoding="utf-8") if (path := paths["recipe.yaml"]).is_file() else None
    values = _parsed(recipe)
    stages = stage_logs(log, values)
    drawn = plots.available()
    body = [
        _running(stages),
        _summary(quality, speed, drawn),
        *([] if quality is None else [_quality(quality, drawn), _choices(quality), _needle(quality)]),
        "" if speed is None else _speed(speed, drawn),
        _training(stages, drawn),
        _machine(quality, speed, recipe),
    ]
    title, subtitle = _title(values)
    return write_text(folder / "report.html", page.page(title, subtitle, body))


def _parsed(recipe: str | None) -> dict[str, Any]:
    """What recipe.yaml holds; empty where there is none."""
    if recipe is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(recipe)
    except yaml.YAMLError as error:
        raise LinearizeError(f"recipe.yaml: not YAML ({' '.join(str(error).split())}); restore or delete it") from error
    return values if isinstance(values, dict) else {}


def _title(values: dict[str, Any]) -> tuple[str, str]:
    """Title and subtitle; from the recipe where there is one."""
    if not values:
        return "Student and original, side by side", "How much was kept, and what was gained."
    model = str(values.get("model") or "a model").rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    convert = values.get("convert") or {}
    parts = [f"{key.replace('_', ' ')} {convert[key]}" for key in ("mixer", "window", "sinks", "mix") if key in convert]
    if "softmax_layers" in convert:
        parts.append(f"softmax layers: {convert['softmax_layers']}")
    return f"{model}, converted", ", ".join(parts) or "How much was kept, and what was gained."


def _summary(quality: dict[str, Any] | None, speed: dict[str, Any] | None, drawn: bool) -> str:
    missing = [
        page.paragraph(f"There is no {name} in this folder; `linearize {verb}` writes it.", "small")
        for name, verb, result in (("evaluate.json", "evaluate", quality), ("bench.json", "bench", speed))
        if result is None
    ]
    return page.section(
        "Summary",
        page.subsection("Quality", page.sentences(quality_sentences(quality)) if quality is not None else ""),
        page.subsection("Speed and memory", page.sentences(speed_sentences(speed)) if speed is not None else ""),
        *missing,
        "" if drawn else page.paragraph(NO_PLOTS, "small"),
    )


def _range(ends: list[float] | None) -> str:
    return "–" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def _figures(*figures: tuple[str, str]) -> str:
    return '<div class="plots">\n' + "\n".join(page.figure(svg, caption) for svg, caption in figures) + "\n</div>"


def _quality(result: dict[str, Any], drawn: bool) -> str:
    perplexity = result["perplexity"]
    if perplexity is None:
        return ""
    rows = []
    for name in result["rows"]:
        row, pair = perplexity["rows"][name], difference(perplexity, name, BASELINE)
        line = [name, number(row["ppl"]), _range(row["ppl_ci95"])]
        line += ["–", "–"] if pair is None else [_signed(pair["nll_difference"]), _range(pair["ci95"])]
        if result["choices"] is not None:
            line.append(percent(result["choices"]["rows"][name]["normalised"]["accuracy"]))
        if result["needle"] is not None:
            found = result["needle"]["rows"][name]
            line += [percent(found["greedy"]), percent(found["first"])]
        rows.append(line)
    head = ["row", "perplexity", "95 % interval", "NLL minus the original’s", "95 % interval, paired"]
    head += ["multiple choice"] if result["choices"] is not None else []
    head += ["needle written", "needle ranked first"] if result["needle"] is not None else []
    caption = (
        f"Perplexity on {perplexity['n_tokens']} held-out tokens in {perplexity['n_sequences']} sequences "
        f"of {perplexity['seq_len']}, the same for every row"
    )
    bins = next(iter(perplexity["rows"].values()))["by_position"]
    positions = [
        [name, *(number(b["ppl"]) for b in perplexity["rows"][name]["by_position"])] for name in result["rows"]
    ]
    return page.section(
        "Quality",
        page.table(caption, head, rows, strong=STUDENT),
        page.table(
            "Perplexity by the number of tokens before the predicted one",
            ["row", *(f"{b['start']}–{b['end'] - 1}" for b in bins)],
            positions,
            strong=STUDENT,
        ),
        _figures((plots.plot_positions(perplexity), "Perplexity by position in the sequence. Lower is better."))
        if drawn
        else "",
        page.paragraph(
            "Intervals are bootstrapped over sequences. A paired interval that leaves out zero is a difference; "
            "the intervals of two rows may overlap and still differ. NLL is in nats per token.",
            "small",
        ),
    )


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{'+' if value > 0 else ''}{number(value)}"


def _choices(result: dict[str, Any]) -> str:
    choices = result["choices"]
    if choices is None:
        return ""
    tables = []
    for kind, how in (("normalised", "by log-likelihood per byte"), ("raw", "by log-likelihood")):
        rows = []
        for name in result["rows"]:
            score = choices["rows"][name][kind]
            line = [name, percent(score["accuracy"]), _percents(score["ci95"])]
            for kept in (score["retention"], score["retention_over_chance"]):
                # What the original keeps of itself says nothing.
                line += ["–", "–"] if name == BASELINE else [_percents(kept["value"]), _percents(kept["ci95"])]
            rows.append(line)
        head = ["row", "accuracy", "95 % interval", "kept", "95 % interval", "kept above guessing", "95 % interval"]
        tables.append(page.table(f"Choice {how} ({kind})", head, rows, strong=STUDENT))
    return page.section(
        "Multiple choice",
        page.paragraph(f"{choices['n_items']} questions; guessing gives {percent(choices['chance'])}."),
        *tables,
        page.paragraph(
            "Kept is the row’s accuracy over the original’s; above guessing, after taking away from both what guessing "
            "gives. A dash in any other row: the original is not clearly above guessing.",
            "small",
        ),
    )


def _percents(value: float | list[float] | None) -> str:
    if value is None:
        return "–"
    return " to ".join(map(percent, value)) if isinstance(value, list) else percent(value)


def _needle(result: dict[str, Any]) -> str:
    needle = result["needle"]
    if needle is None:
        return ""
    cells = next(iter(needle["rows"].values()))["cells"]
    head = ["row", "all", *(f"{cell['length']} at {percent(cell['depth'])}" for cell in cells)]
    prompts = " or ".join(str(n) for n in sorted({cell["trials"] for cell in cells}))
    tables = []
    for score, title in (("greedy", "Written"), ("first", "Ranked first")):
        rows = []
        for name in result["rows"]:
            row = needle["rows"][name]
            rows.append([name, *(percent(part[score]) for part in (row, *row["cells"]))])
        caption = f"{title}, by length of the text in tokens and depth; prompts a cell: {prompts}"
        tables.append(page.table(caption, head, rows, strong=STUDENT))
    return page.section(
        "Needle in a haystack",
        *tables,
        page.paragraph(
            "A sentence with a 5-digit number hides in held-out text. Written: greedy decoding repeats it exactly. "
            f"Ranked first: it is likelier than {needle['candidates'] - 1} other numbers; guessing gives "
            f"{percent(needle['chance_first'])}. Depth 0 % is the start of the text. A needle near the end may still "
            "be in the window: compare with the row window + sinks.",
            "small",
        ),
    )


def _speed(result: dict[str, Any], drawn: bool) -> str:
    rows = []
    speedups = {(pair["row"], pair["context"], pair["batch"], pair["mode"]): pair for pair in result["comparisons"]}
    for cell in result["cells"]:
        times, prefill, held = cell["ms_per_token"], cell["prefill_ms"], cell["cache_bytes"]
        pair = speedups.get((cell["row"], cell["context"], cell["batch"], cell["mode"]))
        rows.append(
            [
                f"{cell['row']}, {cell['mode']}",
                str(cell["context"]),
                str(cell["batch"]),
                number(times["p50"]),
                f"{number(times['min'])} to {number(times['max'])}",
                number(times["p95"]),
                number(times["mean"]),
                number(cell["tokens_per_s"]),
                "–" if pair is None else f"{number(pair['speedup']['p50'])} ({_range(pair['speedup']['ci95'])})",
                "–" if prefill is None else number(prefill["p50"]),
                "–" if prefill is None else f"{number(prefill['min'])} to {number(prefill['max'])}",
                size(held["total"]),
                size(held["softmax"]),
                size(held["window"]),
                size(held["state"]),
                str(cell["repeats"]),
            ]
        )
    head = ["row", "context", "batch", "ms per token, median", "repeats’ medians", "p95", "mean", "tokens/s"]
    head += ["original’s time over the row’s", "prefill ms", "range", "cache", "softmax", "window", "state", "repeats"]
    caption = (
        f"Decoding {result['decode_tokens']} tokens a repeat, on {result['device']}, "
        f"CPU threads: {result['threads']}, {', '.join(sorted(set(result['dtypes'].values())))}"
    )
    figures = (
        _figures(
            *(
                (
                    plots.plot_decode(result, batch),
                    f"Time per token while decoding, batch {batch}; bars span the repeats’ medians.",
                )
                for batch in result["batches"]
            ),
            (plots.plot_cache(result), "Bytes held between two tokens; preallocated caches left out."),
        )
        if drawn
        else ""
    )
    return page.section(
        "Speed and memory",
        figures,
        page.table(caption, head, rows, strong=STUDENT),
        page.paragraph(
            "Rows take turns within each repeat. Each row is measured in every mode that it has: under a growing cache "
            "(dynamic), a preallocated one (static), with its step compiled. The best mode of the original at each "
            "context and batch is compared with the best mode of each other row; after the ratio stands its paired "
            "95 % interval. No prefill stands where a part of the context was filled in, not read.",
            "small",
        ),
    )


def _running(stages: list[StageLog]) -> str:
    """How far a training is that is not at its end."""
    current = next((stage for stage in stages if not stage.finished), None)
    begun = [stage for stage in stages if stage.records]
    if current is None or not begun:
        return ""
    waiting = [stage.name for stage in stages if not stage.records]
    if current.records and current.share is not None:
        last = current.records[-1]
        words = (
            f"{current.name}: {percent(current.share)} done, step {last.get('step', '–')}, loss {number(last['loss'])}"
        )
        words += f", {_duration(current.left)} left at the speed so far." if current.left is not None else "."
    else:
        words = f"{begun[-1].name} is done."
    if waiting:
        words += f" Still to come: {', '.join(waiting)}."
    return page.section(
        "Not finished yet",
        page.paragraph(words),
        page.paragraph("The page stands still: `linearize report` writes it again, as often as you like.", "small"),
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours else f"{minutes} min"


def _training(stages: list[StageLog], drawn: bool) -> str:
    rows, parts = [], []
    for index, stage in enumerate(stages):
        records = stage.records
        if not records:
            continue
        first, last = records[0], records[-1]
        speeds = [record["tokens_per_s"] for record in records if record.get("tokens_per_s")]
        held = [record["peak_memory_bytes"] for record in records if record.get("peak_memory_bytes")]
        rows.append(
            [
                stage.name,
                "–" if stage.share is None else percent(stage.share),
                str(last.get("step", "–")),
                f"{last['tokens']:,}".replace(",", "\N{NARROW NO-BREAK SPACE}"),
                "–" if stage.seconds is None else _duration(stage.seconds),
                number(first["loss"]),
                number(last["loss"]),
                number(median(speeds)) if speeds else "–",
                size(max(held)) if held else "–",
            ]
        )
        figures = _curves(index, records) if drawn and len(records) > 1 else []
        layers = heat_map(records)
        if layers is not None:
            parts.append(page.subsection(f"Layers in {stage.name}", *_heat(index, stage.name, layers)))
        if figures:
            parts.append(page.subsection(f"Curves of {stage.name}", _figures(*figures)))
    if not rows:
        return ""
    head = ["stage", "done", "steps", "tokens", "time", "loss, first", "loss, last", "tokens/s, median", "peak memory"]
    return page.section("Training", page.table("Stages, as logged", head, rows), *parts)


def _curves(index: int, records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Loss, speed and learning rate of a stage by tokens; only what its lines have."""
    figures = []
    for key, label, caption, logarithmic in (
        ("loss", "loss", "Loss.", True),
        ("tokens_per_s", "tokens/s", "Tokens a second since the stage began.", False),
        ("lr", "learning rate", "Learning rate.", False),
    ):
        told = thinned([record for record in records if record.get(key) is not None])
        if len(told) > 1:
            values = [float(record[key]) for record in told]
            tokens = [float(record["tokens"]) for record in told]
            figures.append((plots.plot_curve(f"{key}{index}", tokens, values, label, logarithmic), caption))
    return figures


def _heat(index: int, stage: str, heat: HeatMap) -> tuple[str, str]:
    """The picture, and the same as a table of five moments."""
    columns = len(heat.edges) - 1
    moments = sorted({round(part * (columns - 1)) for part in (0, 0.25, 0.5, 0.75, 1)})
    rows = []
    for layer, losses in zip(heat.layers, heat.losses):
        ends = losses[0], losses[-1]
        change = number(ends[1] / ends[0]) if ends[0] is not None and ends[1] is not None else "–"
        rows.append([layer, *(number(losses[column]) for column in moments), change])
    at = [f"{heat.edges[column + 1]:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}") for column in moments]
    caption = f"{stage}: loss of each layer by tokens read, dark is high; the colours are logarithmic."
    table = page.table(f"{stage}: loss of each layer up to so many tokens", ["layer", *at, "last over first"], rows)
    return page.figure(plots.plot_heat(f"heat{index}", heat), caption), page.details("The same as numbers", table)


def _machine(quality: dict[str, Any] | None, speed: dict[str, Any] | None, recipe: str | None) -> str:
    parts = []
    for name, result in (("Quality", quality), ("Speed", speed)):
        if result is None:
            continue
        info = result["machine"]
        cpu, gpu, commit = info["cpu"], info["gpu"], info["commit"]
        quota = "" if cpu["quota"] is None else f", limited to the time of {cpu['quota']:g}"
        memory = "" if info["memory_gib"] is None else f"{info['memory_gib']:g} GiB"
        versions = ", ".join(f"{package} {version}" for package, version in info["versions"].items() if version)
        parts.append(
            page.definitions(
                [
                    ("measured", f"{name}, {info['date']}"),
                    ("command", info["command"]),
                    ("seed", "" if info["seed"] is None else str(info["seed"])),
                    ("processor", f"{cpu['model'] or 'unknown'}, {cpu['usable']} of {cpu['cores']} cores{quota}"),
                    ("instructions", " ".join(cpu["flags"])),
                    ("threads", str(info["threads"])),
                    ("memory", memory),
                    ("GPU", "" if gpu is None else f"{gpu['name']}, {gpu['memory_gib']:g} GiB"),
                    ("system", info["system"]),
                    ("versions", versions),
                    (
                        "commit",
                        ""
                        if commit is None
                        else commit["hash"] + (", with local changes" if commit["changed"] else ""),
                    ),
                ]
            )
        )
    if recipe is not None:
        parts.append(page.preformatted("recipe.yaml", recipe))
    return page.section("How this was measured", *parts)
