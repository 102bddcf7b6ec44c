"""What the commands share: options that mean the same everywhere, and what is made of them."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.config import MIXERS, MIXES, LinearizeConfig
from linearize.console import note
from linearize.errors import LinearizeError

__all__ = [
    "DEFAULT",
    "Base",
    "DType",
    "Device",
    "FeatureDim",
    "Mix",
    "Mixer",
    "Model",
    "Original",
    "Seed",
    "Sinks",
    "SoftmaxLayers",
    "Window",
    "check_new_folder",
    "conversion",
    "planned_conversion",
    "quiet",
]

DEFAULT = LinearizeConfig()

Original = Annotated[
    str, typer.Argument(metavar="MODEL", help="The original: a folder, a hub name, or a GGUF file as elsewhere.")
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a hub name, path/to/file.gguf or package://package/file.gguf; a student's folder too.",
    ),
]
Base = Annotated[str | None, typer.Option(help="The original below a student; the one it recorded if left out.")]
Mixer = Annotated[str, typer.Option(help=f"What becomes of tokens that leave the window: {', '.join(MIXERS)}.")]
Window = Annotated[int, typer.Option(help="W: between W and 2W-1 recent tokens stay exact.")]
Sinks = Annotated[int, typer.Option(help="How many of the first tokens stay exact.")]
Mix = Annotated[str, typer.Option(help=f"How near and far are weighed: {', '.join(MIXES)}.")]
SoftmaxLayers = Annotated[str, typer.Option(help="Layers left as they are: none, every:4, or indices as in 0,5,29.")]
FeatureDim = Annotated[int | None, typer.Option(help="Half the rows of the state; the model's head_dim if left out.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto times both on this machine.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; the GPU if there is one.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]


def conversion(
    mixer: str, window: int, sinks: int, mix: str, softmax_layers: str, feature_dim: int | None
) -> LinearizeConfig:
    """The conversion that these options ask for.

    Raises:
        LinearizeError: what `LinearizeConfig` refuses.
    """
    layers: Any = softmax_layers
    parts = [part.strip() for part in softmax_layers.split(",")]
    if all(part.removeprefix("-").isdecimal() for part in parts):
        layers = [int(part) for part in parts]
    return LinearizeConfig(mixer, window, sinks, mix, layers, feature_dim)


def planned_conversion(model: str, config: LinearizeConfig) -> LinearizeConfig:
    """`config`, or the conversion that made the model where it is a student, which is then said on stderr.

    Raises:
        LinearizeError: a student, and a `config` of one's own that is another one than it was made by.
    """
    from linearize.models import recorded_conversion

    recorded = recorded_conversion(model)
    if recorded is None:
        return config
    if config not in (DEFAULT, recorded):
        raise LinearizeError(f"model: {model!r} is converted already; leave the options of a conversion out")
    note("This is a student: the plan is the one that it was made by.")
    return recorded


def check_new_folder(out: Path) -> None:
    """Raise a LinearizeError where a model saved in `out` would lie among other things."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise LinearizeError(f"out: {str(out)!r} already holds something; give a new folder")


def quiet() -> None:
    """Other libraries' notes are not for our users' eyes; their progress bars stay where somebody watches."""
    watched = sys.stderr.isatty()
    if not watched:  # read when tqdm is imported, so before transformers is
        os.environ.setdefault("TQDM_DISABLE", "1")

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    if not watched:
        logging.disable_progress_bar()
