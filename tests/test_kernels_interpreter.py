"""The interpreter that kernels are tested in is itself right: against numpy and PyTorch, and against Triton's own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests import interpreter
from tests.interpreter_memory import round_bfloat16

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter.install()
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported"),
]
ROOT = Path(__file__).resolve().parents[1]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ALL = (*FLOATS, torch.int32, torch.int64)
OPERATORS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "where": lambda x, y: torch.where(x < y, x, y),
    "scalar": lambda x, y: 3 - x * 2 + y,
}
SPECIAL = (0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, 65504.0)


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    """Random values over many magnitudes, with the special ones among them."""
    if not dtype.is_floating_point:
        return torch.randint(-1000, 1000, shape).to(dtype)
    x = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-3, 4, shape)
    if x.numel() > 100:
        x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)
    return x.to(dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


# --- operators and types -----------------------------------------------------------------------------------------


@triton.jit
def operator_kernel(X, Y, Z, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    y = tl.load(Y + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "lt":
        z = x < y
    elif OP == "le":
        z = x <= y
    elif OP == "gt":
        z = x > y
    elif OP == "ge":
        z = x >= y
    elif OP == "eq":
        z = x == y
    elif OP == "ne":
        z = x != y
    elif OP == "where":
        z = tl.where(x < y, x, y)
    else:
        z = 3 - x * 2 + y
    tl.store(Z + i, z)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    x, y = values(dtype, 512), values(dtype, 512)
    y[100:200] = x[100:200]
    expected = OPERATORS[name](x, y)
    actual = torch.empty_like(expected)
    operator_kernel[(1,)](x, y, actual, OP=name, N=512)
    assert_same(actual, expected)


@triton.jit
def cast_kernel(X, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Z + i, tl.load(X + i).to(Z.dtype.element_ty))


@pytest.mark.parametrize("source", ALL, ids=str)
@pytest.mark.parametrize("target", ALL, ids=str)
def test_casts_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    x = values(source, 1024)
    if not target.is_floating_point:
        x = torch.where(x.isfinite() & (x.abs() < 2e9), x, 0) if source.is_floating_point else x
    out = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](x, out, N=1024)
    assert_same(out, x.to(target))


def test_bfloat16_rounding_over_all_kinds_of_bits() -> None:
    bits = torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32)
    bits[: 2**16] = (bits[: 2**16] & ~0xFFFF) | 0x8000  # ties
    x = bits.view(torch.float32)
    assert_same(torch.from_numpy(round_bfloat16(x.numpy()).copy()), x.bfloat16().float())


@triton.jit
def truncate_kernel(X, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Z + i, tl.load(X + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def bits_kernel(X, Z, BACK, N: tl.constexpr):
    i = tl.arange(0, N)
    bits = tl.load(X + i).to(tl.int16, bitcast=True)
    tl.store(Z + i, bits)
    tl.store(BACK + i, bits.to(tl.bfloat16, bitcast=True))


def test_bfloat16_bits() -> None:
    x = torch.randn(256)
    out = torch.empty(256, dtype=torch.bfloat16)
    truncate_kernel[(1,)](x, out, N=256)
    assert torch.equal(out.view(torch.int16).int(), x.view(torch.int32) >> 16)
    bits, back = torch.empty(256, dtype=torch.int16), torch.empty(256, dtype=torch.bfloat16)
    bits_kernel[(1,)](out, bits, back, N=256)
    assert torch.equal(bits, out.view(torch.int16))
    assert torch.equal(back, out)


@triton.jit
def functions_kernel(X, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Z + i, tl.exp(x))
    tl.store(Z + N + i, tl.log(x))
    tl.store(Z + 2 * N + i, tl.sqrt(x))
    tl.store(Z + 3 * N + i, tl.exp2(x))
    tl.store(Z + 4 * N + i, tl.fma(x, x, x))
    tl.store(Z + 5 * N + i, tl.abs(-x))
    tl.store(Z + 6 * N + i, tl.sigmoid(x))
    tl.store(Z + 7 * N + i, 1.0 / x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functions(dtype: torch.dtype) -> None:
    x = values(dtype, 256)
    out = torch.empty(8, 256, dtype=dtype)
    functions_kernel[(1,)](x, out, N=256)
    expected = [x.exp(), x.log(), x.sqrt(), x.exp2(), x * x + x, x.abs(), x.sigmoid(), 1 / x]
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-6, equal_nan=True)


@triton.jit
def bfloat16_kernel(X, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(Z + i, tl.fma(x, x, x))
    tl.store(Z + N + i, tl.abs(x))
    tl.store(Z + 2 * N + i, -x)
    tl.store(Z + 3 * N + i, tl.full([N], 0.3, tl.bfloat16) + x * 0.1)


def test_bfloat16_beyond_operators() -> None:
    x = torch.randn(256).bfloat16()
    out = torch.empty(4, 256, dtype=torch.bfloat16)
    bfloat16_kernel[(1,)](x, out, N=256)
    fma = (x.double() * x.double() + x.double()).float().bfloat16()
    tenth, third = torch.tensor(0.1).bfloat16(), torch.tensor(0.3).bfloat16()
    for actual, expected in zip(out, (fma, x.abs(), -x, third + x * tenth)):
        assert torch.equal(actual, expected)


@triton.jit
def mixed_kernel(I, J, H, F, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(I + i)
    b = tl.load(J + i)
    tl.store(Z + i, (a + b) * 3)
    tl.store(Z + N + i, (a // 7) + (b % 5))
    tl.store(Z + 2 * N + i, tl.load(H + i) * tl.load(F + i))
    tl.store(Z + 3 * N + i, a / 4)
    tl.store(Z + 4 * N + i, tl.maximum(a, b) - tl.minimum(a, 3))
    tl.store(Z + 5 * N + i, tl.where((a > 0) & (b > 0) | (a == b), 1.0, 0.0))


def test_mixed_types_and_integers_as_in_c() -> None:
    i, j = values(torch.int32, 256), values(torch.int64, 256)
    h, f = torch.randn(256).half(), torch.randn(256)
    out = torch.empty(6, 256, dtype=torch.float64)
    mixed_kernel[(1,)](i, j, h, f, out, N=256)
    quotient = torch.div(i, 7, rounding_mode="trunc") + torch.fmod(j, 5)
    chosen = ((i > 0) & (j > 0)) | (i == j)
    expected = [
        (i + j) * 3,
        quotient,
        h.float() * f,
        i.float() / 4,
        torch.maximum(i.long(), j) - i.clamp_max(3),
        chosen,
    ]
    assert torch.equal(out, torch.stack([x.double() for x in expected]))


# --- products, reductions, scans ---------------------------------------------------------------------------------


@triton.jit
def dot_kernel(A, B, C, D, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + n[:, None] * K + k[None, :])
    at = m[:, None] * N + n[None, :]
    tl.store(C + at, tl.dot(a, tl.trans(b), out_dtype=OUT))
    tl.store(D + at, tl.dot(a, tl.trans(b), tl.load(D + at), out_dtype=OUT))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_accumulates_wide(dtype: torch.dtype) -> None:
    a, b = torch.randn(32, 64).to(dtype), torch.randn(16, 64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out, added = torch.empty(32, 16, dtype=wide), torch.ones(32, 16, dtype=wide)
    dot_kernel[(1,)](a, b, out, added, M=32, N=16, K=64, OUT=tl.float64 if wide == torch.float64 else tl.float32)
    expected = a.double() @ b.double().mT
    tolerance = 1e-12 if wide == torch.float64 else 2e-5
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(added.double(), expected + 1, rtol=0, atol=tolerance)


def test_dot_needs_16_terms_as_compiled() -> None:
    x = torch.ones(16, 8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="K >= 16"):
        dot_kernel[(1,)](x, x, torch.empty(16, 16), torch.empty(16, 16), M=16, N=16, K=8, OUT=tl.float32)


@triton.jit
def reduce_kernel(X, SUM, MAX, MIN, ALL, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(X + m[:, None] * N + n[None, :])
    tl.store(SUM + m, tl.sum(x, 1))
    tl.store(MAX + n, tl.max(x, axis=0))
    tl.store(MIN + m[:, None], tl.min(x, 1, keep_dims=True))
    tl.store(ALL, tl.sum(x))


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_reductions(dtype: torch.dtype) -> None:
    x = torch.randn(16, 32).mul(8).to(dtype)
    if dtype.is_floating_point:
        x[3, 4] = float("-inf")
        x[5, 6] = float("nan")
    out = [torch.empty(n, dtype=dtype) for n in (16, 32, 16, 1)]
    reduce_kernel[(1,)](x, *out, M=16, N=32)
    wide = x.double()
    largest = wide.nan_to_num(float("-inf"), neginf=float("-inf")).amax(0)  # a NaN loses, as fmax has it
    smallest = wide.nan_to_num(float("inf"), neginf=float("-inf")).amin(1)
    rtol = {torch.bfloat16: 2**-8, torch.float16: 1e-2, torch.float32: 1e-5}.get(dtype, 1e-12)
    for actual, expected in zip(out, (wide.sum(1), largest, smallest, wide.sum().reshape(1))):
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=10 * rtol, equal_nan=True)


@triton.jit
def softmax_pair(m, l, n, k):
    top = tl.maximum(m, n)
    return top, l * tl.exp(m - top) + k * tl.exp(n - top)


@triton.jit
def decay(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def custom_kernel(X, G, LSE, SCAN, BACK, COUNT, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    at = m[:, None] * N + n[None, :]
    x, g = tl.load(X + at), tl.load(G + at)
    top, total = tl.reduce((x, tl.full([M, N], 1.0, tl.float32)), 1, softmax_pair)
    tl.store(LSE + m, top + tl.log(total))
    _, state = tl.associative_scan((g, x), 1, decay)
    tl.store(SCAN + at, state)
    _, state = tl.associative_scan((g, x), 0, decay, reverse=True)
    tl.store(BACK + at, state)
    tl.store(COUNT + at, tl.cumsum(x, 1))


def test_custom_reductions_and_scans() -> None:
    x, g = torch.randn(8, 32), torch.rand(8, 32)
    lse, scan, back, count = torch.empty(8), *(torch.empty(8, 32) for _ in range(3))
    custom_kernel[(1,)](x, g, lse, scan, back, count, M=8, N=32)
    forward, reverse = [torch.zeros(8)], [torch.zeros(32)]
    for t in range(32):
        forward.append(forward[-1] * g[:, t] + x[:, t])
    for m in reversed(range(8)):
        reverse.append(reverse[-1] * g[m] + x[m])
    torch.testing.assert_close(lse, x.logsumexp(1))
    torch.testing.assert_close(scan, torch.stack(forward[1:], 1))
    torch.testing.assert_close(back, torch.stack(reverse[:0:-1], 0))
    torch.testing.assert_close(count, x.cumsum(1))


# --- memory ------------------------------------------------------------------------------------------------------


@triton.jit
def memory_kernel(X, Y, Z, count, N: tl.constexpr, BLIND: tl.constexpr):
    i = tl.arange(0, N)
    if BLIND:
        z = tl.load(X + i, mask=i < count)
    else:
        z = tl.load(tl.where(i % 2 == 0, X, Y) + i, mask=i < count, other=-1.0)
    tl.store(Z + i, z, mask=i < N - 1)
    if count == 3:
        return
    tl.store(Z + N - 1, tl.load(X) + tl.load(Y + 1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masks_and_several_tensors(dtype: torch.dtype) -> None:
    x, y, out = values(dtype, 16), values(dtype, 16), torch.zeros(16, dtype=dtype)
    memory_kernel[(1,)](x, y, out, 10, N=16, BLIND=False)
    expected = torch.where(torch.arange(16) % 2 == 0, x, y)
    expected[10:] = -1
    expected[15] = x[0] + y[1]
    assert_same(out, expected)


def test_early_return_and_what_is_undefined() -> None:
    x, out = torch.ones(16), torch.zeros(16)
    memory_kernel[(1,)](x, x, out, 3, N=16, BLIND=True)
    assert torch.equal(out[:3], torch.ones(3))
    assert bool(out[3:15].isnan().all())
    assert out[15] == 0


def test_access_outside_of_the_tensors_is_an_error() -> None:
    x = torch.ones(15)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="1 of 16 pointers are outside"):
        cast_kernel[(1,)](x, torch.empty(16), N=16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="outside"):
        cast_kernel[(1,)](torch.ones(16), x, N=16)


# --- the language around it --------------------------------------------------------------------------------------


@triton.jit
def twice(x, FACTOR: tl.constexpr):
    return x * FACTOR


@triton.jit
def loop_kernel(Z, steps, N: tl.constexpr):
    total = tl.zeros([N], tl.int64)
    for n in range(tl.program_id(0), steps, 2):
        total += n.to(tl.int64) * 2**31
    for n in tl.range(0, 3):
        total += n
    for n in tl.static_range(2):
        total += twice(n, 2)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * N + tl.arange(0, N)
    tl.store(Z + at, total)


def test_loops_grids_and_device_functions() -> None:
    out = torch.empty(2, 3, 4, dtype=torch.int64)
    loop_kernel[(2, 3)](out, 7, N=4)
    assert out[0].unique().item() == 12 * 2**31 + 5
    assert out[1].unique().item() == 9 * 2**31 + 5


@triton.autotune(configs=[triton.Config({"N": 8}), triton.Config({"N": 16}, num_warps=8)], key=["count"])
@triton.heuristics({"EVEN": lambda arguments: arguments["count"] % 2 == 0})
@triton.jit
def tuned_kernel(Z, count, N: tl.constexpr, EVEN: tl.constexpr):
    tl.store(Z, N)
    tl.store(Z + 1, tl.where(EVEN, 1, 0))


def test_autotune_takes_the_first_configuration() -> None:
    out = torch.zeros(2, dtype=torch.int32)
    tuned_kernel[(1,)](out, 4)
    assert out.tolist() == [8, 1]


def test_arguments_that_do_not_exist_are_refused() -> None:
    with pytest.raises(TypeError, match="no argument blocks"):
        cast_kernel[(1,)](torch.ones(16), torch.ones(16), N=16, blocks=2)


def test_install_again_changes_nothing() -> None:
    before = tl.load, tl.tensor.__add__
    interpreter.install()
    assert (tl.load, tl.tensor.__add__) == before


# --- processes of their own --------------------------------------------------------------------------------------


def process(code: str, *arguments: str, interpret: str = "1") -> str:
    env = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install_does_nothing_without_the_variable() -> None:
    code = "import sys; from tests import interpreter as i; i.install(); print('triton' in sys.modules, i._installed)"
    assert process(code, interpret="0").split() == ["False", "False"]


STOCK = """
import sys, numpy as np, torch
import tests.interpreter as shims
if sys.argv[1] == "stock":
    shims.install = lambda: None
