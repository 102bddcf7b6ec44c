"""The whole job of one recipe, in parts that are each done once.

OUT/recipe.yaml      what was asked for, every value spelled out
OUT/progress.json    which parts are finished; a run that is called again goes on after them
OUT/train.jsonl      the log of the stages
OUT/checkpoints/     inside a stage, to go on after a kill
OUT/student/         part "student": the conversion, taught; or a copy of the student that the recipe names
OUT/control/         part "control": the original after the same end-to-end training
OUT/window/          part "window": the conversion without its state, after the same end-to-end training
OUT/evaluate.json, OUT/bench.json, OUT/report.html      the parts of these names
OUT/evaluate.work/   inside part "evaluate", to go on after a kill: each measurement of each row
OUT/trackers/        files of trackers that keep some

Under `accelerate launch` all processes train, and process 0 alone writes, prints and does the other parts.
"""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from linearize.benchmarks.files import read_json, write_json
from linearize.checkpoint import save
from linearize.console import note
from linearize.convert import added_parameters, base_model, convert, is_converted
from linearize.distill import processes
from linearize.distill.data import SHORTEST_DOCUMENT, TokenStream, build_stream
from linearize.distill.disk import writing
from linearize.distill.end_to_end import CONTROL, STAGE_OF, STUDENT, WINDOW, run_distill
from linearize.distill.loop import Outcome
from linearize.distill.options import Budget, DistillOptions, ExtendOptions, TransferOptions
from linearize.distill.positions import position_limit
from linearize.distill.recipe import Recipe, dump_recipe
from linearize.distill.sharding import wants_sharding
from linearize.distill.tracking import tracked
from linearize.distill.transfer import run_transfer
from linearize.errors import LinearizeError
from linearize.families import geometry_of
from linearize.inspection import inspect_config
from linearize.models import load_config, load_model, load_tokenizer, resolve, resolve_dtype
from linearize.rows import comparison_rows, speed_rows
from linearize.tables import print_bench, print_evaluation
from linearize.tasks import check_evaluation, evaluation_texts, run_folder

__all__ = ["PARTS", "Job"]

PARTS = ("student", CONTROL, WINDOW, "evaluate", "bench", "report")
TRAINED = ("student", CONTROL, WINDOW)
KIND = "linearize.progress"
# What an unfinished stage may go on with changed: a loss that diverges asks for another lr.
CHANGEABLE = ("lr", "mixer_lr", "log_every", "checkpoint_minutes")


