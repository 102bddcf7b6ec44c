"""Subclasses of transformers' own classes, one pair a family, made when they are needed.

A converted model is still an instance of its family's class (`LlamaForCausalLM`), of a subclass that

- builds itself converted, so that `AutoModelForCausalLM.from_pretrained` loads a saved student like any model;
- writes `"model_type": "linearize"` into config.json, so that a program that has not imported `linearize` refuses
  the checkpoint instead of loading it as the softmax model that it no longer is.

In memory `config.model_type` stays the family's name, which peft and others look up.
"""

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from linearize._version import __version__
from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError
from linearize.families import family_of

__all__ = ["MODEL_TYPE", "config_class", "model_class", "register"]

MODEL_TYPE = "linearize"
CONFIG_KEY = "linearize"
# Keys of masks that are made ahead of a step.
NEW_TOKENS_MASK, ORIGINAL_MASK = "near_far", "original"
FORMAT_VERSION = 1
_PREFIX = "Linearized"

# What `_subclass` puts behind the mixins, for type checkers.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _ConfigBase
    from transformers import PreTrainedModel as _ModelBase
else:
    _ConfigBase = _ModelBase = object


class LinearizedConfigMixin(_ConfigBase):
    """A family's config with the conversion in it, under the key `linearize`."""

    def to_json_string(self, use_diff: bool = True) -> str:
        values = json.loads(super().to_json_string(use_diff))
        header = {"format": FORMAT_VERSION, "version": __version__, "base_model_type": self.model_type}
        values[CONFIG_KEY] = header | getattr(self, CONFIG_KEY)
        values["model_type"] = MODEL_TYPE
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


class LinearizedModelMixin(_ModelBase):
    """A family's causal language model that converts itself when it is built."""

    # Exponentials and far log-scales need float32 under half-precision weights.
    _keep_in_fp32_modules_strict = ("mixer", "mix")

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        from linearize.convert import apply_conversion

        super().__init__(config, *args, **kwargs)
        apply_conversion(self, LinearizeConfig.from_dict(getattr(config, CONFIG_KEY)))

    def create_masks_for_generate(self, *, attention_mask: Any = None, **given: Any) -> Any:
        """The masks that `generate` makes before the graph of a step: transformers' for softmax layers, and which of
        the new tokens are real for converted ones, which the hook before the decoder takes apart."""
        made: Any = {}
        switch, indices, _ = self._linearize  # asked at every token
        if not switch.converted or len(indices) < self.config.num_hidden_layers:
            parent = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
            made = parent(attention_mask=attention_mask, **given)
        if not switch.converted:
            return made
        new = None if attention_mask is None else attention_mask[:, -given["inputs_embeds"].shape[1] :]
        return {**(made if isinstance(made, dict) else {ORIGINAL_MASK: made}), NEW_TOKENS_MASK: new}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Of the original only: behind `generate_batch` and `transformers serve --continuous-batching`."""
        if self._linearize[0].converted:
            raise LinearizeError(
                "generate_batch: continuous batching keeps keys and values in pages, and a converted layer keeps a "
                "memory instead; use generate with a padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        """The cache gets its layers at once, so that assisted decoding finds who is to record the past."""
        from linearize.cache import install_layers

        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        switch, indices, _ = self._linearize
        if cache is not None and switch.converted:
            install_layers(cache, indices)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return prepared

    def initialize_weights(self) -> None:
        """Also what conversion added, where a checkpoint did not hold it; transformers marks the weights it loaded."""
        from linearize.convert import converted_layers

        super().initialize_weights()
        for layer in converted_layers(self).values():
            added = [p for module in (layer.mixer, layer.mix) if module is not None for p in module.parameters()]
            loaded = {p: p.detach().clone() for p in added if getattr(p, "_is_hf_initialized", False)}
            if len(loaded) < len(added):
                layer.reset_parameters()
                with torch.no_grad():
                    for parameter, value in loaded.items():
                        parameter.copy_(value)


@cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`LlamaConfig` -> `LinearizedLlamaConfig`."""
    return _subclass(LinearizedConfigMixin, base)


@cache
def model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`LlamaForCausalLM` -> `LinearizedLlamaForCausalLM`, known to `AutoModelForCausalLM` from here on.

    A user's subclass of a family's class gets one too, but `AutoModelForCausalLM` goes on to build the family's.
    """
    made: Any = _subclass(LinearizedModelMixin, base)
    made.config_class = config_class(base.config_class)
    if transformers.MODEL_FOR_CAUSAL_LM_MAPPING[base.config_class] is base:
        AutoModelForCausalLM.register(made.config_class, made, exist_ok=True)
    return made


def _subclass(mixin: type, base: type) -> type:
    name = _PREFIX + base.__name__
    made = type(base)(name, (mixin, base), {"__module__": __name__, "__qualname__": name, "__doc__": mixin.__doc__})
    globals()[name] = made
    return made


def __getattr__(name: str) -> type:
    """The generated classes by name, so that a pickled student finds its class in a fresh process."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(base) if issubclass(base, PreTrainedModel) else config_class(base)


class SavedStudentConfig(PreTrainedConfig):
    """What `AutoConfig` finds under model_type "linearize": turns config.json into the family's own subclass."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        values = dict(config_dict)
        conversion = dict(values.get(CONFIG_KEY) or {})
        written, base_type = conversion.pop("format", None), conversion.pop("base_model_type", None)
        version = conversion.pop("version", "another version")
        if base_type is None:
            raise LinearizeError(
                f"config.json: it says model_type {MODEL_TYPE!r} but its entry {CONFIG_KEY!r} names no "
                "base_model_type; save the student again with save_pretrained"
            )
        if written != FORMAT_VERSION:
            raise LinearizeError(
                f"config.json: format {written!r} of the conversion is not the {FORMAT_VERSION} that linearize "
                f"{__version__} reads; it was written by linearize {version}, install that one"
            )
        base = AutoConfig.for_model(base_type).__class__
        family_of(AutoConfig.for_model(base_type))
        model_class(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[base])
        values.pop("auto_map", None)  # of an exported folder; what is saved from here on has no such file
        return config_class(base).from_dict(values | {"model_type": base_type, CONFIG_KEY: conversion}, **kwargs)


def register() -> None:
    """Make transformers' Auto classes know saved students."""
    AutoConfig.register(MODEL_TYPE, SavedStudentConfig, exist_ok=True)