from tests import test_kernels_interpreter as t
out = {}
for dtype in (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64):
    torch.manual_seed(1)
    x, y = t.values(dtype, 512), t.values(dtype, 512)
    for name in t.OPERATORS:
        z = torch.empty_like(t.OPERATORS[name](x, y))
        t.operator_kernel[(1,)](x, y, z, OP=name, N=512)
        out[f"{dtype} {name}"] = z.numpy()
    sums = [torch.empty(n, dtype=dtype) for n in (16, 32, 16, 1)]
    t.reduce_kernel[(1,)](x, *sums, M=16, N=32)
    out |= {f"{dtype} reduce {i}": z.numpy() for i, z in enumerate(sums)}
i, j = t.values(torch.int32, 256), t.values(torch.int64, 256)
z = torch.empty(6, 256, dtype=torch.float64)
t.mixed_kernel[(1,)](i, j, torch.randn(256).half(), torch.randn(256), z, N=256)
out["mixed"] = z.numpy()
x = t.values(torch.float32, 256)
z = torch.empty(8, 256)
t.functions_kernel[(1,)](x, z, N=256)
out["functions"] = z.numpy()
np.savez(sys.argv[2], **out)
"""


def test_same_bits_as_the_interpreter_that_triton_ships(tmp_path: Path) -> None:
    process(STOCK, "stock", str(tmp_path / "stock.npz"))
    process(STOCK, "shims", str(tmp_path / "shims.npz"))
    stock, shims = np.load(tmp_path / "stock.npz"), np.load(tmp_path / "shims.npz")
    assert set(stock) == set(shims)
    assert len(stock) == 5 * (len(OPERATORS) + 4) + 2
    for name in stock:
        np.testing.assert_array_equal(stock[name], shims[name], err_msg=name)
