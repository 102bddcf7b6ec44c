"""Rows of a comparison that come from folders of their own, loaded when their turn comes, and what identifies a row."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from linearize.benchmarks.work import digest_files
from linearize.convert import base_model
from linearize.distill.checkpoints import latest, load_trained
from linearize.errors import LinearizeError
from linearize.models import ADAPTER_FILE, load_model, load_weights, resolve
from linearize.rows import CONTROL, WINDOW, Rows

__all__ = ["also_rows", "row_identities", "tokens_seen"]

PEFT_FILE = "adapter_config.json"
TRAIN_LOG = "train.jsonl"
# Rows that a run trains beside its student -> their folders in it.
BESIDE = {"control": CONTROL, "window + sinks, trained": WINDOW}


def also_rows(given: Iterable[str], taken: Iterable[str], base: str | None, dtype: torch.dtype, device: str) -> Rows:
    """Rows of other students, `NAME=FOLDER` each. One is in memory only while it is measured.

    Args:
        given: a folder holds a student, whole or an adapter, or the LoRA of a control, which goes on the original, or
            is RUN/checkpoints/STAGE: RUN/student, an adapter, as it was after that stage.
        taken: names that rows have already.
        base: the original, for adapters.
        dtype, device: of all rows.

    Raises:
        LinearizeError: not NAME=FOLDER, a name twice, or a folder that holds neither.
    """
    names = set(taken)
    rows: Rows = {}
    for text in given:
        name, folder = _named_folder(text)
        if not name or not folder:
            raise LinearizeError(f"also: {text!r} is not NAME=FOLDER; write for example 'other=runs/other/student'")
        if name in names:
            raise LinearizeError(f"also: there is a row {name!r} already; give {folder!r} another name")
        names.add(name)
        lora = (Path(folder) / PEFT_FILE).is_file()
        if latest(Path(folder)) is not None:
            _check_stage(folder)
        elif not lora and resolve(folder).kind not in ("adapter", "student"):
            raise LinearizeError(f"also: {folder!r} holds neither a student nor a LoRA; give the folder of one")
        if lora and base is None:
            raise LinearizeError(f"also: the LoRA in {folder!r} needs its original; name that with --base")
        rows[name] = _loader(folder, base, lora, dtype, device)
    return rows


def _named_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    # Quotes keep a shell from doing it; a hub's name has no such beginning.
    return name.strip(), os.path.expanduser(folder.strip())


def _check_stage(folder: str) -> None:
    """Raise unless these are checkpoints of a stage that an adapter beside them can be taken back to."""
    student, role = _student_of(folder), Path(folder).name.split("-")[0]
    if role in BESIDE.values():
        raise LinearizeError(f"also: {folder!r} is no stage of the student; give {str(student.with_name(role))!r}")
    if not student.is_dir():
        raise LinearizeError(f"also: the checkpoints in {folder!r} are of {str(student)!r}, which is not there")
    if resolve(str(student)).kind != "adapter":
        raise LinearizeError(
            f"also: {folder!r} holds a part of the whole student {str(student)!r}; only an adapter can be taken back "
            "to a checkpoint"
        )


def _student_of(stage: str) -> Path:
    """RUN/student of RUN/checkpoints/STAGE."""
    return Path(stage).absolute().parents[1] / "student"


def _loader(folder: str, base: str | None, lora: bool, dtype: torch.dtype, device: str) -> Any:
    @contextmanager
    def enter() -> Iterator[Any]:
        if lora:
            from peft import PeftModel

            yield PeftModel.from_pretrained(load_weights(str(base), dtype, device), folder).eval()
        elif (checkpoint := latest(Path(folder))) is not None:
            model = load_model(str(_student_of(folder)), dtype, device, base=base, merge=False)[0]
            load_trained(checkpoint, model)
            yield model
        else:
            adapter = resolve(folder).kind == "adapter"
            yield load_model(folder, dtype, device, base=base if adapter else None, merge=False)[0]

    return enter


def tokens_seen(rows: Iterable[str], run: Path | None, also: Iterable[str] = ()) -> dict[str, int]:
    """How many tokens each row was trained on, by the log of its run; a row whose run is not known has none.

    Args:
        rows: their names.
        run: the folder of the run that the student is from, or None.
        also: as given to `also_rows`; a folder inside of a run, such as RUN/student, is known by that run.
    """
    folders = dict(map(_named_folder, also))
    found: dict[str, int] = {}
    for row in rows:
        if row in ("original", "window + sinks"):
            found[row] = 0
            continue
        folder = folders.get(row)
        until = None
        if folder is not None and latest(Path(folder)) is not None:
            log, role, until = _student_of(folder).with_name(TRAIN_LOG), "student", Path(folder).name
        elif folder is not None:
            log, role = Path(folder).parent / TRAIN_LOG, Path(folder).name
        elif run is not None:
            log, role = run / TRAIN_LOG, BESIDE.get(row, "student")
        else:
            continue
        if log.is_file():
            found[row] = _logged_tokens(log, role, until)
    return found


def _logged_tokens(log: Path, role: str, until: str | None = None) -> int:
    """Tokens of all stages of one role, or of those up to one: a stage's last line has its sum, and `control-2` is the
    control's second."""
    from linearize.benchmarks.report import read_train_log

    last = {str(record["stage"]): int(record["tokens"]) for record in read_train_log(log)}
    firsts = {stage: stage.split("-")[0] for stage in last}
    mine = [stage for stage, first in firsts.items() if (first if first in BESIDE.values() else "student") == role]
    if until in mine:
        mine = mine[: mine.index(until) + 1]
    return sum(last[stage] for stage in mine)


def row_identities(
    rows: Iterable[str], model: Any, original: str, name: str, run: Path | None, also: Iterable[str]
) -> dict[str, Any]:
    """What each row's numbers depend on, for `linearize.benchmarks.work.Work`: names and digests of files.

    Args:
        rows: their names, as `comparison_rows` and `also_rows` give them.
        model: the model that `comparison_rows` was called with.
        original: the original's name.
        name: the name of the student, or of the original where there is none.
        run: the folder of its run, where the rows trained beside it are.
        also: as given to `also_rows`.
    """
    inner = base_model(model)
    shared = {"original": original, "dtype": str(inner.dtype), "device": inner.device.type}
    conversion = dict(inner.config.linearize)
    folders = dict(map(_named_folder, also))
    found: dict[str, Any] = {}
    for row in rows:
        if row == "original":
            found[row] = shared
        elif row in folders and (Path(folders[row]) / ADAPTER_FILE).is_file():
            found[row] = shared | {"student": digest_files(Path(folders[row])), "row": "student"}
        elif row in folders:
            found[row] = shared | {"folder": digest_files(Path(folders[row]))}
            if latest(Path(folders[row])) is not None:
                found[row]["student"] = digest_files(_student_of(folders[row]))
        elif row == "window + sinks":
            # The mixer is not used; where it is the only difference, the row is the same one.
            near = {key: conversion[key] for key in ("window", "sinks", "softmax_layers")}
            found[row] = shared | {"near": near}
        elif row in BESIDE:
            assert run is not None
            found[row] = shared | {"folder": digest_files(run / BESIDE[row])}
            if row != "control":  # which is not converted: the same row for another student
                found[row]["conversion"] = conversion
        else:
            student = digest_files(Path(name)) if Path(name).is_dir() else name
            found[row] = shared | {"student": student, "row": row}
    return found
