"""The rows of a comparison: the student and what it must be compared with, as switches on one set of weights.

    original          the teacher
    control           the teacher after the same end-to-end training as the student
    window + sinks    the original's weights with the near side only: what conversion costs before any state
    window + sinks, trained    the same after the same end-to-end training as the student
    student           the trained student
    student, state off, student, window off      which side carries it

A row is a function without arguments that returns a context manager, which yields the model set up as that row.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from linearize.config import LinearizeConfig
from linearize.convert import (
    base_model,
    convert,
    converted_layers,
    is_converted,
    original_attention,
    revert,
    state_off,
    window_off,
)

__all__ = ["CONTROL", "ORIGINAL_AGAIN", "WINDOW", "Rows", "comparison_rows", "speed_rows", "untrained"]

Rows = dict[str, Callable[[], AbstractContextManager[Any]]]
CONTROL, WINDOW = "control", "window"  # names of PEFT adapters
ORIGINAL_AGAIN = "original again"


def comparison_rows(model: Any, base: Any = None) -> Rows:
    """Rows for quality, as far as the model allows.

    Args:
        model: an original, which gets the rows `original` and `window + sinks` and is converted for that; a student
            whose own weights are the original's (its LoRA unmerged); or any student, with `base`. A PeftModel with
            adapters named `control` or `window` gets those rows too.
        base: the original, for a student whose weights training changed or merged; converted here for its rows.
    """
    if not is_converted(model):
        convert(model, LinearizeConfig(mixer="none"))
        return {"original": lambda: original_attention(model), "window + sinks": lambda: state_off(model)}
    source = model
    if base is not None:
        config = LinearizeConfig.from_dict(base_model(model).config.linearize)
        source = convert(base, replace(config, mixer="none"))
    rows: Rows = {"original": lambda: untrained(source, original_attention)}
    if CONTROL in getattr(model, "peft_config", {}):
        rows[CONTROL] = lambda: _with_adapter(model, CONTROL, original_attention)
    rows["window + sinks"] = lambda: untrained(source, state_off)
    if WINDOW in getattr(model, "peft_config", {}):
        rows["window + sinks, trained"] = lambda: _with_adapter(model, WINDOW, state_off)
    rows["student"] = lambda: nullcontext(model)
    if _has_state(model):
        rows["student, state off"] = lambda: state_off(model)
        rows["student, window off"] = lambda: window_off(model)
    return rows


def speed_rows(model: Any, control: bool = False) -> Rows:
    """Rows for speed: a model of transformers' own class beside the converted one, with the same weights in memory.

    A switch would do for the numbers, but it costs the original some time at every layer.

    Args:
        model: an original, which is compared with window + sinks, or a student. Its LoRA must be merged: the extra
            products would be charged to both rows.
        control: add the original once more, as `ORIGINAL_AGAIN`: what is measured between it and the original is the
            measurement's own error.
    """
    other = _sharing_weights(model)
    if is_converted(model):
        original, name, converted = revert(other), "student", model
    else:
        original, name, converted = model, "window + sinks", convert(other, LinearizeConfig(mixer="none"))
    rows: Rows = {"original": lambda: nullcontext(original)}
    if control:
        rows[ORIGINAL_AGAIN] = rows["original"]
    return rows | {name: lambda: nullcontext(converted)}


def _sharing_weights(model: Any) -> Any:
    """A second model around the same parameters."""
    other = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    # A step that transformers has compiled for the one model stays that model's, also as the other's attribute.
    other.__dict__.pop("_compiled_call", None)
    return other


def _has_state(model: Any) -> bool:
    return any(layer.mixer is not None for layer in converted_layers(model).values())


@contextmanager
def untrained(model: Any, switch: Callable[[Any], AbstractContextManager[Any]]) -> Iterator[Any]:
    """Inside, the model under a switch, without what LoRA learned. With `original_attention` that is the teacher."""
    disabled = model.disable_adapter() if hasattr(model, "peft_config") else nullcontext()
    with disabled, switch(model):
        yield model


@contextmanager
def _with_adapter(model: Any, name: str, switch: Callable[[Any], AbstractContextManager[Any]]) -> Iterator[Any]:
    """The model under a switch, with another LoRA instead of the student's."""
    before = model.active_adapter
    model.set_adapter(name)
    try:
        with switch(model):
            yield model
    finally:
        model.set_adapter(before)