class Job:
    """One recipe in one folder.

    Args:
        recipe: what to do.
        folder: where everything goes; made where it is missing.
        track: names of trackers that accelerate knows, or trackers of one's own; see `linearize.distill.tracking`.

    Raises:
        LinearizeError: the folder holds the run of another recipe or files of something else, or the recipe asks for
            what cannot be done together. Nothing is written then.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, track: Sequence[Any] = ()):
        processes.open_accelerator()
        self.recipe = recipe
        self.folder = Path(folder)
        self.track = track
        # Sharded weights fit no single process: what one alone would do is left to a later call.
        self.sharded = wants_sharding() and processes.count() > 1
        self.stages = _named(recipe)
        distills = [options for _, options in self.stages if isinstance(options, DistillOptions)]
        own_weights = any(options.train != "lora" for options in distills)
        asked = {CONTROL: recipe.evaluate.control, WINDOW: recipe.evaluate.window}
        # What is trained beside the student, in the same way.
        self.beside = [role for role, wanted in asked.items() if distills and wanted]
        if own_weights and self.beside:
            role = self.beside[0]
            raise LinearizeError(
                f"evaluate.{role}: a {role} row is trained with LoRA only, and a distill stage trains chosen "
                f"parameters; set train to lora, or evaluate.{role} to false"
            )
        if own_weights and self.sharded:
            raise LinearizeError(
                "accelerate: FSDP2 shards what is frozen and cannot save a whole student, and a distill stage trains "
                "chosen parameters; set train to lora, or launch without --use_fsdp"
            )
        with processes.wait_for_main():
            self._progress = self._open()
        found = processes.gather([*self._progress["done"], *self._progress["steps"]])
        if any(progress != found[0] for progress in found):
            raise LinearizeError(
                f"out: the processes find different progress in {str(self.folder)!r}; give a folder that all machines "
                "share"
            )
        # Training that changes the original's own weights makes a whole student; else the student is an adapter.
        self.whole = own_weights if recipe.student is None else _kind_of(self._given) == "student"
        if recipe.student is not None and self.folder.resolve().is_relative_to(Path(recipe.student).resolve()):
            raise LinearizeError(f"out: {str(folder)!r} lies inside the student's folder; give another one")

    def run(self, parts: Sequence[str]) -> list[Path]:
        """Do these parts, in the order of `PARTS`, but for those that are done; returns what each of them made.

        Of several processes, process 0 alone does what is no training, and returns anything.

        Raises:
            LinearizeError: a part that does not exist, or whatever the parts refuse.
        """
        for part in parts:
            if part not in PARTS:
                raise LinearizeError(f"parts: {part!r} is unknown; choose from {', '.join(PARTS)}")
        absent = {CONTROL, WINDOW} - set(self.beside)
        parts = [part for part in PARTS if part in parts and part not in absent]
        self._check(parts)
        rest = [part for part in parts if part not in TRAINED]
        if self.sharded and rest:
            _note(f"{', '.join(rest)}: in one process; the same command without accelerate launch goes on with it")
        if self.sharded or processes.rank() != 0:
            parts = [part for part in parts if part in TRAINED]
        with tracked(self.track, self.folder, self.recipe.to_dict()):
            made = self._do(parts)
        return made if processes.rank() == 0 else []

    def _do(self, parts: Sequence[str]) -> list[Path]:
        made = []
        try:
            for number, part in enumerate(parts, 1):
                where = f"[{number}/{len(parts)}] {part}"
                done = self._progress["done"]
                if part in done:
                    _note(f"{where}: done before")
                    made.append(self.folder / done[part]["made"])
                    continue
                _note(where)
                if part in TRAINED:
                    self._progress["processes"] = processes.count()
                start = time.perf_counter()
                made.append(getattr(self, f"_{part}")())
                if part != "report":  # it costs a second and shows whatever is there by now
                    done[part] = {"made": made[-1].name, "seconds": round(time.perf_counter() - start, 1)}
                    self._write_progress()
        except KeyboardInterrupt:
            _note("the same command goes on from here")
            raise
        return made

    def _open(self) -> dict[str, Any]:
        path = self.folder / "progress.json"
        asked = self.recipe.to_dict()
        if path.is_file():
            progress = read_json(path, KIND)
            done = list(progress["steps"]) if "student" not in progress["done"] else [name for name, _ in self.stages]
            before, now = self._fixed(progress["recipe"], done), self._fixed(asked, done)
            batches = before["gradient_accumulation"] * progress.get("processes", 1)
            if batches == now["gradient_accumulation"] * processes.count():
                now |= {"gradient_accumulation": before["gradient_accumulation"]}  # the same steps in other processes
            if before != now:
                raise LinearizeError(
                    f"out: {str(self.folder)!r} holds the run of another recipe ({_difference(before, now)}); give "
                    "another --out, or the same recipe to go on"
                )
            if progress["recipe"] != asked:
                changed = {"what": _difference(progress["recipe"], asked), "after": dict(progress["steps"])}
                progress["changed"] = [*progress.get("changed", []), changed]
                progress["recipe"] = asked
            return progress
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
            raise LinearizeError(f"out: {str(self.folder)!r} holds files of something else; give a new folder")
        return {"kind": KIND, "schema": 1, "recipe": asked, "dtype": None, "streams": {}, "steps": {}, "done": {}}

    def _fixed(self, recipe: dict[str, Any], done: Sequence[str]) -> dict[str, Any]:
        """The settings that a run may not change any more, `done` being its finished stages."""
        stages = []
        for index, stage in enumerate(recipe["stages"]):
            if index < len(self.stages) and self.stages[index][0] in done:
                stages.append(stage)
            else:
                stages.append(
                    {
                        kind: {key: value for key, value in options.items() if key not in CHANGEABLE}
                        for kind, options in stage.items()
                    }
                )
        return recipe | {"stages": stages}

    def _write_progress(self) -> None:
        if processes.rank() == 0:
            path = self.folder / "progress.json"
            with writing(path, len(str(self._progress))):
                write_json(path, self._progress)

    def _check(self, parts: Sequence[str]) -> None:
        """What would fail after the training is found before it. Then the folder is begun."""
        config = load_config(self.recipe.model)
        if self.recipe.student is None:
            inspect_config(config, self.recipe.convert)
        elif self.whole:
            _check_original(config, self._given, self.recipe.model)
        if "evaluate" in parts:
            check_evaluation(self.recipe.evaluate, self._texts, self._tokenizer, self.recipe.seed)
        processes.gather(None)  # all have read the folder and found nothing wrong
        written = self.folder / "recipe.yaml"
        if processes.rank() == 0 and (not written.is_file() or "changed" in self._progress):
            self._write_progress()
            dump_recipe(self.recipe, written)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model)

    @cached_property
    def _texts(self) -> dict[str, torch.Tensor]:
        return evaluation_texts(self.recipe.evaluate, self.recipe.data, self.recipe.seed, self._tokenizer)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """Chosen once a run: a probe that falls out otherwise must not change a run that goes on."""
        if self._progress["dtype"] is None:
            dtype, reason = processes.from_main(resolve_dtype(self.recipe.dtype))
            _note(f"dtype: {reason}")
            self._progress["dtype"] = str(dtype).removeprefix("torch.")
            self._write_progress()
        return getattr(torch, self._progress["dtype"])

    @property
    def _device(self) -> str | None:
        """Where models are loaded; None is the process's GPU, if there is one. Sharded ones go there layer by layer."""
        return "cpu" if self.sharded else None

    @property
    def _given(self) -> Path:
        """Where the student of a recipe that names one is: the run's own copy, once it is there."""
        done = "student" in self._progress["done"]
        return self.folder / "student" if done else Path(str(self.recipe.student)).expanduser()

    def _load(self, folder: Path) -> Any:
        """A student, with its LoRA apart. A given one goes on the recipe's original, by whatever name it knows that."""
        base = None if self.recipe.student is None or self.whole else self.recipe.model
        return load_model(folder, self._dtype, self._device, base=base, merge=False)[0]

    @cached_property
    def _model(self) -> Any:
        """The student, with its LoRA apart; and those that were trained beside it."""
        model = self._load(self.folder / "student")
        for role in self.beside:
            if role in self._progress["done"]:
                model.load_adapter(str(self.folder / role), adapter_name=role)
                model.set_adapter(STUDENT)
        return model

    def _stream(self, model: Any, seq_len: int | None = None) -> TokenStream:
        """The training text from its start; where the recipe says so, `model` has written some of it.

        With `seq_len` the rows are up to that long, of one document each, and documents that fit into the recipe's
        rows are passed over.
        """
        data, shortest = self.recipe.data, SHORTEST_DOCUMENT
        if seq_len is not None:
            shortest = min(data.seq_len, seq_len)
            data = replace(data, seq_len=seq_len, packing="document")
        teacher = comparison_rows(model)["original"]() if is_converted(model) else nullcontext(model)
        # Process 0 lets the teacher write what is missing; the others read it.
        with teacher, processes.wait_for_main():
            texts = self.folder / "texts"
            return build_stream(data, self._tokenizer, self.recipe.seed, "train", model, texts, shortest)

    def _student(self) -> Path:
        if self.recipe.student is not None:
            return self._copied()
        model, _ = load_model(self.recipe.model, self._dtype, self._device)
        short = self._stream(model)
        # What does not fit is found now, not after hours of the stages before.
        streams = [
            self._stream(model, options.seq_len) if isinstance(options, ExtendOptions) else short
            for _, options in self.stages
        ]
        for (stage, options), stream in zip(self.stages, streams):
            if isinstance(options, TransferOptions):
                position_limit(model.config, stream.seq_len, options.positions, stage)
        torch.manual_seed(self.recipe.seed)
        convert(model, self.recipe.convert)
        for index, ((stage, options), stream) in enumerate(zip(self.stages, streams)):
            # Those trained beside the student read on from the same place.
            self._progress["streams"].setdefault(stage, stream.state_dict())
            self._write_progress()
            torch.manual_seed(self.recipe.seed + index)  # new weights do not depend on whether a run was cut in two
            accumulation = self.recipe.gradient_accumulation
            if isinstance(options, DistillOptions):
                model, outcome = run_distill(
                    model, stream, options, self.folder, stage=stage, accumulation=accumulation
                )
            else:
                outcome = run_transfer(model, stream, options, self.folder, accumulation=accumulation)
            _say(stage, outcome)
            self._progress["steps"][stage] = outcome.steps
            self._write_progress()
        if self.whole and hasattr(model, "peft_config"):
            model = model.merge_and_unload()
        with processes.wait_for_main():
            if processes.rank() == 0:
                self._save(model)
        self._model = model.eval()
        return self.folder / "student"

    def _copied(self) -> Path:
        """The given student, read once, so that one that does not fit its original is not kept."""
        given, final = self._given, self.folder / "student"
        model = self._load(given)
        with processes.wait_for_main():
            if processes.rank() == 0:
                partial = self.folder / "student.partial"
                size = sum(path.stat().st_size for path in given.rglob("*") if path.is_file())
                with writing(final, size, partial):
                    shutil.rmtree(partial, ignore_errors=True)
                    shutil.copytree(given, partial)
                    os.replace(partial, final)
        self._model = model
        return final

    def _save(self, model: Any) -> None:
        final, partial = self.folder / "student", self.folder / "student.partial"
        learned = [p for name, p in model.named_parameters() if ".lora_" in name] + list(
            added_parameters(model).values()
        )
        size = sum(p.nbytes for p in (model.parameters() if self.whole else learned))
        with writing(final, size, partial):
            shutil.rmtree(partial, ignore_errors=True)
            save(model, partial, adapter=not self.whole, tokenizer=self._tokenizer)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)

    def _control(self) -> Path:
        return self._trained_beside(CONTROL)

    def _window(self) -> Path:
        return self._trained_beside(WINDOW)

    def _trained_beside(self, role: str) -> Path:
        """The end-to-end stages once more for another role: the same text, steps and settings."""
        model = self._model
        for index, (stage, options) in enumerate(self.stages):
            if isinstance(options, DistillOptions):
                stream = self._stream(model, options.seq_len if isinstance(options, ExtendOptions) else None)
                stream.load_state_dict(self._progress["streams"][stage])
                torch.manual_seed(self.recipe.seed + index)
                name = stage.replace("distill", STAGE_OF[role])  # control, control-2; beside extend control-extend
                name = f"{STAGE_OF[role]}-{stage}" if name == stage else name
                # The student's steps, not its minutes: the original is faster, and would see more text in them.
                options = replace(options, budget=Budget(steps=self._progress["steps"][stage]))
                shared = {"accumulation": self.recipe.gradient_accumulation}
                model, outcome = run_distill(model, stream, options, self.folder, role=role, stage=name, **shared)
                _say(name, outcome)
        with processes.wait_for_main():
            if processes.rank() == 0:
                self._save_beside(model, role)
        return self.folder / role

    def _save_beside(self, model: Any, role: str) -> None:
        final, partial = self.folder / role, self.folder / f"{role}.partial"
        size = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name and f".{role}." in name)
        with writing(final, size, partial):
            # peft puts a named adapter into a folder of its own inside the given one, beside files we do not want.
            model.save_pretrained(partial, selected_adapters=[role], save_embedding_layers=False)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial / role, final)
            shutil.rmtree(partial)

    def _evaluate(self) -> Path:
        from linearize.also import row_identities, tokens_seen
        from linearize.benchmarks.evaluate import evaluate_rows
        from linearize.benchmarks.work import Work

        base = load_model(self.recipe.model, self._dtype)[0] if self.whole else None
        rows = comparison_rows(self._model, base)
        original = base_model(self._model if base is None else base).config
        student = str(self.folder / "student")
        identities = row_identities(rows, self._model, original.name_or_path, student, self.folder, ())
        result = evaluate_rows(
            rows,
            self._tokenizer,
            self._texts,
            self.recipe.evaluate,
            self.recipe.seed,
            Work(self.folder / "evaluate.work", identities),  # where `linearize evaluate` looks for them too
            conversion=base_model(self._model).config.linearize,
        )
        given = self.recipe.student
        result["tokens_seen"] = tokens_seen(rows, self.folder if given is None else run_folder(given))
        print_evaluation(result)
        return write_json(self.folder / "evaluate.json", result)

    def _bench(self) -> Path:
        from linearize.benchmarks.decode import bench_decode

        model = self._model
        del self.__dict__["_model"]  # merging is for good
        if hasattr(model, "peft_config"):
            model = model.merge_and_unload()
        options = self.recipe.bench
        result = bench_decode(
            speed_rows(model, options.control),
            options.contexts,
            next(iter(self._texts.values())),
            decode_tokens=options.decode_tokens,
            repeats=options.repeats,
            batches=options.batch,
            modes=options.modes,
            fill=options.fill,
            prefill=options.prefill,
            max_minutes=options.minutes,
            seed=self.recipe.seed,
        )
        print_bench(result)
        return write_json(self.folder / "bench.json", result)

    def _report(self) -> Path:
        from linearize.benchmarks.report import write_report

        return write_report(self.folder)


