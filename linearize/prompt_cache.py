"""A cache on disk: a long prompt is read once and gone on with as often as wanted.

    cache = model(**prompt, use_cache=True).past_key_values
    save_cache(cache, "prompt.safetensors", model)
    ...
    cache = load_cache("prompt.safetensors", model)
    model.generate(**prompt_and_question, past_key_values=cache)

The file is safetensors. Its metadata has one entry, `linearize`: JSON with the format, the model that made it and, for
each layer, what it is, its sizes and the numbers beside its tensors. Layers are numbered as in the model:

    layers.0.keys, layers.0.values, layers.0.state.s, ...    of a converted layer, as in `kernels.near_far.Memory`
    layers.1.keys, layers.1.values                           of a softmax layer
"""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from linearize._version import __version__
from linearize.cache import NearFarLayer, new_cache
from linearize.convert import base_model, converted_layers
from linearize.errors import LinearizeError
from linearize.families import family_of, geometry_of
from linearize.fingerprint import spread
from linearize.growing import GrowingLayer
from linearize.kernels.near_far import Memory
from linearize.kernels.near_far.mixers import State
from linearize.kernels.near_far.rollback import Undo

__all__ = ["load_cache", "save_cache"]

FORMAT_VERSION = 1
HEADER = "linearize"
PER_TENSOR = 4  # values of each weight that tell one model from another
# What a converted layer's memory consists of.
_PARTS: dict[Any, Any] = {part.__name__: part for part in (Memory, State, Undo)}
_MARKS = "layer.marks"
_LENGTH = "cumulative_length"  # of a layer with a sliding window of its own


def save_cache(cache: Cache, path: str | os.PathLike[str], model: Any = None) -> None:
    """Write what a cache holds to one file, which is replaced where there is one.

    Args:
        cache: of a converted model, with converted, softmax and sliding layers that grow (a `DynamicCache`).
        path: the file.
        model: the model that filled it. Without it `load_cache` can compare sizes only, not weights.

    Raises:
        LinearizeError: a cache that holds nothing, or with layers of another kind.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        description, parts = _describe(layer, index, type(cache).__name__)
        layers.append(description)
        tensors |= {f"layers.{index}.{name}": x.detach().cpu().contiguous() for name, x in parts.items()}
    if not tensors:
        raise LinearizeError("cache: it holds nothing yet; give it a prompt first")
    header = {
        "format": FORMAT_VERSION,
        "version": __version__,
        "length": cache.get_seq_length(),
        "model": None if model is None else _identity(model),
        "layers": layers,
    }
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {HEADER: json.dumps(header)})
    os.replace(partial, path)


def load_cache(path: str | os.PathLike[str], model: Any) -> DynamicCache:
    """The cache that `save_cache` wrote, on the devices of the model's layers.

    Args:
        path: the file.
        model: the converted model that goes on with it.

    Raises:
        LinearizeError: a file that is none of ours, of another version, or of another model or conversion.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, this is no dict
    except (SafetensorError, OSError) as error:
        raise LinearizeError(
            f"{str(path)!r}: cannot be read ({str(error).splitlines()[0]}); save the cache again"
        ) from error
    if HEADER not in metadata:
        raise LinearizeError(f"{str(path)!r}: it holds tensors but no cache; give a file that save_cache wrote")
    header = json.loads(metadata[HEADER])
    if header.get("format") != FORMAT_VERSION:
        raise LinearizeError(
            f"{str(path)!r}: format {header.get('format')!r} is not the {FORMAT_VERSION} that this version of "
            f"linearize reads; install linearize {header.get('version')}, which wrote it"
        )
    _check_model(path, header, model)
    base = base_model(model)
    cache = new_cache(base.config, list(converted_layers(model)))
    decoder_layers = base.get_submodule(family_of(base.config).layers)
    for index, (layer, description) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        device = next(decoder_layers[index].parameters()).device
        prefix = f"layers.{index}."
        parts = {name.removeprefix(prefix): x.to(device) for name, x in tensors.items() if name.startswith(prefix)}
        _fill(layer, parts, description["numbers"])
    return cache


