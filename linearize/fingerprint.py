"""Telling whether two models have the same weights, from a few numbers of each tensor.

An adapter is worth nothing on another original, and an adapter of a model whose own weights were trained or merged
since its conversion is not the whole student. Both are silent in the shapes; a sample of the values shows them.
"""

from typing import Any

import torch

from linearize.convert import added_parameters, base_model

__all__ = ["Sample", "changed_values", "weight_sample"]

Sample = dict[str, list[float]]
"""Tensor name -> PER_TENSOR of its values, in float32."""

PER_TENSOR = 4
ROUNDING = 0.01  # relative; bfloat16 rounds by up to 0.4 %, another fine-tune moves most weights by more


@torch.no_grad()
def weight_sample(model: Any) -> Sample | None:
    """Values spread over every tensor of the original inside `model`; None where there are none yet (meta device).

    What conversion or LoRA added does not count, and a tensor has the name it has in the original.
    """
    base = base_model(model)
    if hasattr(base, "_linearize_sharded_sample"):  # divided among processes since it was taken, and frozen
        return base._linearize_sharded_sample
    added = added_parameters(base)
    sample: Sample = {}
    for name, parameter in base.named_parameters():
        if name in added or ".lora_" in name:
            continue
        if parameter.is_meta:
            return None
        flat = parameter.reshape(-1)
        index = torch.tensor(spread(flat.numel(), PER_TENSOR), device=flat.device)
        sample[name.replace(".base_layer.", ".")] = flat[index].float().tolist()
    return sample


def spread(size: int, count: int) -> list[int]:
    """`count` indices (fewer where there are fewer) from 0 to size - 1. In integers: float32 cannot count that far."""
    count = min(size, count)
    return [i * (size - 1) // max(count - 1, 1) for i in range(count)]


def changed_values(before: Sample, now: Sample, exact: bool) -> tuple[int, int]:
    """(values that differ, values compared). Not `exact`: by more than rounding to a half-precision dtype explains."""
    names = before.keys() & now.keys()
    a = torch.tensor([x for name in names for x in before[name]])
    b = torch.tensor([x for name in names for x in now[name]])
    differ = a != b if exact else (a - b).abs() > ROUNDING * a.abs() + 1e-6
    return int(differ.sum()), a.numel()
