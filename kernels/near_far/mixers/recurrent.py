"""States that every token enters and every query reads: a recurrent branch beside the window.

    S_t = diag(a_t) S_{t-1} + phi_k_t v_t^T        a_t in (0, 1], one a feature
    o_t = (1 - r) o_near + r S_t^T phi_q_t         r = sigmoid(mix_logit)

Near tokens are in S_t too, sinks as well, and nothing is divided by a mass: the weight of token i for query t is
phi_q_t . (a_{i+1} ... a_t phi_k_i). So there is no far side of its own and no shared denominator (mix "gate" only).
A padding token neither decays the state nor enters it.

Source: gated linear attention, Yang et al. 2023 (arXiv 2312.06635), equation 3. Shape legend as in `base`.
"""

from typing import Any

import torch
from torch import Tensor

from ... import fla_engine
from .base import Mixer, State, accumulation_dtype

__all__ = ["Recurrent"]


class Recurrent(Mixer):
    """Base of such mixers. A subclass gives the two feature maps and `log_decay`.

    Features need not be >= 0 here, as no logarithm is taken of their products. `update`, `scan` and `read` belong to
    states of whole chunks and are not called.
    """

    def log_decay(self, k: Tensor) -> Tensor:
        """log a_t of keys (B, K, T, D): (B, K, T, F), <= 0, in the accumulation dtype."""
        raise NotImplementedError

    def empty_state(self, k: Tensor, v: Tensor) -> State:
        """As in `Mixer`, but without a normaliser: z is (B, K, 0)."""
        dtype = accumulation_dtype(k)
        batch, kv_heads = k.shape[:2]
        return State(
            torch.zeros(batch, kv_heads, self.num_features, v.shape[-1], dtype=dtype, device=k.device),
            torch.zeros(batch, kv_heads, 0, dtype=dtype, device=k.device),
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None = None,
        *,
        mask: Tensor | None = None,
        begins: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, State]:
        """S_t^T phi_q_t of every query, and the state after the last token.

        q: (B, H, T, D), k: (B, K, T, D), v: (B, K, T, V); state: what is known before the first token, None is nothing.
        mask: (B, T), true for real tokens. begins: (B, T), true where a token forgets all before it (a document's
        first). backend: "reference", the recurrence token by token, or a backend of `fla_engine`.
        Returns (B, H, T, V) and the state, in the accumulation dtype; linear in time, differentiable.
        """
        phi_q, phi_k, log_decay = self.query_features(q), self.key_features(k), self.log_decay(k)
        v = v.to(phi_k.dtype)
        if begins is not None:
            log_decay = log_decay.masked_fill(begins[:, None, :, None], -torch.inf)
        if mask is not None:
            padding = ~mask.bool()[:, None, :, None]
            phi_q, phi_k, v, log_decay = (x.masked_fill(padding, 0) for x in (phi_q, phi_k, v, log_decay))
        state = self.empty_state(k, v) if state is None else state
        if backend == "reference":
            out, last = _recurrence(phi_q, phi_k, v, log_decay, state.s)
        elif q.shape[2] == 1:
            last = torch.addcmul(phi_k.transpose(-1, -2) * v, log_decay.exp().transpose(-1, -2), state.s.to(v.dtype))
            out = (phi_q.unflatten(1, (k.shape[1], -1)).squeeze(3) @ last).flatten(1, 2)[:, :, None]
        else:
            out, last = fla_engine.gla(phi_q, phi_k, v, log_decay, state.s.to(v.dtype), scale=1.0, backend=backend)
        return out, State(last, state.z)


def _recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of the module and nothing else. q: (B, H, T, F), k, log_decay: (B, K, T, F), v: (B, K, T, V)."""
    group = q.shape[1] // k.shape[1]
    out: list[Any] = []
    for t in range(q.shape[2]):
        s = log_decay[:, :, t, :, None].exp() * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ s.repeat_interleave(group, 1)).squeeze(2))
    return torch.stack(out, dim=2), s
