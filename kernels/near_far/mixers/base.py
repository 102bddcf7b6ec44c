"""What a mixer is: a feature map, and a state of constant size that is written once a chunk.

Shape legend: B batch, H query heads, K key-value heads (G = H / K query heads share one), T tokens,
D head dimension of q and k, V of v, F features, N chunks, W tokens a chunk.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Mixer", "State", "accumulation_dtype", "full_precision", "near_part", "state_obstacle"]


class State(NamedTuple):
    """The far memory of one layer.

    s: (B, K, F, V), sum of phi_k v^T over the tokens it holds, float32 (float64 under float64 inputs).
    z: (B, K, F), sum of phi_k, same dtype.
    """

    s: Tensor
    z: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> "State":
        """`fn` of both."""
        return State(fn(self.s), fn(self.z))


class Mixer(nn.Module):
    """Base of all mixers: an additive state. A subclass gives `num_features`, the two feature maps, a constructor
    `(heads, kv_heads, head_dim, feature_dim)` and `reset_parameters`.

    A state that is not a plain sum (decay, delta rule) overrides `scan` and `update` as well: both see whole chunks,
    and no query ever reads a chunk's state before the chunk after next, so neither needs an output inside a chunk.
    Features must be >= 0, or the logarithm of the far mass is undefined.
    """

    num_features: int
    # False: features are of q and k before the rotary embedding. The tensors then have 2 D channels, with those after
    # it first, which the near side reads; see `near_part`.
    rotary = True

    def reset_parameters(self) -> None:
        """Set the untrained start."""
        raise NotImplementedError

    def query_features(self, q: Tensor) -> Tensor:
        """phi_q. q: (B, H, T, D) -> (B, H, T, F), >= 0, in the accumulation dtype."""
        raise NotImplementedError

    def key_features(self, k: Tensor) -> Tensor:
        """phi_k. k: (B, K, T, D) -> (B, K, T, F), >= 0, in the accumulation dtype."""
        raise NotImplementedError

    def obstacle(self, heads: int, kv_heads: int, head_dim: int) -> str | None:
        """Why queries and keys of these sizes do not fit this mixer, with the way out; None if they do."""
        return None

    def empty_state(self, k: Tensor, v: Tensor) -> State:
        """A state that holds nothing, for keys and values (B, K, ., .) like these."""
        dtype = accumulation_dtype(k)
        batch, kv_heads = k.shape[:2]
        return State(
            torch.zeros(batch, kv_heads, self.num_features, v.shape[-1], dtype=dtype, device=k.device),
            torch.zeros(batch, kv_heads, self.num_features, dtype=dtype, device=k.device),
        )

    def update(self, state: State, phi_k: Tensor, v: Tensor) -> State:
        """The state after one more chunk. phi_k: (B, K, W, F), zero for tokens to leave out; v: (B, K, W, V)."""
        return State(state.s + phi_k.transpose(-1, -2) @ v.to(phi_k.dtype), state.z + phi_k.sum(-2))

    def scan(self, state: State, phi_k: Tensor, v: Tensor) -> State:
        """The states before each of N chunks and after the last: N + 1 of them, stacked after the head dimension.

        phi_k: (B, K, N, W, F), v: (B, K, N, W, V) -> s (B, K, N + 1, F, V), z (B, K, N + 1, F).
        """
        s = torch.cat([state.s[:, :, None], phi_k.transpose(-1, -2) @ v.to(phi_k.dtype)], dim=2)
        z = torch.cat([state.z[:, :, None], phi_k.sum(-2)], dim=2)
        return State(s.cumsum_(2), z.cumsum_(2))

    def read(self, state: State, phi_q: Tensor) -> tuple[Tensor, Tensor]:
        """The far term: its value and the logarithm of its mass.

        value = phi_q S / n and log n, with n = phi_q . z. A row with n at or below the smallest normal number has no
        far term: log n = -inf, and a value that is finite and of no consequence.

        phi_q: (..., R, F), s: (..., F, V), z: (..., F) -> value (..., R, V), log n (..., R).
        """
        n = (phi_q * state.z[..., None, :]).sum(-1)
        tiny = torch.finfo(n.dtype).tiny
        safe = n.clamp_min(tiny)
        log_mass = safe.log().masked_fill(n <= tiny, -torch.inf)
        return (phi_q @ state.s) / safe[..., None], log_mass


def state_obstacle(mixer: Mixer | None, mix: str = "normalizer") -> str | None:
    """Why kernels that know only sums of phi_k v^T cannot keep this mixer's state, or mix it in so, in words; None if
    they can."""
    if mixer is None:
        return None
    if mix == "peak":
        return 'they do not know mix "peak"'
    own = [name for name in ("update", "scan", "read") if getattr(type(mixer), name) is not getattr(Mixer, name)]
    return f"{type(mixer).__name__} has its own {' and '.join(own)}" if own else None


def near_part(mixer: Mixer | None, x: Tensor) -> Tensor:
    """Of q or k as a mixer takes them, the channels that logits are made of; a view."""
    return x if mixer is None or mixer.rotary else x[..., : x.shape[-1] // 2]


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Inside, autocast is off on x's device: what must be float32 stays it in mixed-precision training."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32: exponentials, denominators and states are never half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
