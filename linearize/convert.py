"""`convert` and its inverse: plan, check, apply. Nothing is changed before every check has passed."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers.integrations import sdpa_attention

from linearize.attention import ConvertedAttention, Switch
from linearize.cache import NearFarLayer, install_layers, new_cache
from linearize.config import LinearizeConfig
from linearize.errors import LinearizeError
from linearize.families import Family, Geometry, family_of, geometry_of, own_window
from linearize.kernels.near_far.documents import Documents, lay_out_documents
from linearize.modeling import NEW_TOKENS_MASK, ORIGINAL_MASK
from linearize.projections import install, remove

__all__ = [
    "LayerPlan",
    "added_parameters",
    "apply_conversion",
    "base_model",
    "convert",
    "converted_layers",
    "is_converted",
    "original_attention",
    "plan_layers",
    "revert",
    "state_off",
    "switch_of",
    "window_off",
]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer: `before` and `after` name its attention, `converted` says whether they differ."""

    index: int
    before: str
    after: str
    converted: bool


def plan_layers(model_config: Any, config: LinearizeConfig) -> list[LayerPlan]:
    """What `convert` would do, from a transformers config alone.

    Raises:
        LinearizeError: an unknown family, a layer index, window or number of sinks that does not fit the model, or
            a conversion that would change nothing.
    """
    family_of(model_config)
    geometry = geometry_of(model_config)
    limit = getattr(model_config, "max_position_embeddings", None)
    for name, value in (("window", config.window), ("sinks", config.sinks)):
        if limit is not None and value > limit:
            raise LinearizeError(
                f"{name}: {value} exceeds the model's {limit} positions, so no token would ever leave it; "
                f"use at most {limit}, better 16 to 128"
            )
    kept = config.kept_layers(geometry.layers)
    after = f"window {config.window} + sinks {config.sinks}"
    if config.mixer != "none":
        after += f" + {config.mixer} ({config.mix})"
    plan = []
    for index in range(geometry.layers):
        window = own_window(model_config, index)
        before = "softmax" if window is None else f"softmax, sliding window {window}"
        converted = index not in kept and window is None
        plan.append(LayerPlan(index, before, after if converted else before, converted))
    if not any(layer.converted for layer in plan):
        if all(own_window(model_config, index) is not None for index in range(geometry.layers)):
            raise LinearizeError(
                f"sliding_window: every layer has one of {own_window(model_config, 0)} tokens, and such layers stay as "
                "they are; to convert them, set sliding_window to null in the model's config, which changes nothing "
                "for texts shorter than it"
            )
        raise LinearizeError(
            f"softmax_layers: {config.softmax_layers!r} leaves none of the {geometry.layers} layers to convert "
            f"({sum(own_window(model_config, i) is not None for i in range(geometry.layers))} have a sliding window "
            "of their own and stay as they are); keep fewer layers"
        )
    return plan


def convert(model: Any, config: LinearizeConfig) -> Any:
    """Replace the attention of a causal language model's layers, in place.

    The new layers start from the model's own weights: with a window that covers the text the outputs are the
    original's. The far side starts untrained; see `linearize.distill`.

    Args:
        model: a transformers causal language model of a known family, on any device (meta too) and in any float
            dtype, or a PeftModel around one.
        config: which layers, and to what.

    Returns:
        The same object. It is now an instance of a subclass of its class that saves and loads as a student.

    Raises:
        LinearizeError: a model or config that does not fit; the model is then unchanged.
    """
    base = base_model(model)
    _check_class(base)
    if is_converted(base):
        raise LinearizeError(
            f"model: {type(base).__name__} is converted already ({len(converted_layers(base))} layers); "
            "call linearize.revert(model) first"
        )
    _check_modules(base, config)

    from linearize.modeling import CONFIG_KEY, config_class, model_class

    old = base.config
    new = copy.deepcopy(old)
    new.__class__ = config_class(old.__class__)
    setattr(new, CONFIG_KEY, config.to_dict())
    _replace_config(base, old, new)
    base._linearize_original = (type(base), old, base._keep_in_fp32_modules_strict)
    base.__class__ = model_class(base.__class__)
    base._keep_in_fp32_modules_strict = {*base._keep_in_fp32_modules_strict, "mixer", "mix"}
    apply_conversion(base, config)

    from linearize.fingerprint import weight_sample

    sample = weight_sample(base)
    base._linearize_sample = None if sample is None else (base.dtype, sample)
    return model


