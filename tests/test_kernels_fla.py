"""Decaying and delta-rule states at the borders of chunks, and flash-linear-attention as peer and engine."""

import importlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.kernels import fla_engine
from linearize.kernels.fla_engine import (
    decayed_states,
    delta_states,
    gated_delta_rule,
    gated_states,
    gla,
    simple_gla,
)
from tests.interpreter import install
from tests.tolerance import assert_near, worst

# batch, H, K, T, F, V
SHAPE = (2, 6, 2, 37, 6, 5)
KINDS = ("per head", "per token", "gated", "delta")
STATES = {"per head": decayed_states, "per token": decayed_states, "gated": gated_states, "delta": delta_states}
OUTPUTS = {"per head": simple_gla, "per token": simple_gla, "gated": gla, "delta": gated_delta_rule}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> None:
    install()


def make_inputs(kind: str, shape=SHAPE, dtype=torch.float64, device="cpu") -> dict[str, Tensor]:
    """q, k, v, the gates of a kind and a state, by the names of the arguments."""
    batch, heads, kv_heads, length, features, size = shape
    generator = torch.Generator().manual_seed(1)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    decays = {"per head": (kv_heads,), "gated": (batch, kv_heads, length, features)}
    inputs = {
        "q": normal(batch, heads, length, features),
        "k": F.normalize(normal(batch, kv_heads, length, features), dim=-1),
        "v": normal(batch, kv_heads, length, size),
        "log_decay": F.logsigmoid(1 + normal(*decays.get(kind, (batch, kv_heads, length)))),
        "state": normal(batch, kv_heads, features, size),
    }
    if kind == "delta":
        inputs["beta"] = 2 * normal(batch, kv_heads, length).sigmoid()
    return {name: x.to(device, dtype) for name, x in inputs.items()}


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name not in names}


def token_by_token(k, v, log_decay, state=None, beta=None, q=None) -> Tensor:
    """The definition in float64: the states before the first token and after each, (B, K, T + 1, F, V)."""
    k, v, log_decay = k.double(), v.double(), log_decay.double()
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state.double()
    a = log_decay.exp()
    a = a[None, :, None, None] if a.ndim == 1 else a.reshape(*k.shape[:3], -1)
    a = a.expand(*k.shape[:3], a.shape[-1])
    states = [state]
    for t in range(k.shape[2]):
        key, value, decayed = k[:, :, t, :, None], v[:, :, t, None, :], a[:, :, t, :, None] * states[-1]
        if beta is not None:
            value = beta.double()[:, :, t, None, None] * (value - key.transpose(-1, -2) @ decayed)
        states.append(decayed + key * value)
    return torch.stack(states, dim=2)


def at_borders(states: Tensor, chunk: int) -> Tensor:
    last = states.shape[2] - 1
    return states[:, :, [*range(0, last, chunk), last]]


def read(states: Tensor, q: Tensor, scale: float) -> Tensor:
    """scale S_t^T q_t: the states after each token, read by the heads of the group."""
    group = q.shape[1] // states.shape[1]
    return scale * (states[:, :, 1:].repeat_interleave(group, 1).transpose(-1, -2) @ q.double()[..., None])[..., 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 1), (1, 16), (12, 4), (13, 4), (16, 16), (37, 16), (9, 128), (300, 128), (9, 1)]
)
@pytest.mark.parametrize("start", [True, False], ids=["state", "empty"])
def test_states_at_the_borders(kind: str, length: int, chunk: int, start: bool) -> None:
    inputs = without(make_inputs(kind, (2, 6, 2, length, 6, 5)), "q", *(() if start else ("state",)))
    states = STATES[kind](**inputs, chunk=chunk)
    assert_near(states, at_borders(token_by_token(**inputs), chunk))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 130])
def test_outputs_of_grouped_queries(kind: str, length: int) -> None:
    inputs = make_inputs(kind, (2, 6, 2, length, 6, 5))
    out, last = OUTPUTS[kind](**inputs)
    states = token_by_token(**inputs)
    assert_near(out, read(states, inputs["q"], 6**-0.5))
    assert_near(last, states[:, :, -1])
    assert_near(OUTPUTS[kind](**without(inputs, "state"), scale=0.3)[0], read_empty(inputs, 0.3))


