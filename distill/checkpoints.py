"""Checkpoints of a training stage: whole or absent, never half.

FOLDER/step-00000120/
    weights.safetensors      the trained parameters by name
    optimizer.safetensors    Adam's two moments of each, and their step counts
    state.json               position in the data, steps, tokens and seconds so far

A checkpoint is written under another name and renamed when it is on disk, so a folder that is called `step-...` is
complete. The one before it is removed only after that.

Every process of a training holds all trained parameters and all of Adam's state, so process 0 alone writes them, and a
checkpoint does not depend on the number of processes. What is sharded is frozen and in no checkpoint.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linearize.distill.disk import writing
from linearize.errors import LinearizeError

__all__ = ["latest", "load_trained", "restore", "write"]

PEFT_PREFIX = "base_model.model."
_NAME = re.compile(r"step-(\d+)")


def write(
    folder: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Save a checkpoint and remove the older ones.

    Raises:
        LinearizeError: the disk does not take it; what was there before is untouched.
    """
    weights = {name: p.detach().contiguous() for name, p in parameters.items()}
    moments = _moments(parameters, optimizer)
    text = json.dumps(state)
    final = folder / f"step-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    size = sum(x.nbytes for x in (*weights.values(), *moments.values())) + len(text)
    with writing(final, size, partial):
        folder.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        save_file(weights, partial / "weights.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(text, encoding="utf-8")
        for file in partial.iterdir():
            _to_disk(file)
        _to_disk(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _to_disk(folder)
        for other in folder.iterdir():
            if other != final:
                shutil.rmtree(other)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    paths = folder.glob("step-*") if folder.is_dir() else ()
    steps = {path: int(name[1]) for path in paths if (name := _NAME.fullmatch(path.name))}
    return max(steps, key=steps.__getitem__, default=None)


def restore(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into the parameters and the optimizer; returns what `write` was given as `state`.

    Raises:
        LinearizeError: it cannot be read, or belongs to other parameters.
    """
    try:
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise LinearizeError(
            f"checkpoint {path}: cannot be read ({reason}); remove that folder to start over"
        ) from None
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    if shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
        raise LinearizeError(
            f"checkpoint {path}: it holds {len(shapes)} tensors of another training; give another output folder, "
            "or the settings it was made with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            slot = {key.rpartition("/")[2]: x for key, x in moments.items() if key.rpartition("/")[0] == name}
            if slot:
                optimizer.state[parameter] = {
                    key: x.clone() if key == "step" else x.to(parameter.device, copy=True) for key, x in slot.items()
                }
    return state


def load_trained(path: Path, model: nn.Module) -> None:
    """Take a student back to what it was at a checkpoint of its own training; LoRA of later stages does nothing then.

    Args:
        path: of the checkpoint.
        model: the student as it ended, its LoRA not merged.

    Raises:
        LinearizeError: the checkpoint cannot be read, or holds what the student has not.
    """
    try:
        weights = load_file(path / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise LinearizeError(f"checkpoint {path}: cannot be read ({str(error).splitlines()[0]})") from None
    # Names from before the first LoRA lack the prefix that peft puts before all.
    own = {name.removeprefix(PEFT_PREFIX): parameter for name, parameter in model.named_parameters()}
    held = {name.removeprefix(PEFT_PREFIX) for name in weights}
    if any(".mixer." in name or ".mix." in name for name in own.keys() - held):
        raise LinearizeError(
            f"checkpoint {path}: its stage left mixers or mixes as they were (mixer_lr: 0), and does not hold them"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            if ".lora_B." in name:
                parameter.zero_()
        for name, value in weights.items():
            kept = own.get(name.removeprefix(PEFT_PREFIX))
            if kept is None or kept.shape != value.shape:
                raise LinearizeError(f"checkpoint {path}: the student beside it has no {name} of {list(value.shape)}")
            kept.copy_(value)


def _moments(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