def apply_conversion(model: nn.Module, config: LinearizeConfig) -> None:
    """Swap the attention modules and install the hook that hands them masks and caches. For `convert` and loading."""
    family, geometry = family_of(model.config), geometry_of(model.config)
    switch = Switch()
    layers = cast(nn.ModuleList, model.get_submodule(family.layers))
    indices = [layer.index for layer in plan_layers(model.config, config) if layer.converted]
    for index in indices:
        original = getattr(layers[index], family.attention)
        setattr(layers[index], family.attention, ConvertedAttention(original, config, family, geometry, switch))
    install(model)
    decoder = model.get_submodule(family.decoder)
    names = tuple(inspect.signature(decoder.forward).parameters)
    every = range(geometry.layers)
    groups = geometry.heads > geometry.kv_heads and all(own_window(model.config, layer) is None for layer in every)
    hook = _BeforeDecoder(switch, indices, names, family.packs, len(indices) == geometry.layers, groups)
    hooks = [decoder.register_forward_pre_hook(hook, with_kwargs=True)]
    if not family.hands_down:
        hooks += [layers[index].register_forward_pre_hook(_hand_down, with_kwargs=True) for index in indices]
    cast(Any, model)._linearize = (switch, indices, hooks)


def revert(model: Any) -> Any:
    """Put the original attention back: the same modules, the same weights, the same class and config.

    What conversion added (mixers, mixes) is dropped. Weights that training changed stay changed.

    Raises:
        LinearizeError: a model that is not converted.
    """
    base = base_model(model)
    layers = converted_layers(base)
    if not layers:
        raise LinearizeError(f"model: {type(base).__name__} is not converted; there is nothing to revert")
    family = family_of(base.config)
    decoder_layers = base.get_submodule(family.layers)
    for index, layer in layers.items():
        setattr(decoder_layers[index], family.attention, layer.original)
    remove(base)
    for hook in base._linearize[2]:
        hook.remove()
    del base._linearize
    base.__dict__.pop("_linearize_sample", None)
    made = type(base)
    old_class, old_config, keep_in_float32 = base.__dict__.pop("_linearize_original", (made.__mro__[2], None, set()))
    base._keep_in_fp32_modules_strict = keep_in_float32
    if old_config is None:  # loaded as a student: the original's config is what is left without the conversion
        from linearize.modeling import CONFIG_KEY

        old_config = copy.deepcopy(base.config)
        old_config.__class__ = type(old_config).__mro__[2]
        delattr(old_config, CONFIG_KEY)
    base.__class__ = old_class
    _replace_config(base, base.config, old_config)
    return model


