"""`linearize select`: measure what each layer is worth as softmax, and choose which stay."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli_options import DEFAULT, Device, DType, FeatureDim, Original, quiet
from linearize.config import MIXERS, LinearizeConfig
from linearize.console import human_bytes, human_tokens, note, parse_bytes, parse_tokens
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.selection import Selection

__all__ = ["select"]

# Name -> what the column of scores says.
METHODS = {
    "uniform": "",
    "lazy": "attention outside window + sinks",
    "swap": "KL if converted alone, nats",
    "recall": "KL at repeated numbers, nats",
}
KEEP = "25%"
BAR = 24  # characters of the longest


def select(
    model: Original,
    by: Annotated[str, typer.Option(help=f"The score: {', '.join(METHODS)}.")] = "recall",
    keep: Annotated[
        str | None, typer.Option(help=f"How many layers stay softmax: 8 or 25%; {KEEP} if left out.")
    ] = None,
    cache_bytes: Annotated[
        str | None, typer.Option(help="Instead: the largest cache of one sequence, 50MB or 48MiB.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens of that sequence.")] = "8k",
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES", help="Text to measure on, a file or a glob; many times; Python's topics if none."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text; of lazy, swap and recall.")] = 2,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 1024,
    mixer: Annotated[str, typer.Option(help=f"What converted layers become, for their bytes: {', '.join(MIXERS)}.")] = (
        DEFAULT.mixer
    ),
    window: Annotated[int, typer.Option(help="W of a converted layer.")] = DEFAULT.window,
    sinks: Annotated[int, typer.Option(help="S of a converted layer.")] = DEFAULT.sinks,
    feature_dim: FeatureDim = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", metavar="FILE", help="A .json or a .png of the ranking; many times.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="A recipe's YAML whose softmax_layers is set to the choice.")
    ] = None,
    dtype: DType = "auto",
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows and numbers that are measured.")] = 0,
) -> None:
    """Choose the layers that stay softmax, by what the model loses when each is converted.

    Layers are compared with window + sinks, the free baseline, because no state has been trained yet.

    Example: linearize select path/to/model --by recall --keep 25% --text 'texts/*.txt' --write my-recipe.yaml
    """
    if by not in METHODS:
        raise LinearizeError(f"by: {by!r} is unknown; use one of {', '.join(METHODS)}")
    if keep is not None and cache_bytes is not None:
        raise LinearizeError(f"cache_bytes: {cache_bytes} and keep {keep} are two limits; give one of them")
    if by == "uniform" and text:
        raise LinearizeError(f"text: {text[0]!r} is given, and uniform reads no text; leave it out, or use --by recall")
    length = parse_tokens(context, "context")
    if len(length) > 1:
        raise LinearizeError(f"context: {context!r} names several lengths; the choice is made for one")
    mix = "gate" if mixer == "gla" else DEFAULT.mix  # says nothing about bytes
    config = LinearizeConfig(mixer=mixer, window=window, sinks=sinks, feature_dim=feature_dim, mix=mix)
    for path in out or ():
        if path.suffix not in (".json", ".png"):
            raise LinearizeError(
                f"out: {str(path)!r} ends in neither .json nor .png; name the file by what it shall be"
            )

    quiet()
    from linearize.benchmarks.plot_selection import check_plot, plot_selection
    from linearize.models import load_config, recorded_conversion
    from linearize.selection import (
        Selection,
        check_limit,
        check_recipe,
        choose_layers,
        choose_within,
        keeping_costs,
        parse_keep,
        uniform_layers,
        uniform_within,
        write_softmax_layers,
    )

    # What would fail after the measurement is found before it.
    if recorded_conversion(model) is not None:
        raise LinearizeError(f"model: {model!r} is a student, whose layers are chosen already; give its original")
    pictures = [path for path in out or () if path.suffix == ".png"]
    if pictures and by == "uniform":
        raise LinearizeError("out: uniform measures nothing that a .png could show; give a .json, or another --by")
    if pictures:
        check_plot()
    if write is not None:
        check_recipe(write)
    costs = keeping_costs(load_config(model), config, length[0], "bfloat16" if dtype == "auto" else dtype)
    layers = sorted(costs.extra)
    limit = None if cache_bytes is None else parse_bytes(cache_bytes, "cache_bytes")
    count = parse_keep(keep or KEEP, len(layers))
    if limit is not None:
        check_limit(costs, limit)

    scores: dict[int, float] = {}
    if by == "uniform":
        kept = uniform_layers(layers, count) if limit is None else uniform_within(costs, limit)
    else:
        scores = _measure(model, by, config, text or [], rows, seq_len, dtype, device, seed)
        kept = choose_layers(scores, count) if limit is None else choose_within(scores, costs, limit)
    selection = Selection(by, scores, kept, costs)
    _print(model, selection)
    for path in out or ():
        if path in pictures:
            plot_selection(path, METHODS[by], scores, kept)
        else:
            path.write_text(dumps({"model": model} | selection.to_dict(), indent=1) + "\n", encoding="utf-8")
        note(f"written: {path}")
    if write is not None:
        write_softmax_layers(write, kept)
        note(f"written: softmax_layers of {write}")


def _measure(
    model: str,
    by: str,
    config: LinearizeConfig,
    files: Sequence[str],
    rows: int,
    seq_len: int,
    dtype: str,
    device: str | None,
    seed: int,
) -> dict[int, float]:
    from linearize.convert import convert, converted_layers
    from linearize.distill.data import build_stream
    from linearize.distill.options import DataOptions, Source
    from linearize.distill.selection import draw_texts, lazy_scores, recall_scores, swap_scores
    from linearize.models import load_model, load_tokenizer
    from linearize.tasks import announce_dtype

    tokenizer = load_tokenizer(model)
    sources = tuple(Source(kind="text", path=path) for path in files) or (Source(kind="pydoc"),)
    stream = build_stream(DataOptions(sources=sources, seq_len=seq_len), tokenizer, seed)
    texts, facts = draw_texts(tokenizer, stream, rows, seed)
    loaded, _ = load_model(model, announce_dtype(dtype, device), device)
    convert(loaded, LinearizeConfig(mixer="none", window=config.window, sinks=config.sinks))
    if by == "lazy":
        return lazy_scores(loaded, texts)
    with _progress(by, rows * len(converted_layers(loaded))) as advance:
        if by == "swap":
            return swap_scores(loaded, texts, advance)
        return recall_scores(loaded, facts, advance)


@contextmanager
def _progress(by: str, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where somebody watches."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(by, total=steps)
        yield lambda layer: progress.advance(task)


def _print(model: str, selection: "Selection") -> None:
    """The ranking, the best layer first, and what the choice costs."""
    from linearize.tables import print_table

    costs, kept, scores = selection.costs, selection.kept, selection.scores
    at = human_tokens(costs.context)
    if scores:
        most = max(max(scores.values()), 1e-12)
        order = sorted(scores, key=lambda index: (-scores[index], index))
        rows = [
            [
                str(place),
                str(index),
                f"{scores[index]:.4g}",
                "#" * round(BAR * max(scores[index], 0.0) / most),
                human_bytes(max(costs.extra[index], 0)),
                "stays softmax" if index in kept else "",
            ]
            for place, index in enumerate(order, 1)
        ]
        columns = ["rank", "layer", METHODS[selection.by], "", f"cache to keep it at {at}", ""]
        print_table(f"{model}: layers by {selection.by}", columns, rows)
    whole = costs.total(tuple(costs.extra))
    print(
        f"{len(kept)} of {len(costs.extra)} layers stay softmax. The cache of one sequence at {at} tokens: "
        f"{human_bytes(costs.total(kept))}; original {human_bytes(whole)}, all converted {human_bytes(costs.least)}"
    )
    print(f"softmax_layers: {list(kept)}")
