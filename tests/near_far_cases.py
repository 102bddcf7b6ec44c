"""Inputs of near-and-far attention for tests, and its definition written a second time."""

import torch

from linearize.kernels.near_far import Hedgehog, Memory, Mixer, near_far_step

FAR = ("none", "normalizer", "gate", "one a head")
MIXES = ("normalizer", "gate")
PADDING = ("full", "left", "right", "holes")


def make_inputs(shape, dtype=torch.float64, grad=False, seed=0):
    """q, k, v, a mixer with random weights and a random mix_logit, one a head and query."""
    batch, heads, kv_heads, length, size, value_size, _, _, features = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    q = 2 * normal(batch, heads, length, size)
    k, v = normal(batch, kv_heads, length, size), normal(batch, kv_heads, length, value_size)
    mixer = Hedgehog(heads, kv_heads, size, features)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.copy_(normal(*weight.shape) * size**-0.25)
    mix_logit = normal(batch, heads, length).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        mixer = mixer.double()
    inputs = [x.to(dtype).requires_grad_(grad) for x in (q, k, v)]
    return *inputs, mixer, mix_logit.requires_grad_(grad)


def make_mask(padding, batch, length):
    """(B, T) bool, the rows padded by different numbers of tokens, one row not at all; None for "full"."""
    if padding == "full":
        return None
    column, row = torch.arange(length), torch.arange(batch)[:, None]
    pad = (3 + 2 * row).clamp_max(length - 1)
    if padding == "left":
        return column >= pad
    if padding == "right":
        return column < length - pad
    return (column * 7 + row * 3) % 5 > 0


def far_options(far, mixer, mix_logit):
    """(mixer, mix_logit, mix) of one of FAR."""
    if far == "none":
        return None, None, "normalizer"
    if far == "one a head":
        return mixer, mix_logit[0, :, 0].detach().requires_grad_(mix_logit.requires_grad), "normalizer"
    return mixer, mix_logit, far


def by_hand(q, k, v, mixer=None, mix_logit=None, *, window, sinks, mix="normalizer", scale=None, mask=None):
    """The definition again, written another way: row by row without padding, near and far as sets in loops, and all
    weights as logarithms, so that the shared denominator is one softmax over both sets. In the dtype of q."""
    batch, heads, length, size = q.shape
    scale = size**-0.5 if scale is None else scale
    out = q.new_zeros(batch, heads, length, v.shape[-1])
    for b in range(batch):
        real = torch.arange(length) if mask is None else mask[b].nonzero()[:, 0]
        count = len(real)
        if not count:
            continue
        near = torch.zeros(count, count, dtype=torch.bool)
        far = torch.zeros(count, count, dtype=torch.bool)
        for t in range(count):
            for i in range(t + 1):
                is_near = i < sinks or i // window >= t // window - 1
                (near if is_near else far)[t, i] = True
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            qs, ks, vs = q[b, h, real], k[b, kv, real], v[b, kv, real]
            near_logits = (qs @ ks.T * scale).masked_fill(~near, -torch.inf)
            if mixer is None:
                out[b, h, real] = near_logits.softmax(-1) @ vs
                continue
            phi_q = hedgehog(qs, mixer.query_weight[h])
            phi_k = hedgehog(ks, mixer.key_weight[kv])
            far_logits = (phi_q @ phi_k.T).log().masked_fill(~far, -torch.inf)
            logit = (mix_logit[h] if mix_logit.ndim == 1 else mix_logit[b, h, real][:, None]).to(q.dtype)
            if mix == "normalizer":
                both = torch.cat([near_logits, far_logits + logit], -1).softmax(-1)
                out[b, h, real] = both @ torch.cat([vs, vs])
            else:
                some = far_logits.amax(-1, keepdim=True) > -torch.inf
                far_out = far_logits.masked_fill(~some, 0.0).softmax(-1) @ vs
                share = torch.where(some, logit.sigmoid(), 0.0)
                out[b, h, real] = near_logits.softmax(-1) @ vs * (1 - share) + far_out * share
    return out


def hedgehog(x, weight):
    """Equation 6 of arXiv 2402.04347 for one head: x (T, D), weight (D, F / 2)."""
    y = x @ weight.to(x.dtype)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class Functional(Mixer):
    """A Hedgehog whose weights are handed in, so that gradcheck can vary them."""

    def __init__(self, mixer, weights):
        super().__init__()
        self._mixer = (mixer,)
        self._weights = weights
        self.num_features = mixer.num_features

    def _features(self, x, name):
        return torch.stack([hedgehog(row, w) for b in x for row, w in zip(b, self._weights[name], strict=True)]).view(
            *x.shape[:3], self.num_features
        )

    def query_features(self, q):
        return self._features(q, "query_weight")

    def key_features(self, k):
        return self._features(k, "key_weight")


def in_steps(pieces, q, k, v, mixer, mix_logit, mask=None, memory=None, **options):
    """All outputs of near_far_step over pieces of these lengths, and the last memory."""
    if memory is None:
        memory = Memory.empty(k, v, mixer, window=options["window"], sinks=options["sinks"])
    out, done = [], 0
    for piece in pieces:
        part = slice(done, done + piece)
        new = None if mask is None else mask[:, part]
        if new is not None and bool(new.all()):
            new = None
        logit = mix_logit[:, :, part] if mix_logit is not None and mix_logit.ndim == 3 else mix_logit
        step, memory = near_far_step(
            q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, logit, mask=new, **options
        )
        out.append(step)
        done += piece
    assert done == q.shape[2]
    return torch.cat(out, dim=2), memory
