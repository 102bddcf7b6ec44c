"""KL(original || row) per token: how far a model's predictions are from the original's, whatever the text says.

    KL = sum over the vocabulary of p * (log p - log q),    p of the original, q of the row, nats, float32

It sees what accuracies hide. The original is run once: what is kept of it are its last hidden states, from which its
logits are made again a few positions at a time beside the row's, so that logits of a whole sequence never exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.benchmarks.inference import (
    POSITIONS_AT_ONCE,
    TOKENS_AT_ONCE,
    device_of,
    hidden_states,
    inference,
    output_head,
)
from linearize.benchmarks.perplexity import by_position
from linearize.benchmarks.resampling import mean_interval

__all__ = ["Reference", "divergence", "reference_states", "summarise_divergence"]


@dataclass(frozen=True)
class Reference:
    """The original's last hidden states, (sequences, seq_len, hidden) on the CPU, and its output embedding, which
    also serves after the row that it came from was left."""

    sequences: Tensor
    states: Tensor
    weight: Tensor
    bias: Tensor | None


def reference_states(model: nn.Module, sequences: Tensor) -> Reference:
    """Run the original over LongTensor (sequences, seq_len); `divergence` compares others with what this returns."""
    head: Any = output_head(model)
    with inference(model):
        states = torch.cat([hidden_states(model, batch.to(device_of(model))).cpu() for batch in _batches(sequences)])
    bias = getattr(head, "bias", None)
    # A row may change the embedding in place, by training or merging; a copy is small beside the model.
    return Reference(sequences, states, head.weight.detach().clone(), None if bias is None else bias.detach().clone())


def _batches(sequences: Tensor) -> tuple[Tensor, ...]:
    return sequences.split(max(1, TOKENS_AT_ONCE // sequences.shape[1]))


def divergence(model: nn.Module, reference: Reference) -> Tensor:
    """KL of every position's prediction, float32 (sequences, seq_len) on the CPU, nats; column p is the prediction
    after p + 1 tokens."""
    head, rows, start = output_head(model), [], 0
    with inference(model):
        for batch in _batches(reference.sequences):
            device = device_of(model)
            ours = hidden_states(model, batch.to(device))
            theirs = reference.states[start : start + len(batch)].to(device)
            start += len(batch)
            pieces = zip(ours.split(POSITIONS_AT_ONCE, 1), theirs.split(POSITIONS_AT_ONCE, 1))
            rows.append(torch.cat([_kl(reference, their, head(our)) for our, their in pieces], 1).cpu())
    return torch.cat(rows)


def _kl(reference: Reference, states: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax of the reference's logits || softmax(logits)) over the last dimension."""
    teacher = nn.functional.linear(states, reference.weight, reference.bias)
    log_p, log_q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(logits.float(), -1)
    # Rounding makes a divergence of nothing slightly negative.
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def summarise_divergence(values: Mapping[str, Tensor], seed: int = 0) -> dict[str, Any]:
    """The mean per token of each row, by position too, with intervals over sequences.

    Args:
        values: row name -> what `divergence` returned, the same sequences for all.
        seed: of the bootstrap.

    Returns:
        The `"kl"` part of evaluate.json without its `"text"`; see `linearize.benchmarks.evaluate`.
    """
    n_sequences, seq_len = next(iter(values.values())).shape
    return {
        "seq_len": seq_len,
        "n_sequences": n_sequences,
        "n_tokens": n_sequences * seq_len,
        "rows": {name: by_position(kl, lambda part: _describe(part, seed)) for name, kl in values.items()},
    }


def _describe(kl: Tensor, seed: int) -> dict[str, Any]:
    broken = int((~kl.isfinite()).sum())
    if broken:
        return {"n_not_finite": broken, "kl": None, "ci95": None}
    means = kl.double().mean(1)
    return {"n_not_finite": 0, "kl": float(means.mean()), "ci95": mean_interval(means, seed)}