def base_model(model: Any) -> Any:
    """The causal language model itself, out of a PeftModel where it is wrapped in one."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def is_converted(model: Any) -> bool:
    """Whether any layer of the model is converted."""
    return bool(converted_layers(model))


def converted_layers(model: Any) -> dict[int, ConvertedAttention]:
    """The converted attention modules by layer index, ascending."""
    return {m.layer_idx: m for m in base_model(model).modules() if isinstance(m, ConvertedAttention)}


def added_parameters(model: Any) -> dict[str, nn.Parameter]:
    """What conversion added, mixers and mixes, by name in the causal language model."""
    base = base_model(model)
    added = {
        id(p)
        for layer in converted_layers(base).values()
        for module in (layer.mixer, layer.mix)
        if module is not None
        for p in module.parameters()
    }
    return {name: p for name, p in base.named_parameters() if id(p) in added}


def switch_of(model: Any) -> Switch:
    """The switch that all converted layers of the model share.

    Raises:
        LinearizeError: a model that is not converted.
    """
    for layer in converted_layers(model).values():
        return layer.switch
    raise LinearizeError(f"model: {type(base_model(model)).__name__} is not converted; call linearize.convert first")


@contextmanager
def original_attention(model: Any) -> Iterator[Any]:
    """Inside, the model runs its original attention: the teacher, with the same weights and no copy of them.

    Adapters stay as they are: with LoRA that was trained on the student, disable that too.
    """
    with _switched(model, "converted", False):
        yield model


@contextmanager
def state_off(model: Any) -> Iterator[Any]:
    """Inside, no query reads the state: what is left is window + sinks."""
    with _switched(model, "far_share", 0.0):
        yield model


@contextmanager
def window_off(model: Any) -> Iterator[Any]:
    """Inside, a query that has a state reads nothing else, neither window nor sinks. The first two chunks have none."""
    with _switched(model, "far_share", 1.0):
        yield model


@contextmanager
def _switched(model: Any, name: str, value: Any) -> Iterator[None]:
    switch = switch_of(model)
    before = getattr(switch, name)
    setattr(switch, name, value)
    try:
        yield
    finally:
        setattr(switch, name, before)


# Whether transformers' attention makes one product of a group's queries where there is a mask; that of 5.17 copies the
# keys for each of them.
MASKS_GROUP = hasattr(sdpa_attention, "pack_gqa")


class _BeforeDecoder:
    """Runs before the decoder's forward: checks the mask, gives the cache its layers and hands both down."""

    def __init__(
        self,
        switch: Switch,
        layers: list[int],
        names: tuple[str, ...],
        packs: bool,
        all_converted: bool,
        groups: bool,
    ):
        self.switch = switch
        self.layers = layers
        self.names = names  # of the decoder's arguments, in their order
        self.packs = packs
        self.all_converted = all_converted
        self.groups = groups  # several query heads a key head, and every softmax layer sees every token

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        tokens = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if tokens is None or (not self.switch.converted and self.switch.observer is None):
            return (), kwargs  # transformers has an error of its own for no tokens at all
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        model_config = cast(Any, decoder.config)
        use_cache = model_config.use_cache if use_cache is None else use_cache
        new = use_cache and not (decoder.training and getattr(decoder, "gradient_checkpointing", False))
        attention = model_config._attn_implementation or ""
        mask = kwargs.get("attention_mask")
        packed = mask is None  # as far as the original attention would look
        whole = True
        if isinstance(mask, dict) and NEW_TOKENS_MASK in mask:
            kwargs["attention_mask"], mask = _apart(mask)
            whole = False  # of the new tokens alone
        kwargs["near_far_mask"] = _new_tokens_mask(mask, tokens.shape[1], cache)
        positions = kwargs.get("position_ids")
        if positions is None:
            kwargs["position_ids"] = self._positions(kwargs["near_far_mask"], tokens, cache)
        kwargs["near_far_documents"] = None
        if packed:
            kwargs["near_far_documents"] = _packed_documents(kwargs, tokens, attention, cache is not None or new)
        if kwargs["near_far_documents"] is not None and not self.packs:
            raise LinearizeError(
                f"position_ids: they restart inside a row (packed documents), which {type(decoder).__name__} does not "
                "tell apart; give each document its own row, padded, with an attention_mask"
            )
        if not self.switch.converted:
            return (), kwargs

        layer = self._layer(cache)
        # A step for graphs asks its device nothing, and one token on a GPU is not worth waiting for.
        asks = tokens.shape[1] > 1 or tokens.device.type == "cpu"
        if asks and not torch.compiler.is_compiling() and (layer is None or layer.static_length is None):
            if layer is not None and whole:
                _check_hidden(mask, tokens.shape[1], layer)
            if positions is not None and kwargs["near_far_documents"] is None:
                _check_positions(positions, kwargs["near_far_mask"], self._read(cache))
        if kwargs.get("output_attentions"):
            raise LinearizeError(
                "output_attentions: a converted layer has no attention map; leave it out, or look at the original "
                "inside linearize.original_attention(model)"
            )
        if cache is not None:
            install_layers(cache, self.layers, tokens.shape[0])
        elif new:
            kwargs["past_key_values"] = new_cache(decoder.config, self.layers)
        if self.all_converted:
            # No layer reads a 4-D mask, and a T x T one would be all that is quadratic here. transformers hands a
            # mask that is 4-D already down as it is.
            kwargs["attention_mask"] = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        elif (
            self.groups and MASKS_GROUP and attention == "sdpa" and tokens.shape[1] == 1 and tokens.device.type == "cpu"
        ):
            kwargs["attention_mask"] = self._one_query_mask(kwargs.get("attention_mask"), cache)
        return (), kwargs

    def _one_query_mask(self, mask: Any, cache: Any) -> Any:
        """(B or 1, 1, 1, N) for one query on a CPU, also where all N keys are seen: with a mask transformers lets the
        queries of a group be rows of one product, and without one PyTorch reads the keys once for each of them. `mask`
        itself where it is of another kind, or the cache for graphs."""
        layer = self._layer(cache)
        two = mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)
        if not two or layer is None or layer.static_length is not None or torch.compiler.is_compiling():
            return mask
        length = layer.get_seq_length() + 1
        if mask is None:
            return torch.ones(1, 1, 1, length, dtype=torch.bool)
        return mask[:, None, None, :length].bool() if mask.shape[1] >= length else mask

    def _positions(self, mask: torch.Tensor | None, tokens: torch.Tensor, cache: Any) -> torch.Tensor | None:
        """(B, T) positions of the new tokens, counted in real tokens of their row; None where no row has padding.

        The original does not care which token has position 0, as rotary attention sees differences only. Features and
        mixes see positions themselves.
        """
        before = self._read(cache)
        if mask is None and not isinstance(before, torch.Tensor):
            return None
        if mask is None:
            counted = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        else:
            counted = mask.long().cumsum(-1)
        return (before + counted - 1).clamp_min(0)

    def _layer(self, cache: Any) -> NearFarLayer | None:
        """The cache's first converted layer, if it has one by now."""
        layer = cache.layers[self.layers[0]] if cache is not None and len(cache.layers) > self.layers[0] else None
        return layer if isinstance(layer, NearFarLayer) else None

    def _read(self, cache: Any) -> int | torch.Tensor:
        """Real tokens of each row that the cache holds, (B, 1), or their number where all rows hold as many."""
        layer = self._layer(cache)
        if layer is None or layer.memory is None:
            return 0
        return layer.memory.lengths[:, None] if layer.memory.uniform is None else layer.memory.uniform