def read_empty(inputs: dict[str, Tensor], scale: float) -> Tensor:
    return read(token_by_token(**without(inputs, "state")), inputs["q"], scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_pieces(kind: str) -> None:
    inputs = without(make_inputs(kind), "q")
    whole = STATES[kind](**inputs, chunk=8)
    first, rest = ({n: piece(n, x) for n, x in inputs.items()} for piece in (_until(16), _since(16)))
    before = STATES[kind](**first, chunk=8)
    after = STATES[kind](**{**rest, "state": before[:, :, -1]}, chunk=8)
    assert_near(torch.cat([before[:, :, :-1], after], dim=2), whole)


def _until(t: int):
    return lambda name, x: x if name == "state" or x.ndim == 1 else x[:, :, :t]


def _since(t: int):
    return lambda name, x: x if name == "state" or x.ndim == 1 else x[:, :, t:]


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind: str) -> None:
    inputs = make_inputs(kind, (2, 6, 2, 0, 6, 5))
    states = STATES[kind](**without(inputs, "q"), chunk=4)
    assert torch.equal(states, inputs["state"][:, :, None])
    out, last = OUTPUTS[kind](**inputs)
    assert out.shape == (2, 6, 0, 5)
    assert torch.equal(last, inputs["state"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, -1e-4, -30.0, -torch.inf, "mixed"])
def test_extreme_decays_in_float32(kind: str, decay: float | str) -> None:
    """The decay of 1e-4 a token right after one of -30 is the digit that a difference of cumulative sums would lose."""
    inputs = make_inputs(kind, (1, 2, 2, 100, 6, 5), torch.float32)
    log_decay = inputs["log_decay"]
    if decay == "mixed":
        choice = torch.arange(log_decay.numel()).reshape(log_decay.shape) // (6 if kind == "gated" else 1)
        log_decay = torch.where(choice % 50 < 25, -30.0, -1e-4)
    else:
        log_decay = torch.full_like(log_decay, decay)
    inputs["log_decay"] = log_decay
    truth = token_by_token(**inputs)
    states = STATES[kind](**without(inputs, "q"), chunk=64)
    out, last = OUTPUTS[kind](**inputs)
    assert_near(states, at_borders(truth, 64).float())
    assert_near(last, truth[:, :, -1].float())
    assert_near(out, read(truth, inputs["q"], 6**-0.5).float())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_a_decay_empties_the_state(kind: str) -> None:
    inputs = make_inputs(kind, (1, 2, 2, 20, 6, 5))
    inputs["log_decay"] = torch.where(torch.arange(inputs["log_decay"].numel()) % 7 == 0, -torch.inf, -0.1).reshape(
        inputs["log_decay"].shape
    )
    inputs = {name: x.double().requires_grad_() for name, x in inputs.items()}
    out, last = OUTPUTS[kind](**inputs)
    truth = token_by_token(**inputs)
    expected = torch.autograd.grad(
        (read(truth, inputs["q"], 6**-0.5).sum() + truth[:, :, -1].sum()), [*inputs.values()]
    )
    for got, want in zip(torch.autograd.grad(out.sum() + last.sum(), [*inputs.values()]), expected):
        assert_near(got, want)


def test_delta_rule_with_zero_beta_only_decays() -> None:
    inputs = without(make_inputs("delta"), "q")
    inputs["beta"] = torch.zeros_like(inputs["beta"])
    states = delta_states(**inputs, chunk=16)
    total = at_borders(F.pad(inputs["log_decay"].cumsum(-1), (1, 0)), 16)
    assert_near(states, total.exp()[..., None, None] * inputs["state"][:, :, None])


