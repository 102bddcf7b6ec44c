"""Hedgehog: a learned softmax feature map that imitates the spiky weights of softmax attention.

    phi(x) = [softmax(x W), softmax(-x W)]         W: (heads, D, F / 2), one for queries and one for keys

Source: Zhang et al. 2024, "The Hedgehog & the Porcupine" (arXiv 2402.04347), equation 6; LoLCATs (arXiv 2410.10254).
"""

import torch
from torch import Tensor, nn

from .base import Mixer, accumulation_dtype

__all__ = ["Hedgehog"]

START = 0.8


class Hedgehog(Mixer):
    """The feature map with its weights, in float32 whatever the model's dtype.

    query_weight: (H, D, feature_dim), key_weight: (K, D, feature_dim); F = 2 * feature_dim.

    At the start W is the identity times `scale`, for queries and keys alike; where feature_dim > D, random rotations of
    it follow (columns that repeat would get the same gradients and stay the same). On unscaled q and k, whose norms
    are 8 to 19 in trained models, the features are nearly one-hot; scaled by D^(-1/4), the share of the softmax scale
    that belongs to each of q and k, they are nearly uniform. In between, at START, they learn fastest.
    """

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, feature_dim: int | None = None, scale: float | None = None
    ):
        super().__init__()
        feature_dim = feature_dim or head_dim
        self.scale = START if scale is None else scale
        self.num_features = 2 * feature_dim
        self.query_weight = nn.Parameter(torch.empty(heads, head_dim, feature_dim, dtype=torch.float32))
        self.key_weight = nn.Parameter(torch.empty(kv_heads, head_dim, feature_dim, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the scaled identity and its rotations."""
        for weight in (self.query_weight, self.key_weight):
            if not weight.is_meta:
                weight.copy_(self.scale * _rotations(*weight.shape[1:]))

    def obstacle(self, heads: int, kv_heads: int, head_dim: int) -> str | None:
        """The weights are of one shape of attention."""
        has = self.query_weight.shape[0], self.key_weight.shape[0], self.query_weight.shape[1]
        if has == (heads, kv_heads, head_dim):
            return None
        return (
            f"is for {has[0]} heads on {has[1]} of size {has[2]}, not {heads} on {kv_heads} of size {head_dim}; "
            f"make one with Hedgehog({heads}, {kv_heads}, {head_dim})"
        )

    def query_features(self, q: Tensor) -> Tensor:
        """phi_q of q (B, H, T, D): (B, H, T, F)."""
        return _features(q, self.query_weight)

    def key_features(self, k: Tensor) -> Tensor:
        """phi_k of k (B, K, T, D): (B, K, T, F)."""
        return _features(k, self.key_weight)


def _rotations(head_dim: int, columns: int) -> Tensor:
    """(head_dim, columns) on the CPU: the identity, then random rotations of it, always the same ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    blocks = [torch.eye(head_dim, device="cpu")]
    while head_dim * len(blocks) < columns:
        blocks.append(torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, device="cpu")).Q)
    return torch.cat(blocks, dim=1)[:, :columns]


def _features(x: Tensor, weight: Tensor) -> Tensor:
    dtype = accumulation_dtype(x)
    projected = x.to(dtype) @ weight.to(dtype)
    return torch.stack([projected, -projected], dim=-2).softmax(-1).flatten(-2)