def _apart(masks: dict[str, Any]) -> tuple[Any, Any]:
    """(what the original's layers take, the new tokens' mask) of masks made by `create_masks_for_generate`."""
    rest = {name: mask for name, mask in masks.items() if name != NEW_TOKENS_MASK}
    return rest.get(ORIGINAL_MASK, rest or None), masks[NEW_TOKENS_MASK]


def _hand_down(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Runs before a decoder layer that does not hand arguments down to its attention: what a converted one needs goes
    behind cosines and sines. As an argument, so that a checkpointed layer has it again in the backward pass."""
    own = kwargs.get("near_far_mask"), kwargs.get("near_far_documents")
    return args, kwargs | {"position_embeddings": (*kwargs["position_embeddings"], *own)}


def _new_tokens_mask(mask: Any, new: int, cache: Any) -> torch.Tensor | None:
    """(B, T) bool for the T new tokens of this call, or None where all are real (not asked while torch.compile traces,
    where the answer would be part of the graph).

    A mask has a column for every token, past and new, and may have more for those to come; one of fewer columns is of
    the newest tokens.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise LinearizeError(
            f"attention_mask: {shape} is not (batch, tokens); a converted layer takes a 2-D mask of real tokens only"
        )
    if mask.shape[1] < new:
        raise LinearizeError(
            f"attention_mask: it covers {mask.shape[1]} tokens but {new} are given; make it cover all, past and new"
        )
    past: int | torch.Tensor = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, torch.Tensor):
        first = past.to(mask.device).clamp_max(mask.shape[1] - new)
        recent = mask.index_select(1, first + torch.arange(new, device=mask.device)).bool()
    else:
        begin = min(past, mask.shape[1] - new)
        recent = mask[:, begin : begin + new].bool()
    return None if not torch.compiler.is_compiling() and bool(recent.all()) else recent