def test_delta_rule_with_beta_one_stores_the_last_value() -> None:
    inputs = without(make_inputs("delta"), "q")
    inputs |= {"beta": torch.ones_like(inputs["beta"]), "log_decay": torch.zeros_like(inputs["log_decay"])}
    last = delta_states(**inputs, chunk=16)[:, :, -1]
    assert_near((last.transpose(-1, -2) @ inputs["k"][:, :, -1, :, None])[..., 0], inputs["v"][:, :, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in make_inputs(kind, (1, 2, 1, 5, 2, 3)).items()}
    names = [*inputs]
    assert torch.autograd.gradcheck(
        lambda *x: STATES[kind](**without(dict(zip(names, x)), "q"), chunk=2), [*inputs.values()], fast_mode=False
    )
    assert torch.autograd.gradcheck(lambda *x: OUTPUTS[kind](**dict(zip(names, x))), [*inputs.values()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(kind: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(kind, dtype=dtype)
    wide = {name: x.float() for name, x in inputs.items()}
    states = STATES[kind](**without(inputs, "q"), chunk=16)
    assert torch.equal(states, STATES[kind](**without(wide, "q"), chunk=16))
    (out, last), (wide_out, wide_last) = OUTPUTS[kind](**inputs), OUTPUTS[kind](**wide)
    assert torch.equal(out, wide_out.to(dtype))
    assert torch.equal(last, wide_last)


# Against fla's own PyTorch recurrences, which know neither grouped queries nor float64.

PEERS = {
    "per token": ("simple_gla", "naive_recurrent_simple_gla"),
    "gated": ("gla", "naive_recurrent_gla"),
    "delta": ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
    "per token, chunks": ("simple_gla", "naive_chunk_simple_gla"),
    "delta, chunks": ("gated_delta_rule", "naive_chunk_gated_delta_rule"),
}


def peer(case: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """fla's naive op on our layout."""
    module, name = PEERS[case]
    naive = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)
    group = inputs["q"].shape[1] // inputs["k"].shape[1]
    x = {n: t if n == "q" else t.repeat_interleave(group, 1) for n, t in inputs.items()}
    state = x.pop("state")
    x["gk" if module == "gla" else "g"] = x.pop("log_decay")
    x = {n: t.transpose(1, 2) for n, t in x.items()}
    out, last = naive(**x, initial_state=state, output_final_state=True)
    return out.transpose(1, 2), last[:, ::group]


@pytest.mark.parametrize("case", PEERS)
def test_parity_with_fla(case: str) -> None:
    """Outputs, the last state and every gradient, at a length that is no multiple of a chunk."""
    pytest.importorskip("fla")
    kind = case.split(",")[0]
    inputs = {name: x.requires_grad_() for name, x in make_inputs(kind, dtype=torch.float32).items()}
    out, last = OUTPUTS[kind](**inputs)
    peer_out, peer_last = peer(case, inputs)
    assert_near(out, peer_out)
    assert_near(last, peer_last)
    borders = STATES[kind](**without(inputs, "q"), chunk=16)
    assert_near(borders[:, :, -1], peer_last)

    weight_out, weight_last = torch.randn_like(out), torch.randn_like(last)
    losses = [(o * weight_out).sum() + (s * weight_last).sum() for o, s in ((out, last), (peer_out, peer_last))]
    ours, theirs = (torch.autograd.grad(loss, [*inputs.values()], retain_graph=True) for loss in losses)
    for got, want in zip(ours, theirs):
        assert_near(got, want)

    tensors = [x for name, x in inputs.items() if name != "q"]
    ours, theirs = (
        torch.autograd.grad((s * weight_last).sum(), tensors, retain_graph=True) for s in (borders[:, :, -1], peer_last)
    )
    for got, want in zip(ours, theirs):
        assert_near(got, want)


# The choice of an engine.


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs fla's kernels on the CPU")
@pytest.mark.parametrize("kind", KINDS)
def test_fla_on_a_cpu_is_an_error(kind: str) -> None:
    inputs = make_inputs(kind, dtype=torch.float32)
    with pytest.raises(LinearizeError, match="k is on cpu, and fla's kernels need a CUDA or ROCm device; use backend="):
        OUTPUTS[kind](**inputs, backend="fla")
    with pytest.raises(LinearizeError, match="k is on cpu"):
        STATES[kind](**without(inputs, "q"), chunk=16, backend="fla")


def test_on_a_cpu_fla_and_triton_are_not_imported() -> None:
    code = (
        "import sys, torch\n"
        "from linearize.kernels.fla_engine import decayed_states\n"
        "x = torch.ones(1, 1, 4, 2)\n"
        "decayed_states(x, x, torch.zeros(1), chunk=2)\n"
        "print([name for name in ('fla', 'triton', 'transformers') if name in sys.modules])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_what_keeps_fla_from_running(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fla_engine, "_interpreted", lambda: True)
    with pytest.raises(LinearizeError, match=r"k is torch\.float64"):
        decayed_states(**without(make_inputs("per head"), "q"), chunk=16, backend="fla")
    wide = without(make_inputs("delta", (1, 1, 1, 4, 300, 4), torch.float32), "q")
    with pytest.raises(LinearizeError, match="k has 300 features, and fla's delta rule takes at most 256"):
        delta_states(**wide, chunk=16, backend="fla")

    fla_engine._fla_ops.cache_clear()
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    inputs = without(make_inputs("per head", dtype=torch.float32), "q")
    with caplog.at_level(logging.WARNING, "linearize"):
        for _ in range(2):
            with pytest.raises(LinearizeError, match="flash-linear-attention cannot be imported"):
                decayed_states(**inputs, chunk=16, backend="fla")
    assert len(caplog.records) == 1
    fla_engine._fla_ops.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "precision", "chosen"),
    [
        (torch.bfloat16, "highest", True),
        (torch.float16, "highest", True),
        (torch.float32, "highest", False),
        (torch.float32, "high", True),
        (torch.float64, "high", False),
    ],
)
def test_auto_on_a_gpu(dtype: torch.dtype, precision: str, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla_engine, "_fla_ops", lambda: {"gla": None})
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        k = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 1, 8, 4), numel=lambda: 32)
        assert fla_engine._use_fla("gla", k, k, "auto") is chosen
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_leaves_gradients_of_states_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is off by one shows which form ran; asked for by name, it keeps PyTorch's gradient."""
    monkeypatch.setattr(fla_engine, "_use_fla", lambda *arguments: True)
    monkeypatch.setattr(fla_engine, "_additive_fla", lambda *x: fla_engine._additive_torch(*x) + 1)
    inputs = without(make_inputs("gated"), "q")
    plain = gated_states(**inputs, chunk=16, backend="auto")
    inputs["k"].requires_grad_()
    auto, engine = (gated_states(**inputs, chunk=16, backend=backend) for backend in ("auto", "fla"))
    assert torch.equal(plain, auto + 1)
    assert torch.equal(engine, auto + 1)
    weight = torch.randn_like(auto)
    gradients = [torch.autograd.grad(x, inputs["k"], weight)[0] for x in (auto, engine)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert torch.equal(gated_states(**inputs, chunk=16, backend="auto"), plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, 2, 37)}, r"k has shape \(2, 2, 37\); it needs 4 dimensions"),
        ({"v": torch.ones(2, 2, 36, 5)}, r"v has shape \(2, 2, 36, 5\); with k .* it needs \(2, 2, 37, 5\)"),
        ({"v": torch.ones(2, 2, 37, 5).double()}, r"v is torch\.float64 but k is torch\.float32"),
        ({"k": torch.ones(2, 2, 37, 6).long()}, r"k is torch\.int64; convert it to a float dtype"),
        ({"log_decay": torch.ones(3)}, r"log_decay has shape \(3,\); .* needs \(2, 2, 37\) or \(2,\)"),
        ({"state": torch.ones(2, 2, 5, 6)}, r"state has shape \(2, 2, 5, 6\); .* needs \(2, 2, 6, 5\)"),
        ({"chunk": 0}, "chunk 0 is no integer >= 1"),
        ({"chunk": 2.0}, r"chunk 2\.0 is no integer >= 1"),
        ({"backend": "triton"}, "backend 'triton' is unknown; known: auto, torch, fla"),
    ],
)
def test_errors_of_states(change: dict, message: str) -> None:
    inputs = {**without(make_inputs("per head", dtype=torch.float32), "q"), "chunk": 16} | change
    with pytest.raises(LinearizeError, match=f"^decayed_states: {message}"):
        decayed_states(**inputs)


