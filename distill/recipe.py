"""Recipes: what a run does, as frozen records that read from and write to YAML.

Every record checks itself whenever it is built, in code or from a file, so a record that exists is valid. Problems
are `LinearizeError`s that start with the path of the key: `stages[0].transfer.objectiv: unknown key, did you mean
'objective'?`. Relative paths inside a recipe are relative to the working directory.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml

from linearize.config import TAUGHT_MIXERS, LinearizeConfig
from linearize.distill.options import (
    BenchOptions,
    Budget,
    DataOptions,
    DistillOptions,
    EvaluateOptions,
    ExtendOptions,
    Source,
    TransferOptions,
)
from linearize.distill.records import RecipeError, Record, check_keys, convert_list, nearest, option, plain, shown
from linearize.errors import LinearizeError

__all__ = [
    "STAGES",
    "BenchOptions",
    "Budget",
    "DataOptions",
    "DistillOptions",
    "EvaluateOptions",
    "ExtendOptions",
    "Recipe",
    "RecipeError",
    "Source",
    "Stage",
    "StrictLoader",
    "TransferOptions",
    "dump_recipe",
    "load_recipe",
    "preset_names",
]

Stage = tuple[str, TransferOptions | DistillOptions]
STAGES: dict[str, type[TransferOptions] | type[DistillOptions]] = {
    "transfer": TransferOptions,
    "distill": DistillOptions,
    "extend": ExtendOptions,
}


def _config(value: object) -> LinearizeConfig:
    if isinstance(value, LinearizeConfig):
        return value
    known = [spec.name for spec in fields(LinearizeConfig)]
    settings = check_keys(value, known)
    try:
        return LinearizeConfig.from_dict(settings)
    except LinearizeError as error:
        key, _, text = str(error).partition(": ")
        raise RecipeError(key, text) if key in known else RecipeError("", str(error)) from None


def _stage(value: object) -> Stage:
    """A stage from `(name, options)` or from YAML's one-key map."""
    if isinstance(value, tuple) and len(value) == 2:
        value = {value[0]: value[1]}
    settings = check_keys(value, list(STAGES))
    if len(settings) != 1:
        names = " and ".join(settings) or "none"
        raise RecipeError("", f"a list entry is one stage, got {names}; begin each stage with its own -")
    ((name, options),) = settings.items()
    kind = STAGES[name]
    try:
        return name, options if isinstance(options, kind) else kind.from_dict(options)
    except RecipeError as error:
        raise error.inside(name) from None


def _stages(value: object) -> tuple[Stage, ...]:
    return convert_list(value, _stage)


