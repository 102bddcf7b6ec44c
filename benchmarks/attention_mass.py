"""Where attention goes: how much of it falls on sinks, on the window and on everything older, by layer and head.

    original      sinks = Z_sinks / Z        window = (Z_near - Z_sinks) / Z        older = Z_far / Z
    student       sinks = (1 - r) Z_sinks / Z_near     window = (1 - r) (Z_near - Z_sinks) / Z_near     older = r

with Z = Z_near + Z_far the denominator of softmax, split at the student's own window and sinks as in
`linearize.kernels.near_far.reference`, and r the share of the state in the student's own mix; a learned sink counts
with the sinks. The three sum to 1. They are means over the queries that have something older to look at. A state that
is bypassed shows at a glance: its `older` is near 0 where the original's is not, whatever the perplexity says.

Each row is read on its own hidden states. Z_near and Z_far come from streamed log-sum-exps, never a T x T map; for the
original that is quadratic in time, as its attention is. The state of a mixer that every token enters (`Recurrent`) has
no older part of its own: its r is what the gate gives to the state, whatever that holds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linearize.attention import Observation
from linearize.benchmarks.inference import TOKENS_AT_ONCE, device_of, hidden_states, inference
from linearize.convert import converted_layers, is_converted, switch_of
from linearize.distill.objectives import FarTarget, first_far_query
from linearize.kernels.near_far.chunked import capped, far_log_odds, near_chunked, pad_to_chunks
from linearize.kernels.near_far.mixers import Recurrent
from linearize.kernels.near_far.ops import far_read

__all__ = ["PARTS", "attention_mass", "original_shares", "student_shares", "summarise_attention"]

PARTS = ("sinks", "window", "older")
DECIMALS = 6
# A head of the original that looks back has at least so much on what is older; a student's bypasses its state where it
# has less than this part of it.
LOOKS_BACK, BYPASSED = 0.1, 0.1


@torch.no_grad()
def original_shares(seen: Observation, target: FarTarget | None = None) -> Tensor:
    """The original's masses, (3, B, H, T) in the order of `PARTS`, from log-sum-exps, no gradient.

    Args:
        seen: what a layer saw, in rows without padding or documents.
        target: what is known of it already; None computes it.
    """
    target = target or FarTarget(seen)
    length = seen.q.shape[2]
    older = target.far_share[:, :, :length]
    return _split(seen, older, target.near_lse[:, :, :length])


@torch.no_grad()
def student_shares(seen: Observation) -> Tensor:
    """The student's masses by its own mix, as the switch has it: (3, B, H, T), no gradient. Arguments as above."""
    layer, config = seen.layer, seen.layer.linearize_config
    length = seen.q.shape[2]
    q, k, v = (pad_to_chunks(x, config.window) for x in (seen.q, seen.k, seen.v))
    sinks = k[:, :, : config.sinks], v[:, :, : config.sinks]
    _, near_lse = near_chunked(q, k, v, *sinks, window=config.window, **layer.softmax)
    logit = layer.mix_logit(q)
    if layer.mixer is None or logit is None:
        older = torch.zeros_like(near_lse)
    elif isinstance(layer.mixer, Recurrent):
        older = (logit[:, None] if logit.ndim == 1 else logit).sigmoid().expand_as(near_lse)
    else:
        _, log_mass = far_read(q, k, v, layer.mixer, window=config.window, sinks=config.sinks)
        mix_lse = near_lse
        if config.mix == "peak":
            _, mix_lse = near_chunked(q, k, v, *sinks, window=config.window, **layer.softmax, from_peak=True)
        older = far_log_odds(mix_lse, log_mass, logit, config.mix).sigmoid()
    return _split(seen, older[:, :, :length], near_lse[:, :, :length])


def _split(seen: Observation, older: Tensor, near_lse: Tensor) -> Tensor:
    """What is not older, (B, H, T), divided into sinks and window."""
    sinks = seen.layer.linearize_config.sinks
    # The scale goes to the queries, in the dtype of the sums: as the near side has it.
    q = (seen.q.to(near_lse.dtype) * seen.layer.scaling).unflatten(1, (seen.k.shape[1], -1))
    keys = seen.k[:, :, None, :sinks].to(near_lse.dtype)
    lse = capped(q @ keys.transpose(-1, -2), seen.layer.soft_cap).flatten(1, 2).logsumexp(-1)
    sink_logit = seen.layer.softmax["sink_logit"]
    if sink_logit is not None:
        lse = torch.logaddexp(lse, sink_logit.to(lse.dtype)[:, None])
    # A query among the sinks sees nothing else: its share is 1, whatever the sinks behind it would add.
    share = (lse - near_lse).exp().clamp(max=1.0)
    return torch.stack([(1 - older) * share, (1 - older) * (1 - share), older])