def test_errors_of_other_kinds() -> None:
    gated, delta = (make_inputs(kind, dtype=torch.float32) for kind in ("gated", "delta"))
    with pytest.raises(LinearizeError, match=r"gated_states: log_decay has shape \(2,\); .* needs \(2, 2, 37, 6\)$"):
        gated_states(**without(gated, "q") | {"log_decay": torch.zeros(2)}, chunk=16)
    with pytest.raises(LinearizeError, match=r"delta_states: beta has shape \(2, 2\); .* needs \(2, 2, 37\)$"):
        delta_states(**without(delta, "q") | {"beta": torch.ones(2, 2)}, chunk=16)
    with pytest.raises(LinearizeError, match="gla: 5 query heads are no multiple of 2 key heads"):
        gla(**gated | {"q": torch.ones(2, 5, 37, 6)})
    with pytest.raises(LinearizeError, match=r"gated_delta_rule: q has shape .* needs \(2, 6, 37, 6\)"):
        gated_delta_rule(**delta | {"q": torch.ones(2, 6, 37, 8)})
    with pytest.raises(LinearizeError, match="state is on meta but k is on cpu"):
        gla(**gated | {"state": gated["state"].to("meta")})


# fla's kernels through the adapters.


def check_engine(kind: str, inputs: dict[str, Tensor], chunk: int, near) -> None:
    """States, outputs and every gradient by fla, each against PyTorch in float64."""
    truth = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def compare(call) -> None:
        got, want = call(inputs, "fla"), call(truth, "torch")
        weights = [torch.randn_like(x) for x in want]
        names = [name for name in inputs if name != "q" or call is outputs]
        losses = [sum((x * w.to(x.dtype)).sum() for x, w in zip(xs, weights)) for xs in (got, want)]
        gradients = [torch.autograd.grad(loss, [x[n] for n in names]) for loss, x in zip(losses, (inputs, truth))]
        for a, b in zip([*got, *gradients[0]], [*want, *gradients[1]]):
            near(a, b)

    def states(x, backend):
        return [STATES[kind](**without(x, "q"), chunk=chunk, backend=backend)]

    def outputs(x, backend):
        return OUTPUTS[kind](**x, backend=backend)

    compare(states)
    compare(outputs)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "chunk"), [(37, 16), (45, 20), (150, 70)])
