"""What a layer sees, random, and what it should be taught: explicit T x T masks in float64, one row and one head at a
time, without padding."""

from types import SimpleNamespace

import torch

from linearize.attention import Observation
from linearize.convert import converted_layers
from linearize.distill.calibration import MixFit
from linearize.distill.objectives import FarTarget
from tests.tiny_models import make_student

HEADS, KV_HEADS, SIZE = 4, 2, 16
MIXES = ("normalizer", "gate")
PADDING = ("full", "left", "right", "holes")
# T, W, S
SHAPES = [
    (37, 4, 2),
    (37, 4, 0),
    (32, 4, 4),  # S = W, no tail
    (37, 4, 8),  # S = 2 W
    (37, 3, 7),  # S > 2 W
    (37, 12, 5),
    (9, 1, 0),
]


def make_mask(padding, batch, length):
    """(B, T) bool or None; the rows differ, and the last one is too short for any far key."""
    if padding == "full":
        return None
    column = torch.arange(length)
    amount = torch.tensor([0, 5, length - 2])[:batch, None]
    if padding == "left":
        return column >= amount
    if padding == "right":
        return column < length - amount
    mask = (column * 7 + torch.arange(batch)[:, None] * 3) % 5 > 0
    mask[-1] = column % 19 == 3
    return mask


def make_seen(
    mix="normalizer", shape=SHAPES[0], padding="full", batch=3, factor=1.5, dtype=torch.float32, mix_input="query"
):
    """What a layer with random mixer and mix saw: random q, k, v."""
    length, window, sinks = shape
    student = make_student("llama", mix, window=window, sinks=sinks, mix_input=mix_input)
    q = factor * torch.randn(batch, HEADS, length, SIZE)
    k, v = torch.randn(batch, KV_HEADS, length, SIZE), torch.randn(batch, KV_HEADS, length, SIZE)
    layer = converted_layers(student)[1]
    return Observation(layer, *(x.to(dtype) for x in (q, k, v)), make_mask(padding, batch, length))


def truth(seen):
    """By row, of its real tokens, in float64: out, near, far (H, n, V), log z_near, log z_far (H, n), and which
    tokens have far keys (n,); the student's value and log n of the far side, with gradient."""
    config, layer = seen.layer.linearize_config, seen.layer
    rows = []
    for b in range(seen.q.shape[0]):
        real = torch.arange(seen.q.shape[2]) if seen.mask is None else seen.mask[b].nonzero()[:, 0]
        n = len(real)
        near, far = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
        for t in range(n):
            for i in range(t + 1):
                is_near = i < config.sinks or i // config.window >= t // config.window - 1
                (near if is_near else far)[t, i] = True
        heads = []
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            q, k, v = seen.q[b, h, real].double(), seen.k[b, kv, real].double(), seen.v[b, kv, real].double()
            logits = q @ k.T * layer.scaling
            inside = {name: logits.masked_fill(~keys, -torch.inf) for name, keys in (("near", near), ("far", far))}
            phi_q = features(q, layer.mixer.query_weight[h])
            phi_k = features(k, layer.mixer.key_weight[kv])
            weights = (phi_q @ phi_k.T) * far
            mass = weights.sum(-1)
            heads.append(
                {
                    "q": q,
                    "logits": logits.masked_fill(~(near | far), -torch.inf),
                    "weights": weights,
                    "out": logits.masked_fill(~(near | far), -torch.inf).softmax(-1) @ v,
                    "near": inside["near"].softmax(-1) @ v,
                    "far": inside["far"].softmax(-1).nan_to_num() @ v,
                    "near_lse": inside["near"].logsumexp(-1),
                    "far_lse": inside["far"].logsumexp(-1),
                    "state": (weights @ v) / mass.clamp_min(1e-300)[:, None],
                    "log_mass": mass.clamp_min(1e-300).log(),
                    "mix": q @ layer.mix.weight[h].double() + layer.mix.bias[h].double(),
                }
            )
        row = {key: torch.stack([head[key] for head in heads]) for key in heads[0]}
        rows.append(SimpleNamespace(**row, is_near=near, is_far=far, counted=far.any(-1), count=n))
    return rows


def features(x, weight):
    projected = x @ weight.double()
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)


def gathered(rows, *names):
    """The counted tokens of all rows, each (H, N, ...)."""
    return [torch.cat([getattr(row, name)[:, row.counted] for row in rows], 1) for name in names]


def student_log_odds(row, mix):
    """log (r / (1 - r)) of the student's far share r, (H, n), of tokens that have far keys."""
    if mix == "gate":
        return row.mix
    peak = row.logits.masked_fill(~row.is_near, -torch.inf).amax(-1) if mix == "peak" else 0
    return row.mix + row.log_mass - (row.near_lse - peak)


def set_mix(layer, weight, bias):
    layer.mix.weight.data.copy_(weight)
    layer.mix.bias.data.copy_(bias)


def fit_mix(*batches):
    """Give the layer of these batches the mix in closed form."""
    fit = MixFit()
    for seen in batches:
        fit.add(seen, FarTarget(seen))
    fit.set(batches[0].layer.mix)
