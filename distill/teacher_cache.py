"""The teacher's likeliest next tokens on disk: trainings on the same text ask the teacher once.

FOLDER/<hash>.safetensors, one file a batch, named by what it depends on: the teacher's weights and precision, the
batch's tokens and padding, the number of tokens listed and the temperature. About 8 * top_k bytes a token.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearize.distill.data import Batch
from linearize.distill.logit_losses import Listed
from linearize.errors import LinearizeError
from linearize.fingerprint import weight_sample

__all__ = ["TeacherCache"]


class TeacherCache:
    """`Listed` rows by batch.

    Args:
        folder: where the files are; made where it is missing. Trainings may share it.
        teacher: the original, inside a student or not: a sample of its weights is part of each name.
        top_k, temperature: of what is listed.
    """

    def __init__(self, folder: str | Path, teacher: Any, top_k: int, temperature: float):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        told = [weight_sample(teacher), str(next(teacher.parameters()).dtype), top_k, temperature]
        self._told = json.dumps(told, sort_keys=True).encode()

    def read(self, batch: Batch) -> Listed | None:
        """What was written for this batch, on its device; None if nothing was.

        Raises:
            LinearizeError: a file that cannot be read.
        """
        path = self._path(batch)
        if not path.is_file():
            return None
        try:
            held = load_file(path, device=str(batch["input_ids"].device))
            return Listed(held["log_p"], held["index"])
        except (OSError, SafetensorError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise LinearizeError(f"teacher_cache: {path} cannot be read ({reason}); remove that file") from None

    def write(self, batch: Batch, listed: Listed) -> None:
        """Keep the rows of a batch: whole or not at all.

        Raises:
            LinearizeError: the disk does not take them.
        """
        path = self._path(batch)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            save_file({"log_p": listed.log_p, "index": listed.index.to(torch.int32)}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            reason = str(error).splitlines()[0]
            raise LinearizeError(
                f"teacher_cache: {path} cannot be written ({reason}); make room on that disk, name another folder, or "
                "set teacher_cache to null"
            ) from None

    def _path(self, batch: Batch) -> Path:
        digest = hashlib.sha256(self._told)
        kind = batch["input_ids"].device.type
        if torch.is_autocast_enabled(kind):  # mixed precision: the same weights say something else
            digest.update(f"autocast {torch.get_autocast_dtype(kind)}".encode())
        for name in ("input_ids", "attention_mask", "position_ids"):
            if name in batch:
                value: Tensor = batch[name].to("cpu", torch.int64).contiguous()
                digest.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
        return self._folder / f"{digest.hexdigest()[:32]}.safetensors"