def test_fla_interpreted(kind: str, length: int, chunk: int) -> None:
    """Chunks of one fla block, of a part of one (20 of 32), and of two (70 of 128)."""
    check_engine(
        kind,
        make_inputs(kind, (1, 4, 2, length, 16, 16), torch.float32),
        chunk,
        lambda got, want: assert_near(got, want.float()),
    )


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", KINDS)
def test_fla_interpreted_where_a_decay_empties_the_state(kind: str) -> None:
    inputs = make_inputs(kind, (1, 2, 2, 80, 16, 16), torch.float32)
    log_decay = inputs["log_decay"]
    emptied = torch.zeros_like(log_decay, dtype=torch.bool)
    emptied[0 if kind == "per head" else (..., 30, *[slice(None)] * (log_decay.ndim - 3))] = True
    inputs["log_decay"] = log_decay.masked_fill(emptied, -torch.inf)
    check_engine(kind, inputs, 64, lambda got, want: assert_near(got, want.float()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "chunk"), [(300, 64), (300, 100), (515, 256)])
def test_fla_on_a_gpu(kind: str, length: int, chunk: int) -> None:
    def near(got: Tensor, want: Tensor) -> None:
        # TF32 rounds each factor of a product by up to 2^-11; three roundings follow one another, so that a sum of
        # terms of either sign may be off by some 2^-9 of its largest terms, and a gradient by more.
        assert worst(got, want) <= 1e-2 * float(want.abs().max())

    check_engine(kind, make_inputs(kind, (2, 4, 2, length, 64, 64), torch.float32, "cuda"), chunk, near)