def _packed_documents(kwargs: dict[str, Any], tokens: torch.Tensor, attention: str, caching: bool) -> Documents | None:
    """Where the documents of packed rows without a mask lie, or None where a row is one text.

    What counts as packed is what the original attention takes for it: no mask, no past, and positions that do not go
    up by 1 from one token to the next. The device is asked, once a forward pass, and only where positions are given.
    """
    position_ids, cache = kwargs.get("position_ids"), kwargs.get("past_key_values")
    if (
        position_ids is None
        or position_ids.shape[-1] < 2
        or (cache is not None and cache.get_seq_length())
        or not bool((position_ids.diff(dim=-1) != 1).any())
    ):
        return None
    if caching:
        raise LinearizeError(
            "position_ids: they restart inside a row (packed documents), which no cache can hold; pass "
            "use_cache=False, or give each document its own row, padded, with an attention_mask"
        )
    batch, length = tokens.shape[:2]
    if batch > 1 and "flash" in attention:
        raise LinearizeError(
            f"position_ids: they restart inside {batch} rows (packed documents), and {attention} would tell documents "
            "apart in a single row only; use batch_size 1, or load the model with attn_implementation='sdpa'"
        )
    begins = torch.ones(batch, length, dtype=torch.bool, device=position_ids.device)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    starts = begins.flatten().nonzero().squeeze(1).tolist()
    return lay_out_documents([*starts, batch * length], batch, length, tokens.device)


def _check_hidden(mask: Any, new: int, layer: NearFarLayer) -> None:
    """A mask must not hide what the cache has read: pads that were not called pads when they came, for instance. One of
    the newest tokens alone says nothing of it."""
    past = layer.seen
    if layer.memory is None or not isinstance(mask, torch.Tensor) or mask.shape[1] < past + new:
        return
    hidden = layer.memory.lengths.to(mask.device) - mask[:, :past].bool().sum(1)
    if bool((hidden > 0).any()):
        row = int(hidden.argmax())
        raise LinearizeError(
            f"attention_mask: row {row} hides {int(hidden[row])} of the {int(layer.memory.lengths[row])} tokens that "
            "the cache has read, and what is in a state stays there; start a new cache from the texts without them"
        )


def _check_positions(positions: Any, mask: torch.Tensor | None, before: int | torch.Tensor) -> None:
    """Real tokens of a row may skip positions but not go back: what came first is in the state, of which nobody can say
    any more which tokens lie behind a position. Of a past the number of tokens is known, and each had a position.

    positions (B or 1, T) of the new tokens; mask as of `_new_tokens_mask`; before: real tokens read, as of `_read`.
    """
    if not isinstance(positions, torch.Tensor) or positions.ndim != 2:
        return
    lowest = int(positions.min()) if positions.numel() else 0
    known = positions if mask is None else torch.where(mask, positions, lowest)
    least = torch.cat([torch.full_like(known[:, :1], lowest), known[:, :-1].cummax(-1).values], dim=1)
    if isinstance(before, torch.Tensor) or before:
        least = least.maximum(torch.as_tensor(before, device=positions.device))
    back = positions < least if mask is None else (positions < least) & mask
    if not bool(back.any()):
        return
    row, token = (int(i) for i in back.nonzero()[0])
    position, end = positions.expand_as(back)[row, token].item(), least.expand_as(back)[row, token].item()
    raise LinearizeError(
        f"position_ids: token {token} of row {row} goes back to position {position}, below {end}, where the tokens "
        "before it end; count on, crop the cache first, or give texts that share a row without attention_mask and with "
        "use_cache=False"
    )


