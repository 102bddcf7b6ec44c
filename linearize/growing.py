"""Keys and values of a softmax layer that grow in place.

transformers' `DynamicLayer` copies all that it holds to append one token. Here every eighth token of the length at most
does, and `crop` leaves the room for what comes next.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

__all__ = ["GrowingLayer", "growing_cache", "install_growing"]

LEAST_ROOM = 64


class GrowingLayer(DynamicLayer):
    """`keys` and `values` are the first part of larger tensors, as long as nobody replaces them. Tokens that come after
    a `crop` are written where those were that it took away: to keep what `update` returned, clone it.

    Where gradients are on, or torch.compile traces, it is a `DynamicLayer`: a graph may hold what came before, and new
    tokens must not be written where `crop` has taken others away.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._room: tuple[Tensor, Tensor] | None = None
        self._used: tuple[Tensor, Tensor] | None = None  # what `keys` and `values` are, unless somebody replaced them

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, new = self.get_seq_length(), key_states.shape[-2]
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._fit(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if self._room is None or not self._has_room(held + new):
            self._room = self._move(self.keys, key_states, held), self._move(self.values, value_states, held)
        for room, x in zip(self._room, (key_states, value_states), strict=True):
            room[..., held : held + new, :] = x
        self._use(held + new)
        return self.keys, self.values

    def _fit(self, *new: Tensor) -> bool:
        """Whether these go behind what is held; else `torch.cat` shall say what is wrong."""
        return all(
            y.ndim == 1
            or (x.shape[:-2], x.shape[-1], x.dtype, x.device) == (y.shape[:-2], y.shape[-1], y.dtype, y.device)
            for x, y in zip(new, (self.keys, self.values), strict=True)
        )

    def _has_room(self, length: int) -> bool:
        if self._room is None:
            return False
        mine = self._used is not None and self._used[0] is self.keys and self._used[1] is self.values
        # What inference mode has made cannot be written to outside of it.
        writable = torch.is_inference_mode_enabled() or not self._room[0].is_inference()
        return mine and writable and length <= self._room[0].shape[-2]

    @staticmethod
    def _move(x: Tensor, new: Tensor, held: int) -> Tensor:
        """x with room for the new tokens and as many as an eighth of all."""
        length = held + new.shape[-2]
        room = new.new_empty(*new.shape[:-2], length + max(length // 8, LEAST_ROOM), new.shape[-1])
        if held:
            room[..., :held, :] = x
        return room

    def _use(self, length: int) -> None:
        assert self._room is not None
        keys, values = self._room
        self.keys, self.values = self._used = keys[..., :length, :], values[..., :length, :]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens away: -n removes n."""
        mine = self.is_initialized and self._has_room(0)
        super().crop(tokens_to_remove)
        if mine:
            self._use(self.get_seq_length())

    def offload(self) -> None:
        """To the CPU, without the room."""
        super().offload()
        self._room = self._used = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        super().reorder_cache(beam_idx)
        self._room = self._used = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, beside each other."""
        super().batch_repeat_interleave(repeats)
        self._room = self._used = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self._room = self._used = None

    def reset(self) -> None:
        """Forget everything; transformers 5.17 would keep as many zeros."""
        self.__dict__ |= {"keys": None, "values": None, "is_initialized": False, "_room": None, "_used": None}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what is held, without the room."""
        state = self.__dict__ | {"_room": None, "_used": None}
        if self.is_initialized:
            state |= {"keys": self.keys.clone(), "values": self.values.clone()}
        return state


def install_growing(cache: Cache) -> None:
    """Let the empty layers of a cache that holds everything grow in place, those to come too."""
    if getattr(cache, "offloading", False):
        return  # moves a layer as a whole
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model with this transformers config."""
    cache = DynamicCache(config=config)
    install_growing(cache)
    return cache
