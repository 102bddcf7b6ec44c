"""A softmax of its own: soft cap of logits and learned sinks, in every form, against the definition by maps."""

import pytest
import torch

from linearize import LinearizeError, near_far_attention
from linearize.kernels import backends
from linearize.kernels.near_far import Memory, near_far_step
from linearize.kernels.near_far.documents import lay_out_documents
from linearize.kernels.near_far.mixers import Gla
from linearize.kernels.near_far.transfer import far_divergence, split_attention
from tests.near_far_cases import PADDING, in_steps, make_inputs, make_mask
from tests.tolerance import assert_near

SHAPE = (2, 4, 2, 21, 6, 5, 4, 2, 7)  # batch, heads, kv_heads, tokens, size, value_size, window, sinks, features
WINDOW, SINKS = 4, 2
SINK = torch.tensor([-1.0, 0.5, 2.0, -torch.inf], dtype=torch.float64)
OWN = {
    "cap": {"soft_cap": 1.5},
    "sink": {"sink_logit": SINK},
    "both": {"soft_cap": 1.5, "sink_logit": SINK},
}
MIXES = ("none", "normalizer", "peak", "gate")


def parts(q, k, soft_cap=None, sink_logit=None, length=None):
    """exp of all logits (B, H, T, T), those of near keys and those of far ones (0 elsewhere), and exp of the sinks."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    near = (key <= query) & ((key < SINKS) | (key // WINDOW >= query // WINDOW - 1))
    far = (key <= query) & ~near
    sink = q.new_zeros(q.shape[1]) if sink_logit is None else sink_logit.to(q.dtype).exp()
    return logits, logits.exp() * near, logits.exp() * far, sink[:, None, None]


def by_maps(q, k, v, mixer, mix_logit, mix, **own):
    """Near-and-far attention by whole maps, no row padded."""
    logits, near, far, sink = parts(q, k, **own)
    group = q.shape[1] // k.shape[1]
    values = v.repeat_interleave(group, 1)
    total = near.sum(-1, keepdim=True) + sink
    out = near @ values / total
    if mix == "none":
        return out
    mass = mixer.query_features(q) @ mixer.key_features(k).repeat_interleave(group, 1).transpose(-1, -2) * (far > 0)
    n = mass.sum(-1, keepdim=True)
    odds = mix_logit[..., None].exp()
    if mix != "gate":
        odds = odds * n / total
    if mix == "peak":
        peak = logits.masked_fill(near == 0, -torch.inf).amax(-1, keepdim=True).exp()
        odds = odds * torch.maximum(peak, sink)
    share = torch.where(n > 0, odds / (1 + odds), 0.0)
    return (1 - share) * out + share * (mass @ values) / n.clamp_min(1e-300)


def options(mix, own):
    return {"window": WINDOW, "sinks": SINKS, "mix": "normalizer" if mix == "none" else mix, **OWN[own]}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("mix", MIXES)
def test_every_form_is_the_definition(mix, own):
    q, k, v, mixer, mix_logit = make_inputs(SHAPE)
    expected = by_maps(q, k, v, mixer, mix_logit, mix, **OWN[own])
    plain = by_maps(q, k, v, mixer, mix_logit, mix)
    assert (expected - plain).abs().max() > 0.05
    given = (q, k, v, None, None) if mix == "none" else (q, k, v, mixer, mix_logit)
    with torch.no_grad():
        for backend in ("reference", "torch"):
            assert_near(near_far_attention(*given, **options(mix, own), backend=backend), expected)
        for pieces in ([1] * 21, [9, 1, 4, 3, 4], [21]):
            assert_near(in_steps(pieces, *given, **options(mix, own))[0], expected)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("padding", PADDING[1:])
def test_padding_and_documents(padding, own):
    """As the reference has them, which knows no blocks, no packing and no ring."""
    q, k, v, mixer, mix_logit = make_inputs(SHAPE)
    mask = make_mask(padding, 2, 21)
    given, softmax = (q, k, v, mixer, mix_logit), options("normalizer", own)
    expected = near_far_attention(*given, **softmax, mask=mask, backend="reference")
    assert_near(near_far_attention(*given, **softmax, mask=mask), expected)
    assert_near(in_steps([9, 1, 1, 4, 6], *given, mask, **softmax)[0], expected)
    documents = lay_out_documents([0, 12, 21, 42], 2, 21, q.device)
    packed = near_far_attention(*given, **softmax, cu_seqlens=documents)
    *alone, logit = (x[:1, :, 12:] for x in (q, k, v, mix_logit))
    assert_near(packed[:1, :, 12:], near_far_attention(*alone, mixer, logit, **softmax))


@pytest.mark.parametrize("mix", MIXES)
def test_gradients_are_those_of_the_definition(mix):
    q, k, v, mixer, mix_logit = make_inputs(SHAPE, grad=True)
    sink = SINK[[0, 1, 2, 0]].clone().requires_grad_(True)
    own = {"soft_cap": 1.5, "sink_logit": sink}
    given = (q, k, v, None, None) if mix == "none" else (q, k, v, mixer, mix_logit)
    leaves = [q, k, v, sink] + ([] if mix == "none" else [mix_logit, *mixer.parameters()])
    out = near_far_attention(*given, **options(mix, "both") | own)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    got = torch.autograd.grad((out * weight).sum(), leaves)
    expected = torch.autograd.grad((by_maps(q, k, v, mixer, mix_logit, mix, **own) * weight).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b)
        assert bool(b.any())


def test_beside_a_recurrent_state():
    q, k, v, _, mix_logit = make_inputs(SHAPE)
    mixer = Gla(4, 2, 6).double()
    wide = [torch.cat([x, x], dim=-1) for x in (q, k)]
    near = by_maps(q, k, v, None, None, "none", **OWN["both"])
    with torch.no_grad():
        state = near_far_attention(*wide, v, mixer, torch.full((4,), 1e9).double(), **options("gate", "both"))
        expected = torch.lerp(near, state, mix_logit.sigmoid()[..., None])
        assert_near(near_far_attention(*wide, v, mixer, mix_logit, **options("gate", "both")), expected)
        assert_near(in_steps([9] + [1] * 12, *wide, v, mixer, mix_logit, **options("gate", "both"))[0], expected)


@pytest.mark.parametrize("own", OWN)
def test_what_transfer_measures(own):
    q, k, v, mixer, _ = make_inputs(SHAPE)
    group = q.shape[1] // k.shape[1]
    values = v.repeat_interleave(group, 1)
    _, near, far, sink = parts(q, k, **OWN[own])
    near_out, near_lse, far_out, far_lse = split_attention(q, k, v, window=WINDOW, sinks=SINKS, **OWN[own])
    total = near.sum(-1, keepdim=True) + sink
    assert_near(near_out, near @ values / total)
    assert_near(near_lse, total.squeeze(-1).log())
    some = far.sum(-1) > 0
    assert_near(far_lse[some], far.sum(-1).log()[some])
    assert_near(far_out[some], (far @ values / far.sum(-1, keepdim=True))[some])
    documents = lay_out_documents([0, 21, 42], 2, 21, q.device)
    for a, b in zip(
        split_attention(q, k, v, window=WINDOW, sinks=SINKS, documents=documents, **OWN[own]),
        (near_out, near_lse, far_out, far_lse),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    soft_cap = OWN[own].get("soft_cap")
    phi_q = mixer.query_features(q).detach().requires_grad_(True)
    phi_k = mixer.key_features(k).detach().requires_grad_(True)
    given = {"window": WINDOW, "sinks": SINKS, "soft_cap": soft_cap}
    divergence, log_mass = far_divergence(q, k, far_lse, phi_q, phi_k, **given)
    mass = phi_q @ phi_k.repeat_interleave(group, 1).transpose(-1, -2) * (far > 0)
    n = mass.sum(-1, keepdim=True).clamp_min(1e-300)
    p = far / far.sum(-1, keepdim=True).clamp_min(1e-300)
    truth = (p * (p.clamp_min(1e-300).log() + n.log() - torch.where(far > 0, mass, 1.0).log())).sum(-1)
    assert_near(divergence[some], truth[some])
    assert_near(log_mass[some], n.squeeze(-1).log()[some])
    for a, b in zip(*(torch.autograd.grad(x[some].sum(), (phi_q, phi_k)) for x in (divergence, truth)), strict=True):
        assert_near(a, b)


class TestRefusals:
    def test_by_the_kernels(self, monkeypatch):
        """Named, or left to PyTorch by "auto", with one line that says why."""
        q, k, v, _, _ = make_inputs(SHAPE, torch.float32)
        given, logged = {"window": WINDOW, "sinks": SINKS}, []
        monkeypatch.setattr(backends, "triton_obstacle", lambda q, v, num_features: None)
        calls = [
            (lambda own: near_far_attention(q, k, v, **given, **own, backend="triton"), OWN),
            (lambda own: split_attention(q, k, v, **given, **own, backend="triton"), OWN),
            (
                lambda own: near_far_step(q, k, v, Memory.empty(k, v, None, **given), **given, **own, backend="triton"),
                OWN,
            ),
            (
                lambda own: far_divergence(q, k, q[..., 0], q.exp(), k.exp(), **given, **own, backend="triton"),
                {"cap": OWN["cap"]},
            ),
        ]
        why = {"cap": "no soft cap of logits", "sink": "no learned sinks", "both": "no soft cap of logits"}
        for call, cases in calls:
            for name, own in cases.items():
                with pytest.raises(LinearizeError, match=f"'triton' cannot run here: they know {why[name]}; use"):
                    call(own)
        monkeypatch.setattr(backends, "log_once", logged.append)
        on_gpu = torch.empty(1, 4, 1, 6, device="meta")
        assert backends.choose_backend("auto", on_gpu, on_gpu, 0, "they know no soft cap of logits") == "torch"
        assert logged == ["near-and-far attention runs in PyTorch on meta: they know no soft cap of logits"]

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ({"soft_cap": 0.0}, "soft_cap 0.0 is not above 0; use None for no cap"),
            ({"sink_logit": torch.zeros(2)}, r"sink_logit has shape \(2,\) on cpu; it needs \(4,\), one a query head"),
        ],
    )
    def test_of_values(self, own, message):
        q, k, v, _, _ = make_inputs(SHAPE)
        given = {"window": WINDOW, "sinks": SINKS, **own}
        with pytest.raises(LinearizeError, match=f"near_far_attention: {message}"):
            near_far_attention(q, k, v, **given)
        with pytest.raises(LinearizeError, match=f"near_far_step: {message}"):
            near_far_step(q, k, v, Memory.empty(k, v, None, window=WINDOW, sinks=SINKS), **given)