@dataclass(frozen=True, kw_only=True)
class Recipe(Record):
    """The whole job.

    Attributes:
        name: a short name for reports.
        model: the original: a local folder, a hub name, `path/to/file.gguf` or `package://package/file.gguf`.
        student: the folder of a student that exists, an adapter of `model` or a whole one: nothing is trained, and it
            is measured as the student of a run. `None` makes one, by `convert` and `stages`.
        convert: what the layers become.
        data: what is trained on; of a student that exists, what it was, so that text held out of it is measured.
        stages: `(name, options)` in order, the name being a key of `STAGES`; in YAML a list of one-key maps.
        evaluate: what is measured about quality.
        bench: what is measured about speed.
        dtype: of weights and products; `"auto"` probes the machine.
        seed: of everything random.
        gradient_accumulation: batches an optimizer step.
    """

    name: str = option(hint="give the recipe a short name")
    model: str = option(hint="give a model: a local folder, a hub name or path/to/file.gguf")
    student: str | None = option(None, hint="give the folder of a student, or leave student out")
    convert: LinearizeConfig = field(default_factory=LinearizeConfig, metadata={"convert": _config})
    data: DataOptions = field(metadata={"hint": "say what to train on, e.g. data: {sources: [{kind: pydoc}]}"})
    stages: tuple[Stage, ...] = field(default=(), metadata={"convert": _stages})
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    bench: BenchOptions = field(default_factory=BenchOptions)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = option(0, least=0, below=2**32)
    gradient_accumulation: int = option(1, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student is not None and self.stages:
            raise RecipeError(
                "stages",
                f"{self.stages[0][0]} beside student {shown(self.student)}, which is measured as it is; leave stages "
                "out, or student to teach a new one",
            )
        if self.student is not None and self.convert != LinearizeConfig():
            raise RecipeError(
                "convert",
                f"given beside student {shown(self.student)}, which is converted already; leave convert out",
            )
        for index, (name, options) in enumerate(self.stages):
            end_to_end = sum(isinstance(other, DistillOptions) for _, other in self.stages)
            if isinstance(options, DistillOptions) and options.train != "lora" and end_to_end > 1:
                raise RecipeError(
                    f"stages[{index}].{name}.train",
                    f"{list(options.train)} beside another end-to-end stage, whose result would become the teacher; "
                    "give one such stage, or train lora in all",
                )
            if isinstance(options, DistillOptions) and options.window_dropout and self.convert.mixer == "none":
                raise RecipeError(
                    f"stages[{index}].{name}.window_dropout",
                    f"{options.window_dropout}, and convert.mixer 'none' has no state that a smaller window would "
                    "train; set it to 0",
                )
            if name == "transfer" and any(isinstance(before, DistillOptions) for _, before in self.stages[:index]):
                raise RecipeError(
                    f"stages[{index}]",
                    "transfer after an end-to-end stage would learn from the trained weights instead of the original; "
                    "list it first",
                )
            if name == "transfer" and self.convert.mixer not in TAUGHT_MIXERS:
                why = "no state" if self.convert.mixer == "none" else "no far side of its own"
                raise RecipeError(
                    f"stages[{index}]",
                    f"transfer teaches the state, and convert.mixer {self.convert.mixer!r} has {why}; remove the stage",
                )

    def to_dict(self) -> dict[str, Any]:
        stages = [{name: plain(options)} for name, options in self.stages]
        values = super().to_dict() | {"convert": self.convert.to_dict(), "stages": stages}
        if self.student is not None:
            del values["convert"]  # the defaults, which say nothing about this student
        return values


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        name: a YAML file, or the name of a preset (`preset_names()`).
        overrides: settings that replace the file's, each `path.to.key=value` with the value in YAML, such as
            `stages.0.transfer.budget.minutes=1`.

    Raises:
        LinearizeError: a missing file, an unknown preset, bad YAML, or whatever a record refuses.
    """
    text, where = _read(name)
    try:
        values = yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise LinearizeError(f"{where}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise LinearizeError(f"{where}: a recipe is a map of settings (name, model, data, ...), got {shown(values)}")
    values.setdefault("name", Path(name).stem)
    for override in overrides:
        _override(values, override)
    try:
        return Recipe.from_dict(values)
    except RecipeError as error:
        raise LinearizeError(f"{where}: {error}") from None


def dump_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe as YAML, every value spelled out, so that later defaults cannot change it."""
    Path(path).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")


def preset_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml"))


def _presets() -> Traversable:
    return resources.files("linearize.distill").joinpath("recipes")


def _read(name: str | Path) -> tuple[str, str]:
    """The recipe's text and the name under which errors quote it."""
    path = Path(name)
    if isinstance(name, str) and name in preset_names():
        return _presets().joinpath(f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name!r}"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise LinearizeError(f"{path}: not UTF-8 at byte {error.start}; save the recipe as UTF-8") from None
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise LinearizeError(f"{path}: no such recipe file; give a YAML file or one of {', '.join(preset_names())}")
    raise LinearizeError(f"recipe {str(name)!r}: unknown{nearest(str(name), preset_names())}; or give a YAML file")


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: PyYAML would quietly keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def _override(values: dict[Any, Any], override: str) -> None:
    """Apply one `path.to.key=value` to what YAML held."""
    key, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
    if not equals or not all(parts):
        raise LinearizeError(f"override {override!r}: not of the form key=value, such as data.seq_len=512")
    try:
        value = yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise LinearizeError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from None
    here: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        where = ".".join(parts[:depth])
        index: Any = part
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                count = f"has {len(here)} entries, counted from 0"
                raise LinearizeError(f"override {override!r}: {part!r} is no place in {where}, which {count}")
            index = int(part)
        elif not isinstance(here, dict):
            raise LinearizeError(f"override {override!r}: {where} is {shown(here)}, which holds no {part!r}")
        if last:
            here[index] = value
        else:
            if isinstance(here, dict) and here.get(index) is None:
                here[index] = {}
            here = here[index]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