def _check_class(model: Any) -> None:
    """A causal language model: not its decoder alone, and no head for another task."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise LinearizeError(
            f"model: {type(model).__name__} is no transformers model; give what "
            "AutoModelForCausalLM.from_pretrained returns"
        )
    family_of(model.config)
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    if not isinstance(model, wanted):
        raise LinearizeError(
            f"model: {type(model).__name__} is no causal language model; give a {wanted.__name__}, which "
            "AutoModelForCausalLM.from_pretrained returns"
        )


def _check_modules(model: Any, config: LinearizeConfig) -> None:
    """Every check that needs the model itself."""
    family, geometry = family_of(model.config), geometry_of(model.config)
    plan = plan_layers(model.config, config)
    layers = model.get_submodule(family.layers)
    capped = family.soft_cap is not None and getattr(model.config, family.soft_cap, None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        raise LinearizeError(
            f"attn_implementation: 'sdpa' leaves out the soft cap of a {family.model_type}'s logits, so the original "
            "would be another model than it was trained as; load it with attn_implementation='eager'"
        )
    for layer in plan:
        if layer.converted:
            _check_attention(getattr(layers[layer.index], family.attention), layer.index, family, geometry)


def _check_attention(attention: nn.Module, index: int, family: Family, geometry: Geometry) -> None:
    _check_parts(attention, index, family)
    place, scaling = getattr(attention, "layer_idx", None), getattr(attention, "scaling", None)
    if place != index or not isinstance(scaling, float | int):
        raise LinearizeError(
            f"layer {index}: {type(attention).__name__} has layer_idx {place!r} and scaling {scaling!r}; a converted "
            "layer needs its index and a number"
        )
    if not getattr(attention, "is_causal", True):
        raise LinearizeError(
            f"layer {index}: {type(attention).__name__} sees the future, which a window and a state do not; use a "
            "causal model"
        )
    sizes = _sizes(family, geometry)
    for name in family.linears:
        proj = getattr(attention, name)
        linear = proj.get_base_layer() if hasattr(proj, "get_base_layer") else proj
        if type(linear) is not nn.Linear:
            raise LinearizeError(
                f"layer {index}: {name} is a {type(linear).__module__.split('.')[0]} {type(linear).__name__}, not a "
                "dense torch.nn.Linear; load the model without quantization"
            )
        if name in sizes and linear.out_features != sizes[name]:
            raise LinearizeError(
                f"layer {index}: {name} has {linear.out_features} outputs but {sizes[name]} follow from the config's "
                f"{geometry.heads} heads, {geometry.kv_heads} key-value heads and head_dim {geometry.head_dim}; "
                "correct the config"
            )


def _check_parts(attention: nn.Module, index: int, family: Family) -> None:
    """The attention's submodules and parameters are those that its family has, and no others."""
    known = {*family.linears, *(() if family.sink is None else (family.sink,))}
    if family.qk_norm_of(attention):
        known |= set(family.norms)
    found = {name for name, _ in attention.named_children()}
    found |= {name for name, _ in attention.named_parameters(recurse=False)}
    if found != known:
        raise LinearizeError(
            f"layer {index}: {type(attention).__name__} has {sorted(found)} but a {family.model_type} "
            f"attention has {sorted(known)}; its family needs an entry of its own in linearize/families.py"
        )


def _sizes(family: Family, geometry: Geometry) -> dict[str, int]:
    """Outputs of every projection before the attention."""
    counts = [geometry.heads, geometry.kv_heads, geometry.kv_heads]
    if family.fused:
        counts = [sum(counts)]
    return {name: heads * geometry.head_dim for name, heads in zip(family.projections, counts, strict=True)}


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    """Every module that holds the one config now holds the other; other models that share `old` are left alone."""
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