def _named(recipe: Recipe) -> list[tuple[str, Any]]:
    """The stages with a name each for logs and checkpoints: transfer, distill, distill-2, ..."""
    named: list[tuple[str, Any]] = []
    for kind, options in recipe.stages:
        count = 1 + sum(type(other) is type(options) for _, other in named)
        if count > 1 and kind == "transfer":
            raise LinearizeError("stages: transfer is listed twice; give it once, with the sum of the budgets")
        named.append((kind if count == 1 else f"{kind}-{count}", options))
    return named


def _kind_of(student: Path) -> str:
    """What the folder of a given student holds: "adapter", or "student" for a whole one."""
    if not student.is_dir():
        raise LinearizeError(f"student: no folder {str(student)!r}; give the folder of a student")
    try:
        kind = resolve(student).kind
    except LinearizeError as error:
        raise LinearizeError(f"student: {str(error).removeprefix('model: ')}") from None
    if kind == "original":
        raise LinearizeError(
            f"student: {str(student)!r} holds an original, no student; give a student's folder, or leave student out "
            "to make one"
        )
    return kind


def _check_original(config: Any, student: Path, model: str) -> None:
    """Raise where a whole student cannot be of the original that it would be compared with. (An adapter knows the
    weights that it was made on, which are compared when it is loaded.)"""
    other = load_config(student)
    found, wanted = ({**vars(geometry_of(x)), "vocabulary": x.vocab_size} for x in (config, other))
    if found != wanted:
        raise LinearizeError(
            f"model: {model!r} has {found} and the student in {str(student)!r} {wanted}; give the original that it was "
            "made of"
        )


def _note(text: str) -> None:
    """One line, of process 0."""
    if processes.rank() == 0:
        note(text)


def _say(stage: str, outcome: Outcome) -> None:
    """What a stage did, and the losses at its start and end."""
    speed = outcome.tokens / max(outcome.seconds, 1e-9)
    _note(
        f"{stage}: {outcome.steps} steps, {outcome.tokens} tokens in {outcome.seconds / 60:.1f} min "
        f"({speed:.0f} tokens/s)"
    )
    for name, first in outcome.first.items():
        _note(f"  {name:<9} {first:.4f} -> {outcome.last[name]:.4f}")


def _difference(before: Any, now: Any, where: str = "") -> str:
    """The first setting in which two recipes differ, as `a.b is 1 there and 2 here`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (old, new) in enumerate(zip(before, now)):
            if old != new:
                return _difference(old, new, f"{where}[{index}]")
    return f"{where} is {before!r} there and {now!r} here"