def _describe(layer: Any, index: int, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what the header says of a layer in a cache of some kind, its tensors by name)."""
    if isinstance(layer, NearFarLayer) and layer.static_length is None:
        return _describe_converted(layer)
    if type(layer) not in (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer):
        raise LinearizeError(
            f"cache: layer {index}, a {type(layer).__name__} in a {kind}, cannot be saved; fill a DynamicCache"
        )
    if not layer.is_initialized:
        return {"kind": "softmax", "sizes": None, "numbers": {}}, {}
    sizes = {"kv_heads": layer.keys.shape[1], "head_dim": layer.keys.shape[3]}
    keys, values, numbers = layer.keys, layer.values, {}
    if isinstance(layer, DynamicSlidingWindowLayer):
        numbers = {_LENGTH: layer.cumulative_length}
        held = layer.sliding_window - 1  # more only while it records the past
        keys, values = (x[:, :, -held:].contiguous() if held else x[:, :, :0] for x in (keys, values))
    return {"kind": "softmax", "sizes": sizes, "numbers": numbers}, {"keys": keys, "values": values}


def _describe_converted(layer: NearFarLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if layer.memory is None:
        return {"kind": "converted", "sizes": None, "numbers": {}}, {}
    memory = layer.memory.map(torch.clone)  # its tensors may share memory, which safetensors refuses
    tensors, numbers = _take_apart(memory)
    if layer.marks is not None:
        tensors[_MARKS] = layer.marks
    sizes = {
        "kv_heads": memory.keys.shape[1],
        "head_dim": memory.keys.shape[3],
        "window": memory.near_k.shape[2] // 2,
        "sinks": memory.sinks,
        "features": None if memory.state is None else memory.state.s.shape[2],
    }
    numbers |= {"layer.seen": layer.seen, "layer.since": layer.since}
    return {"kind": "converted", "sizes": sizes, "numbers": numbers}, tensors


def _fill(layer: Any, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """What `_describe` took from a layer, into an empty one of the same kind."""
    if not tensors:
        return
    keys, values = tensors["keys"], tensors["values"]
    if isinstance(layer, NearFarLayer):
        layer.seen, layer.since = numbers["layer.seen"], numbers["layer.since"]
        layer.marks = tensors.get(_MARKS)
        layer.memory = _put_together(tensors, numbers)
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        return
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if _LENGTH in numbers:
        layer.cumulative_length = numbers[_LENGTH]


def _take_apart(value: Any, path: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, all else) of a memory and of what it consists of, by their paths: `keys`, `state`, `state.s`, ...

    A part is named by its class; every other entry that is no tensor is a number or None.
    """
    if isinstance(value, Tensor):
        return {path: value}, {}
    if type(value).__name__ not in _PARTS:
        return {}, {path: value}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {path: type(value).__name__}
    for name in _names(type(value)):
        more_tensors, more_numbers = _take_apart(getattr(value, name), f"{path}.{name}" if path else name)
        tensors |= more_tensors
        numbers |= more_numbers
    return tensors, numbers


def _put_together(tensors: dict[str, Tensor], numbers: dict[str, Any], path: str = "") -> Any:
    """The inverse of `_take_apart`."""
    if path in tensors:
        return tensors[path]
    value = numbers[path]
    if value not in _PARTS:
        return value
    made = _PARTS[value]
    names = {name: f"{path}.{name}" if path else name for name in _names(made)}
    return made(**{name: _put_together(tensors, numbers, inner) for name, inner in names.items()})


def _names(part: Any) -> tuple[str, ...]:
    """The fields of a part, which is a NamedTuple or a dataclass."""
    return part._fields if hasattr(part, "_fields") else tuple(field.name for field in fields(part))


def _identity(model: Any) -> dict[str, Any]:
    """What tells the model from others: its family, conversion, dtype, and a digest of a sample of all its weights."""
    base = base_model(model)
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            index = torch.tensor(spread(parameter.numel(), PER_TENSOR), device=parameter.device)
            digest.update(f"{name} {parameter.reshape(-1)[index].float().tolist()}\n".encode())
    return {
        "model_type": base.config.model_type,
        "conversion": getattr(base.config, "linearize", None),
        "dtype": str(base.dtype).removeprefix("torch."),
        "weights": digest.hexdigest()[:16],
    }


def _check_model(path: str | os.PathLike[str], header: dict[str, Any], model: Any) -> None:
    """The layers of the file must be the model's and, where it says whose they are, the model its own."""
    base, converted = base_model(model), converted_layers(model)
    if not converted:
        raise LinearizeError(
            f"model: {type(base).__name__} is not converted; load the cache into the student that made it"
        )
    geometry, layers = geometry_of(base.config), header["layers"]
    if len(layers) != geometry.layers:
        raise LinearizeError(
            f"{str(path)!r}: it has {len(layers)} layers and the model {geometry.layers}; give the model that made it"
        )
    for index, layer in enumerate(layers):
        sizes: dict[str, Any] = {"kv_heads": geometry.kv_heads, "head_dim": geometry.head_dim}
        if index in converted:
            attention = converted[index]
            sizes["window"] = attention.linearize_config.window
            sizes["sinks"] = attention.linearize_config.sinks
            sizes["features"] = None if attention.mixer is None else attention.mixer.num_features
        kind = "converted" if index in converted else "softmax"
        if layer["kind"] != kind or layer["sizes"] not in (None, sizes):
            raise LinearizeError(
                f"{str(path)!r}: layer {index} is a {layer['kind']} layer of {layer['sizes']}, the model's is a {kind} "
                f"layer of {sizes}; give the model that made it"
            )
    made_by = header["model"]
    if made_by is None:
        return
    for name, found in _identity(model).items():
        if made_by[name] != found:
            raise LinearizeError(
                f"{str(path)!r}: it was made by a model of {name} {made_by[name]}, and this one's is {found}; give the "
                "model that made it, or read the prompt again"
            )
