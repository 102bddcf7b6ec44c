"""The cache of a converted model: transformers' own `Cache`, with a layer class of constant size."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticLayer

from linearize.errors import LinearizeError
from linearize.kernels.near_far import Memory, Mixer, near_far_step

__all__ = ["NearFarLayer", "cache_bytes", "install_layers", "new_cache"]


class NearFarLayer(CacheLayerMixin):
    """What one converted layer remembers: near window, sinks and state; see `linearize.kernels.near_far.memory`.

    `seen` counts columns of the batch, padding included, because that is what transformers means by a cache's
    length; `memory.lengths` counts each row's real tokens.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory | None = None
        self.seen = 0

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, mixer: Mixer | None, mix_logit: Tensor | None, **options: Any
    ) -> Tensor:
        """Attention of the new tokens; the layer remembers them. Arguments as in `near_far_step`."""
        if self.memory is None:
            self.memory = Memory.empty(k, v, mixer, window=options["window"], sinks=options["sinks"])
            self.dtype, self.device = k.dtype, k.device
            self.is_initialized = True
        elif self.memory.lengths.shape[0] != k.shape[0]:
            raise LinearizeError(
                f"cache: it holds {self.memory.lengths.shape[0]} rows but the batch has {k.shape[0]}; "
                "reorder or repeat the cache first, or start a new one"
            )
        if self.memory.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.memory = self.memory.map(torch.clone)  # what inference mode has made could not be written to
        held = self.memory.near_k.shape[2] // 2, self.memory.sinks, self.memory.state is not None
        if held != (options["window"], options["sinks"], mixer is not None):
            raise LinearizeError(
                f"cache: it was made with window {held[0]}, {held[1]} sinks and {'a' if held[2] else 'no'} state, "
                "which are not this model's; start a new cache"
            )
        out, self.memory = near_far_step(q, k, v, self.memory, mixer, mix_logit, **options)
        self.seen += k.shape[2]
        return out

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `step` allocates when it knows the mixer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Always an error: this layer keeps no list of keys and values to hand out."""
        raise LinearizeError(
            "cache: it was made by the converted model, and the original attention needs every key and value; start a "
            "new cache"
        )

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) as for a layer that holds everything: kept softmax layers build their masks by it."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def _map(self, fn) -> None:
        if self.memory is not None:
            self.memory = self.memory.map(fn)

    def reset(self) -> None:
        """Forget everything."""
        self.memory, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, beside each other."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """To the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the layer's device."""
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Always an error for more than 0 tokens: what has been folded into the state cannot be taken out again."""
        if tokens_to_remove:
            raise LinearizeError(
                f"cache: cannot remove {abs(tokens_to_remove)} tokens, a converted layer cannot roll back; "
                "copy the cache before the tokens that may be rejected, or use the original model"
            )


def install_layers(cache: Cache, layers: list[int]) -> None:
    """Give an empty cache its `NearFarLayer`s; a cache that has them is left alone.

    Raises:
        LinearizeError: a cache that already holds another model's tokens, or whose softmax layers are static.
    """
    for index in layers:
        while len(cache.layers) <= index:
            if cache.layer_class_to_replicate is None:
                raise LinearizeError(f"cache: it has {len(cache.layers)} layers but the model needs layer {index}")
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if isinstance(layer, NearFarLayer):
            continue
        if layer.is_initialized and layer.get_seq_length():
            raise LinearizeError(
                f"cache: layer {index} holds {layer.get_seq_length()} tokens of a {type(layer).__name__}, made by the "
                "original attention; start a new cache for the converted model"
            )
        cache.layers[index] = NearFarLayer()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StaticLayer):
            # transformers masks the unwritten slots of a static cache only where all its layers are static.
            raise LinearizeError(
                f"cache: layer {index} is a {type(layer).__name__}, which cannot stand beside converted layers; use a "
                "DynamicCache (the default), or convert every layer"
            )


def new_cache(config: Any, layers: list[int]) -> DynamicCache:
    """An empty cache for a model with this transformers config, whose converted layers are `layers`."""
    cache = DynamicCache(config=config)
    install_layers(cache, layers)
    return cache


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes that a cache holds.

    Returns:
        "softmax": keys and values of softmax layers; "window": near keys and values and sinks of converted layers;
        "state": their states and normalisers; "total": the sum.
    """
    counts = {"softmax": 0, "window": 0, "state": 0}
    for layer in cache.layers:
        if isinstance(layer, NearFarLayer):
            if layer.memory is not None:
                near, state = layer.memory.nbytes()
                counts["window"] += near
                counts["state"] += state
        elif layer.is_initialized:
            counts["softmax"] += layer.keys.nbytes + layer.values.nbytes
    return counts | {"total": sum(counts.values())}
