"""The report's sections on a train.jsonl: how far it is, stages, losses of layers, curves."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from linearize.benchmarks import page, plots
from linearize.benchmarks.heat import Grid, plot_heat
from linearize.benchmarks.page import Data, Section
from linearize.benchmarks.summary import number, percent, size
from linearize.benchmarks.training_log import HeatMap, StageLog, heat_map, thinned

__all__ = ["progress_section", "training_section"]


def progress_section(stages: Sequence[StageLog]) -> Section:
    """How far a training is that is not at its end; empty after it, and before its first step."""
    title = "Not finished yet"
    current = next((stage for stage in stages if not stage.finished), None)
    begun = [stage for stage in stages if stage.records]
    if current is None or not begun:
        return page.section(title)
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
        title,
        page.paragraph(words),
        page.paragraph("The page stands still: `linearize report` writes it again, as often as you like.", "small"),
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest:02d} min" if hours else f"{minutes} min"


def training_section(stages: Sequence[StageLog]) -> Section:
    """What each stage logged."""
    drawn, rows, parts = plots.available(), [], []
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
                _grouped(last["tokens"]),
                "–" if stage.seconds is None else _duration(stage.seconds),
                number(first["loss"]),
                number(last["loss"]),
                number(median(speeds)) if speeds else "–",
                size(max(held)) if held else "–",
            ]
        )
        curves = _curves(index, stage.name, records) if drawn and len(records) > 1 else []
        layers = heat_map(records)
        if layers is not None:
            parts.append(page.subsection(f"Layers in {stage.name}", _heat(index, stage.name, layers)))
        parts.append(page.subsection(f"Curves of {stage.name}", page.figures(*curves)))
    if not rows:
        return page.section("Training")
    head = ["stage", "done", "steps", "tokens", "time", "loss, first", "loss, last", "tokens/s, median", "peak memory"]
    return page.section("Training", page.table("Stages, as logged", head, rows), *parts)


def _grouped(count: float) -> str:
    return f"{count:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _curves(index: int, stage: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Loss, speed and learning rate of a stage by tokens; only what its lines have."""
    figures = []
    for key, label, caption, logarithmic in (
        ("loss", "loss", "Loss", True),
        ("tokens_per_s", "tokens/s", "Tokens a second since the stage began", False),
        ("lr", "learning rate", "Learning rate", False),
    ):
        told = thinned([record for record in records if record.get(key) is not None])
        if len(told) > 1:
            values = [float(record[key]) for record in told]
            tokens = [float(record["tokens"]) for record in told]
            svg = plots.plot_curve(f"{key}{index}", f"{stage}: {caption.lower()}", tokens, values, label, logarithmic)
            data = Data(f"{page.slug(stage)}-{page.slug(label)}", ["tokens", label], list(zip(tokens, values)))
            figures.append(page.figure(svg, f"{caption}.", data))
    return figures


def _heat(index: int, stage: str, heat: HeatMap) -> str:
    """The losses of layers over the tokens read, as a picture and as numbers."""
    known = [loss for losses in heat.losses for loss in losses if loss is not None]
    title = f"{stage}: loss of each layer by tokens read"
    grid = Grid(
        heat.layers,
        [_grouped(heat.edges[0]), f"{_grouped(heat.edges[-1])} tokens"],
        heat.losses,
        logarithmic=bool(known),
    )
    columns = [f"up to {edge:.0f}" for edge in heat.edges[1:]]
    rows = [[layer, *losses] for layer, losses in zip(heat.layers, heat.losses)]
    data = Data(f"{page.slug(stage)}-layers", ["layer", *columns], rows)
    return page.figure(
        plot_heat(f"heat{index}", title, grid),
        f"{title}. The stronger the colour, the higher; steps are logarithmic.",
        data,
    )
