"""flash-linear-attention's operators on the same q, k and v, as rows of the microbenchmark.

They are the linear attentions that a converted layer could have had instead: no window, no sinks, a state of D x V per
head that decays (`simple_gla`: a number a head and token; `gla`: one a feature) or is corrected (`gated_delta_rule`).
fla has no grouped queries, so keys and values are repeated for its heads, inside the timed call. Its float32 products
are in TF32. On a GPU only: its kernels are Triton's.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels import fla_engine

__all__ = ["FLA_ROWS", "fla_calls", "fla_obstacle", "fla_steps"]

FLA_ROWS = ("fla simple_gla", "fla gla", "fla gated_delta_rule")
LOG_DECAY = -1 / 32  # of every token; beta of the delta rule is 1/2. Times do not depend on either


def fla_obstacle(device: torch.device) -> str | None:
    """Why these rows cannot run on a device; None where they can."""
    if device.type != "cuda":
        return f"flash-linear-attention's kernels need a GPU, and this is {device.type}"
    try:
        import fla.ops.gated_delta_rule
        import fla.ops.gla
        import fla.ops.simple_gla  # noqa: F401
    except ImportError as error:
        return f"flash-linear-attention cannot be imported ({' '.join(str(error).split())})"
    return None


def fla_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The output (B, H, T, V) of each operator, for a whole text. q: (B, H, T, D), k: (B, K, T, D), v: (B, K, T, V)."""
    scalar, features = _gates(k)
    beta = torch.full_like(scalar, 0.5)

    def simple() -> Tensor:
        return fla_engine.simple_gla(q, k, v, scalar, backend="fla")[0]

    def gla() -> Tensor:
        return fla_engine.gla(q, k, v, features, backend="fla")[0]

    def delta() -> Tensor:
        # Keys of other lengths would let its state explode.
        return fla_engine.gated_delta_rule(q, F.normalize(k, dim=-1), v, scalar, beta, backend="fla")[0]

    return dict(zip(FLA_ROWS, (simple, gla, delta), strict=True))


def fla_steps(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """One new token through each operator's recurrent form, again and again from one state.

    q: (B, H, 1, D), k: (B, K, 1, D), v: (B, K, 1, V).
    """
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
    from fla.ops.gla import fused_recurrent_gla
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    group = q.shape[1] // k.shape[1]
    scalar, features = (_heads(x, group) for x in _gates(k))
    unit, beta = F.normalize(k, dim=-1), torch.full_like(scalar, 0.5)
    state = torch.zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3], device=q.device)
    common: dict[str, Any] = {"initial_state": state, "output_final_state": True}

    def inputs(keys: Tensor) -> dict[str, Tensor]:
        return {"q": q.transpose(1, 2), "k": _heads(keys, group), "v": _heads(v, group)}

    steps = (
        lambda: fused_recurrent_simple_gla(**inputs(k), g=scalar, **common),
        lambda: fused_recurrent_gla(**inputs(k), gk=features, **common),
        lambda: fused_recurrent_gated_delta_rule(**inputs(unit), g=scalar, beta=beta, **common),
    )
    return {row: torch.no_grad()(step) for row, step in zip(FLA_ROWS, steps, strict=True)}


def _gates(k: Tensor) -> tuple[Tensor, Tensor]:
    """Log decays of k (B, K, T, D): (B, K, T) and (B, K, T, D), float32."""
    features = torch.full(k.shape, LOG_DECAY, device=k.device)
    return features[..., 0].contiguous(), features


def _heads(x: Tensor, group: int) -> Tensor:
    """(B, K, T, ...) -> (B, T, H, ...), as fla takes it."""
    return x.repeat_interleave(group, 1).transpose(1, 2).contiguous()
