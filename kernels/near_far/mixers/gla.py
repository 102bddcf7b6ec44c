"""Gated linear attention without a parameter of its own: features and decays are functions of q and k alone.

    phi(x) = softmax(x)                      over the head's D channels
    a_t    = sigmoid(pool(k_t))^(1 / 16)     one a channel of each key-value head

q and k are taken before the rotary embedding. `pool` is average pooling of a token's keys to as many channels as they
have, which leaves them as they are; 1 / 16 is the temperature of gated linear attention, by which a channel of k = 0
keeps half of what it holds for 16 tokens.

Source: Liger, Lan et al. 2025 (arXiv 2503.01496), section 3, with pooling and temperature as its released models have
them; gated linear attention, Yang et al. 2023 (arXiv 2312.06635), section 4.4.
"""

import torch.nn.functional as F
from torch import Tensor

from .base import accumulation_dtype
from .recurrent import Recurrent

__all__ = ["Gla"]

TEMPERATURE = 16.0


class Gla(Recurrent):
    """F = D features. q and k are those of `Mixer.rotary = False`: (., ., T, 2 D), the plain half last."""

    rotary = False

    def __init__(self, heads: int, kv_heads: int, head_dim: int, feature_dim: int | None = None):
        super().__init__()
        self.num_features = head_dim

    def reset_parameters(self) -> None:
        """There are none."""

    def obstacle(self, heads: int, kv_heads: int, head_dim: int) -> str | None:
        """The features are as many as the plain half has channels."""
        if head_dim == 2 * self.num_features:
            return None
        return (
            f"takes q and k of size {2 * self.num_features}, {self.num_features} channels after the rotary embedding "
            f"and as many before it, not {head_dim}; concatenate the two, or make one for size {head_dim // 2}"
        )

    def query_features(self, q: Tensor) -> Tensor:
        """phi_q of q (B, H, T, 2 D): (B, H, T, D)."""
        return self._plain(q).softmax(-1)

    def key_features(self, k: Tensor) -> Tensor:
        """phi_k of k (B, K, T, 2 D): (B, K, T, D)."""
        return self._plain(k).softmax(-1)

    def log_decay(self, k: Tensor) -> Tensor:
        """log a of k (B, K, T, 2 D): (B, K, T, D)."""
        return F.logsigmoid(self._plain(k)) / TEMPERATURE

    def _plain(self, x: Tensor) -> Tensor:
        return x[..., self.num_features :].to(accumulation_dtype(x))
