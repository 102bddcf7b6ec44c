"""`linearize export`: a student as a folder that others can load."""

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli_options import Base, check_new_folder, quiet
from linearize.console import note
from linearize.errors import LinearizeError

__all__ = ["export"]


def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A student's folder: an adapter or a whole one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    base: Base = None,
) -> None:
    """Write a student as one whole checkpoint, LoRA merged, that transformers loads.

    Example: linearize export runs/demo/student mine
    """
    check_new_folder(out)
    quiet()
    from linearize.export import export as write
    from linearize.models import load_model, recorded_conversion

    if recorded_conversion(student) is None:
        raise LinearizeError(f"student: {student!r} is not converted; give a student's folder, or convert it first")
    model, tokenizer = load_model(student, dtype=None, device="cpu", base=base)
    write(model, out, tokenizer)
    print(out)
    note("It loads with AutoModelForCausalLM.from_pretrained: after `import linearize`, or with trust_remote_code=True")
