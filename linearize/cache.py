"""The cache of a converted model: transformers' own `Cache`, with a layer class of constant size."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticLayer

from linearize.errors import LinearizeError
from linearize.growing import install_growing
from linearize.kernels.near_far import Memory, Mixer, near_far_step
from linearize.kernels.near_far.rollback import remove_tokens
from linearize.offload import loaded

__all__ = ["NearFarLayer", "cache_bytes", "install_layers", "new_cache"]


@dataclass
class _Record:
    """What came since a point that a layer can go back to: by transformers' protocol, from `activate_past_recording`
    or the last `crop` on.

    start: the memory there, None before the first token; pieces: (k, v, mask) of each call; again: a function of one
    piece and a memory that gives the memory after it.
    """

    start: Memory | None
    pieces: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    again: Any = None

    def map(self, fn) -> "_Record":
        pieces = [(fn(k), fn(v), None if mask is None else fn(mask)) for k, v, mask in self.pieces]
        return _Record(None if self.start is None else self.start.map(fn), pieces, self.again)


class NearFarLayer(CacheLayerMixin):
    """What one converted layer remembers: near window, sinks and state; see `linearize.kernels.near_far.memory`.

    `seen` counts columns of the batch, padding included, because that is what transformers means by a cache's
    length; `memory.lengths` counts each row's real tokens.

    Args:
        static_length: for a layer in the place of a preallocated one, that one's `max_cache_len`: the memory is then
            one for graphs, whose tensors stay where they are, and `seen` a tensor. It bounds no length, only masks.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, static_length: int | None = None) -> None:
        super().__init__()
        self.static_length = static_length
        self.memory: Memory | None = None
        self.seen: int | Tensor = self._zero()
        # Which columns are real tokens, (B, n) bool, and how many came since that all are. Dropped when 2 W have come:
        # nothing goes back further than W real tokens.
        self.marks: Tensor | None = None
        self.since = 0
        self.record_past = False
        self.record: _Record | None = None
        self.behind: CacheLayerMixin | None = None
        self.from_inference = False  # whether some tensor may be one of inference mode

    def _zero(self) -> int | Tensor:
        return 0 if self.static_length is None else torch.tensor(0)

    @property
    def is_compileable(self) -> bool:
        """Whether the tensors stay where they are and a step asks them nothing."""
        return self.static_length is not None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` puts the layer back as it was."""
        recorded = self.record_past or self.memory is None or self.memory.undo is not None
        return self.static_length is None and recorded

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, mixer: Mixer | None, mix_logit: Tensor | None, **options: Any
    ) -> Tensor:
        """Attention of the new tokens; the layer remembers them. Arguments as in `near_far_step`."""
        memory, mask = self._ready(k, v, mixer, options), options.get("mask")
        if self.record is not None and self.static_length is None:
            self.record.pieces.append((k.detach(), v.detach(), mask))
            self.record.again = _Again(q.shape[1], mixer, options)
        out, self.memory = near_far_step(q, k, v, memory, mixer, mix_logit, **options)
        if isinstance(self.seen, Tensor):
            self.seen.add_(k.shape[2])  # in place: a graph reads it where it was
        else:
            self.seen += k.shape[2]
            self._mark(mask, k.shape[2], options["window"])
        return out

    def _ready(self, k: Tensor, v: Tensor, mixer: Mixer | None, options: dict[str, Any]) -> Memory:
        """The memory, made where there is none, and fitting these keys and options."""
        window, sinks, static = options["window"], options["sinks"], self.static_length is not None
        if not torch.compiler.is_compiling():
            self._make_writable()
            if not self.record_past:  # transformers clears the flag when it is done
                self.record = None
        memory = self.memory
        if memory is None:
            memory = Memory.empty(k, v, mixer, window=window, sinks=sinks, static=static)
            self.dtype, self.device = k.dtype, k.device
            self.is_initialized = True
            if isinstance(self.seen, Tensor):
                self.seen = self.seen.to(k.device)
                if not torch.compiler.is_compiling():
                    _fix_addresses(memory, self.seen)
            self.memory = memory
            return memory
        held = memory.near_k.shape[2] // 2, memory.sinks, memory.state is not None
        if held != (window, sinks, mixer is not None):
            raise LinearizeError(
                f"cache: it was made with window {held[0]}, {held[1]} sinks and {'a' if held[2] else 'no'} state, "
                "which are not this model's; start a new cache"
            )
        return memory

    def _make_writable(self) -> None:
        """What inference mode has made could not be written to outside of it: copies of it can."""
        if torch.is_inference_mode_enabled():
            self.from_inference = True
        elif self.from_inference or (self.memory is not None and self.memory.keys.is_inference()):
            self._map(torch.clone)
            if isinstance(self.seen, Tensor):
                self.seen = self.seen.clone()
            self.from_inference = False

    def _mark(self, mask: Tensor | None, new: int, window: int) -> None:
        if mask is None:
            self.since += new
            if self.since >= 2 * window:
                self.marks = None
            return
        real = mask.bool()
        held = [real.new_ones(real.shape[0], self.since), real]
        self.marks, self.since = torch.cat(held if self.marks is None else [self.marks, *held], dim=1), 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `step` allocates when it knows the mixer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Always an error: this layer keeps no list of keys and values to hand out."""
        raise LinearizeError(
            "cache: it was made by the converted model, and the original attention needs every key and value; start a "
            "new cache"
        )

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included; a tensor in a layer for graphs, as of transformers' own."""
        return self.seen  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) as for a layer that holds everything: kept softmax layers build their masks by it."""
        if isinstance(self.seen, Tensor):
            assert self.static_length is not None
            return self.static_length, 0
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows. transformers asks whether there is such an attribute: there is none before the first token."""
        if self.memory is None:
            raise AttributeError("batch_size")
        return self.memory.lengths.shape[0]

    def _map(self, fn) -> None:
        self.from_inference |= torch.is_inference_mode_enabled()
        if self.memory is not None:
            self.memory = self.memory.map(fn)
        if self.marks is not None:
            self.marks = fn(self.marks)
        if self.record is not None:
            self.record = self.record.map(fn)

    def reset(self) -> None:
        """Forget everything. A layer for graphs keeps its tensors, emptied."""
        self._make_writable()
        self.marks, self.since = None, 0
        self.record = _Record(None) if self.record_past else None
        if isinstance(self.seen, Tensor) and self.memory is not None:
            self.memory.map(torch.Tensor.zero_)
            self.memory.uniform = 0
            self.seen.zero_()
            return
        self.memory, self.seen, self.is_initialized = None, self._zero(), False

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
        """Back to the layer's device; and the softmax layer behind, since an offloading cache fetches only the next
        layer of those that it takes to be away, and this one never is."""
        self._map(lambda x: x.to(self.device, non_blocking=True))
        if self.behind is not None:
            self.behind.prefetch()

    def activate_past_recording(self) -> None:
        """From here on the layer can go back to where it is, however far it has come: transformers' protocol for
        decoding with candidates. `crop` moves the point on, so call it after each batch of candidates."""
        if self.static_length is None:
            self.record_past = True
            self._restart_record()

    def _restart_record(self) -> None:
        self.from_inference |= torch.is_inference_mode_enabled()
        self.record = _Record(None if self.memory is None else self.memory.map(torch.clone))

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest columns out again, exactly: -n removes n.

        Up to W at any time, or as many as came since `activate_past_recording` or the last `crop` after it. A
        recurrent mixer's state and a layer for graphs keep nothing aside: the former needs the recording, the latter
        cannot.

        Raises:
            LinearizeError: a positive number; more than that, or than there are. The layer is then unchanged.
        """
        tokens_to_remove = int(tokens_to_remove)  # in transformers 5.17 assisted decoding gives a tensor
        if tokens_to_remove > 0:
            raise LinearizeError(
                f"cache: crop({tokens_to_remove}) would name a length to keep, which transformers has given up; give "
                "the number of tokens to remove as a negative one"
            )
        removed = -tokens_to_remove
        self._make_writable()
        if removed and self.memory is not None:
            if self.static_length is None and removed > self.seen:
                raise LinearizeError(f"cache: cannot remove {removed} tokens, it holds {self.seen}; remove fewer")
            window = self.memory.near_k.shape[2] // 2
            if self.record is not None and (removed > window or self.memory.undo is None):
                self._go_back(removed)
            else:
                remove_tokens(self.memory, self._real_among(removed), window)
            self.seen -= removed
            self._unmark(removed)
        if self.record is not None:
            self._restart_record()

    def _go_back(self, removed: int) -> None:
        """To where the record starts, and forward again without the newest columns."""
        assert self.record is not None
        record = self.record
        kept = sum(k.shape[2] for k, _, _ in record.pieces) - removed
        if kept < 0:
            raise LinearizeError(
                f"cache: cannot remove {removed} tokens, {kept + removed} came since the last crop; copy the cache "
                "before the tokens that may be rejected"
            )
        self.prefetch()  # a layer that is away comes back to where its mixer is
        memory = self.record.start
        for k, v, mask in self.record.pieces:
            if not kept:
                break
            part = slice(0, min(kept, k.shape[2]))
            kept -= part.stop
            memory = record.again(k[:, :, part], v[:, :, part], None if mask is None else mask[:, part], memory)
        self.memory, self.is_initialized = memory, memory is not None

    def _real_among(self, removed: int) -> Tensor:
        """(B,): how many of the newest columns are real tokens, in each row."""
        assert self.memory is not None
        earlier = removed - self.since
        if self.marks is None or earlier <= 0:
            return torch.full_like(self.memory.lengths, removed)
        return self.marks[:, -earlier:].sum(1) + self.since

    def _unmark(self, removed: int) -> None:
        earlier = removed - self.since
        self.since = max(-earlier, 0)
        if self.marks is not None and earlier > 0:
            self.marks = self.marks[:, :-earlier]


@dataclass(frozen=True)
class _Again:
    """`near_far_step` for keys and values alone: what is attended is of no interest."""

    heads: int
    mixer: Mixer | None
    options: dict[str, Any]

    def __call__(self, k: Tensor, v: Tensor, mask: Tensor | None, memory: Memory | None) -> Memory:
        options = self.options | {"mask": mask}
        if memory is None:
            memory = Memory.empty(k, v, self.mixer, window=options["window"], sinks=options["sinks"])
        q = k.new_zeros(k.shape[0], self.heads, *k.shape[2:])
        with loaded(self.mixer):
            return near_far_step(q, k, v, memory, self.mixer, **options)[1]


def _fix_addresses(memory: Memory, seen: Tensor) -> None:
    """Tell torch.compile that these tensors are written in place and stay where they are."""
    states = [x for state in (memory.state, memory.pending) if state is not None for x in state]
    for x in (memory.keys, memory.values, memory.lengths, seen, *states):
        torch._dynamo.mark_static_address(x)


def install_layers(cache: Cache, layers: list[int], rows: int | None = None) -> None:
    """Give an empty cache its `NearFarLayer`s; a cache that has them is checked, and left alone.

    rows: of the batch that comes next, where it is known.

    Raises:
        LinearizeError: a cache that holds another model's tokens or other rows, or whose layers do not hold the same
            number of tokens.
    """
    made = False
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
        cache.layers[index] = NearFarLayer(layer.max_cache_len if isinstance(layer, StaticLayer) else None)
        made = True
    if not made:
        _check_tokens(cache, layers[0], rows)
        return
    install_growing(cache)
    if getattr(cache, "offloading", False):
        behind = next((x for x in cache.layers if not isinstance(x, NearFarLayer)), None)  # it goes round
        for layer in reversed(cache.layers):
            if isinstance(layer, NearFarLayer):
                layer.behind = behind
            else:
                behind = layer


def _check_tokens(cache: Cache, index: int, rows: int | None) -> None:
    layer = cache.layers[index]
    assert isinstance(layer, NearFarLayer)
    if layer.memory is None:
        return
    held = layer.memory.lengths.shape[0]
    if rows is not None and held != rows:
        raise LinearizeError(
            f"cache: it holds {held} rows but the batch has {rows}; reorder or repeat the cache first, or start a new "
            "one"
        )
    if layer.static_length is not None:
        return
    for other, kept in enumerate(cache.layers):
        if not isinstance(kept, NearFarLayer):
            if kept.get_seq_length() != layer.seen:
                # Cache.crop goes from layer to layer, so one that refuses leaves those before it cropped.
                raise LinearizeError(
                    f"cache: layer {other} holds {kept.get_seq_length()} tokens and layer {index} {layer.seen}, as a "
                    "refused crop leaves them; start a new cache"
                )
            return


def new_cache(config: Any, layers: list[int]) -> DynamicCache:
    """An empty cache for a model with this transformers config, whose converted layers are `layers`."""
    cache = DynamicCache(config=config)
    install_layers(cache, layers)
    return cache


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes that a cache holds.

    Returns:
        "softmax": keys and values of softmax layers; "window": near keys and values and sinks of converted layers;
        "state": their states and normalisers; both with what is kept to take tokens back by; "total": the sum. Room
        that softmax layers keep for tokens to come is not counted: an eighth of their bytes, or 64 tokens.
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
