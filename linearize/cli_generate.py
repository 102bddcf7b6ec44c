"""`linearize generate`: let a model write."""

import sys
from typing import Annotated

import typer

from linearize.cli_options import Base, Device, DType, Model, Seed, quiet
from linearize.errors import LinearizeError

__all__ = ["generate"]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from standard input.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    speculative: Annotated[
        bool, typer.Option("--speculative", help="The original writes; the student only drafts for it, to save time.")
    ] = False,
    base: Base = None,
    dtype: DType = "auto",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Let a model write; the text streams to standard output.

    Example: linearize generate runs/demo/student --chat --prompt "Why is the sky blue?"
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise LinearizeError("prompt: it is empty; give the text to continue")
    quiet()
    from linearize.tasks import write_answer

    write_answer(model, base, text, chat, max_new_tokens, temperature, dtype, device, seed, speculative)
