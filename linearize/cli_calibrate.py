"""`linearize calibrate`: convert a model and fit what conversion adds to its attention, without a training run."""

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli_options import (
    DEFAULT,
    Device,
    DType,
    FeatureDim,
    Mix,
    Original,
    Sinks,
    SoftmaxLayers,
    Window,
    check_new_folder,
    conversion,
    quiet,
)
from linearize.config import TAUGHT_MIXERS
from linearize.console import note
from linearize.errors import LinearizeError

__all__ = ["calibrate"]


def calibrate(
    model: Original,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new folder for the adapter.")],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="FILES", help="Text to fit to, a file or a glob; many times; Python's topics if none."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="About how many tokens of it; whole rows.")] = 4096,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 1024,
    mixer: Annotated[str, typer.Option(help=f"Of those that have something to fit: {', '.join(TAUGHT_MIXERS)}.")] = (
        DEFAULT.mixer
    ),
    window: Window = DEFAULT.window,
    sinks: Sinks = DEFAULT.sinks,
    mix: Mix = DEFAULT.mix,
    softmax_layers: SoftmaxLayers = "none",
    feature_dim: FeatureDim = None,
    dtype: DType = "auto",
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the texts.")] = 0,
) -> None:
    """Convert a model, fit mixers and mixes to its attention on a few thousand tokens, and save them as an adapter.

    It is the first step of the stage transfer as well: a recipe does not need it done before.

    Example: linearize calibrate path/to/model --text 'texts/*.txt' --out calibrated
    """
    config = conversion(mixer, window, sinks, mix, softmax_layers, feature_dim)
    check_new_folder(out)
    quiet()
    from linearize.checkpoint import save
    from linearize.convert import convert
    from linearize.distill.data import build_stream
    from linearize.distill.options import DataOptions, Source
    from linearize.distill.transfer import calibrate as fit
    from linearize.distill.transfer import check_taught
    from linearize.inspection import inspect_config
    from linearize.models import load_config, load_model, load_tokenizer, recorded_conversion
    from linearize.tasks import announce_dtype

    if recorded_conversion(model) is not None:
        raise LinearizeError(f"model: {model!r} is a student already; give its original")
    inspect_config(load_config(model), config, name=model)
    check_taught(config, seq_len, "calibrate")
    tokenizer = load_tokenizer(model)
    sources = tuple(Source(kind="text", path=path) for path in text or ()) or (Source(kind="pydoc"),)
    stream = build_stream(DataOptions(sources=sources, seq_len=seq_len), tokenizer, seed)
    loaded, _ = load_model(model, announce_dtype(dtype, device), device)
    convert(loaded, config)
    _print(fit(loaded, stream, tokens))
    save(loaded, out, adapter=True, tokenizer=tokenizer)
    note(f"saved: {out}")
    print(out)


def _print(losses: dict[int, list[float]]) -> None:
    """What calibration did, layer by layer. Several batches: the last loss is from text that was not yet fitted to."""
    from linearize.tables import print_table

    rows = [
        [str(layer), f"{each[0]:.4f}", f"{each[-1]:.4f}" if len(each) > 1 else "-"] for layer, each in losses.items()
    ]
    print_table("decomposed loss of each layer", ["layer", "mix alone", "at the last batch"], rows)