def attention_mass(model: nn.Module, sequences: Tensor) -> dict[str, Any]:
    """The masses of every converted layer, in whichever way the model's switch has it run.

    Args:
        model: one row of a comparison.
        sequences: LongTensor (sequences, seq_len), text.

    Returns:
        `{"window": int, "sinks": int, "layers": [{"layer": int, "sinks": [H floats], "window": [...], "older":
        [...]}, ...]}`; or `{"why_not": str}` where there is nothing to measure: no layer is converted, or sequences so
        short that nothing is older than the window.
    """
    if not is_converted(model):
        return {"why_not": "no layer is converted, so there is no window to split its attention at"}
    config = next(iter(converted_layers(model).values())).linearize_config
    first = first_far_query(config)
    if sequences.shape[1] <= first:
        return {
            "why_not": f"nothing is older than the window in {sequences.shape[1]} tokens; it takes more than {first}"
        }
    sums: dict[int, Tensor] = {}

    def add(seen: Observation) -> Tensor | None:
        out = None
        if seen.layer.switch.converted:
            shares = student_shares(seen)
        else:
            target = FarTarget(seen)
            shares, out = original_shares(seen, target), target.attention(seen)
        total = shares[..., first:].double().sum((1, 3)).cpu()
        sums[seen.layer.layer_idx] = sums.get(seen.layer.layer_idx, torch.zeros_like(total)) + total
        return out

    with inference(model), _observed(model, add):
        for batch in sequences.split(max(1, TOKENS_AT_ONCE // sequences.shape[1])):
            hidden_states(model, batch.to(device_of(model)))
    count = len(sequences) * (sequences.shape[1] - first)
    layers = []
    for layer, total in sorted(sums.items()):
        means = [[round(share, DECIMALS) for share in heads] for heads in (total / count).tolist()]
        layers.append({"layer": layer, **dict(zip(PARTS, means))})
    return {"window": config.window, "sinks": config.sinks, "layers": layers}


@contextmanager
def _observed(model: Any, observer: Any) -> Iterator[None]:
    switch = switch_of(model)
    before = switch.observer
    switch.observer = observer
    try:
        yield
    finally:
        switch.observer = before


def summarise_attention(found: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """Masses of the rows side by side, their means, and how many heads bypass the state.

    Args:
        found: row name -> what `attention_mass` returned.
        baseline: the row that the others are held against.

    Returns:
        The `"attention"` part of evaluate.json without its text; see `linearize.benchmarks.evaluate`.
    """
    rows = {row: one for row, one in found.items() if "layers" in one}
    return {
        "rows": {
            row: {**one, "mean": _mean(one), "bypassed": _bypassed(one, rows.get(baseline))}
            for row, one in rows.items()
        },
        "not_measured": {row: one["why_not"] for row, one in found.items() if "layers" not in one},
    }


def _mean(one: Mapping[str, Any]) -> dict[str, float]:
    """Over all layers and heads."""
    return {
        part: sum(sum(layer[part]) for layer in one["layers"]) / sum(len(layer[part]) for layer in one["layers"])
        for part in PARTS
    }


def _bypassed(one: Mapping[str, Any], original: Mapping[str, Any] | None) -> dict[str, int] | None:
    """Of the heads that look back in the original, how many do not here; None without an original that was split at
    the same window and sinks."""
    if original is None or (one["window"], one["sinks"]) != (original["window"], original["sinks"]):
        return None
    theirs = {layer["layer"]: layer["older"] for layer in original["layers"]}
    pairs = [
        (own, wanted)
        for layer in one["layers"]
        for own, wanted in zip(layer["older"], theirs.get(layer["layer"], ()))
        if wanted >= LOOKS_BACK
    ]
    return {"heads": sum(own < BYPASSED * wanted for own, wanted in pairs), "of": len(pairs)}
