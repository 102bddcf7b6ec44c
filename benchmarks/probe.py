"""What is asked of a row before anything is timed: its modes, what a step reads, and what a cell would need in memory.

One forward pass of a few tokens answers it, so that nothing has to be known about a model's family.
"""

from dataclasses import dataclass
from typing import Any

import torch

from linearize.benchmarks.filling import fill_period
from linearize.benchmarks.inference import device_of, inference
from linearize.benchmarks.modes import Mode, modes_of
from linearize.benchmarks.step_costs import ModelCosts, model_costs
from linearize.cache import NearFarLayer
from linearize.config import LinearizeConfig
from linearize.convert import is_converted, switch_of
from linearize.inspection import DTYPE_BYTES

__all__ = ["CacheLayer", "Probe", "probe"]

TOKENS = 4
# Numbers of one token that are alive at once while a prompt is read, in multiples of the hidden and the feed-forward
# size; counted generously, for the converted layers' features and logits of the window too.
HIDDEN, FEED_FORWARD = 16, 4


@dataclass(frozen=True)
class CacheLayer:
    """One layer's share of a cache, for one sequence: bytes at any length, and bytes a token up to `limit` tokens."""

    constant: int
    per_token: int
    limit: int | None = None

    def bytes(self, tokens: int) -> int:
        """After so many tokens."""
        return self.constant + self.per_token * (tokens if self.limit is None else min(tokens, self.limit))


@dataclass(frozen=True)
class Probe:
    """What a row is, before it is timed.

    Attributes:
        modes: in which it can decode.
        device, dtype: of its first parameter.
        weight_bytes: of the parameters that a decode step reads; see `weight_bytes`.
        period: what a number of filled-in tokens has to be a multiple of.
        layers: of its cache.
        token_bytes: activations of one token while a prompt is read.
        logits_bytes: of one sequence's last token.
        costs: what its steps must move and compute; None in a dtype that has no rates, such as float64.
    """

    modes: tuple[Mode, ...]
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    period: int
    layers: tuple[CacheLayer, ...]
    token_bytes: int
    logits_bytes: int
    costs: ModelCosts | None = None

    def needed_bytes(self, read: int, capacity: int, batch: int) -> int:
        """An upper estimate of what a cell takes beside the weights: its cache, the copy of a layer that growing or
        filling it makes, and the activations of the tokens read at once."""
        held = [layer.bytes(capacity) for layer in self.layers]
        return batch * (sum(held) + 2 * max(held) + read * self.token_bytes + self.logits_bytes)


def probe(model: Any) -> Probe:
    """Ask a model; it runs once, on `TOKENS` tokens."""
    device = device_of(model)
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    with inference(model, torch.no_grad):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache, dtype = output.past_key_values, next(model.parameters()).dtype
    wide = max(dtype.itemsize, torch.float32.itemsize)
    config = model.config
    numbers = HIDDEN * config.hidden_size + FEED_FORWARD * config.intermediate_size
    return Probe(
        modes=modes_of(model),
        device=device,
        dtype=dtype,
        weight_bytes=weight_bytes(model),
        period=fill_period(cache),
        layers=tuple(_layer(layer) for layer in cache.layers),
        token_bytes=numbers * wide,
        logits_bytes=output.logits.shape[-1] * wide,
        costs=_costs(model, str(dtype).removeprefix("torch.")),
    )


def _costs(model: Any, dtype: str) -> ModelCosts | None:
    if dtype not in DTYPE_BYTES:
        return None
    converted = is_converted(model) and switch_of(model).converted
    return model_costs(model.config, LinearizeConfig.from_dict(model.config.linearize) if converted else None, dtype)


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters that a decode step reads: every one once, but of an embedding table only its rows of the
    new tokens, which do not count. A table that is the output head's weight too is read as a whole."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if p is not table or table is head)


def _layer(layer: Any) -> CacheLayer:
    if isinstance(layer, NearFarLayer):
        assert layer.memory is not None, "the probe has written to every layer"
        return CacheLayer(constant=sum(layer.memory.nbytes()), per_token=0)
    per_token = (layer.keys.nbytes + layer.values.nbytes) // TOKENS
    return CacheLayer(constant=0, per_token=per_token, limit=layer.sliding_window if layer.is_sliding else None)
