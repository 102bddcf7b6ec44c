"""Negative controls of `test_kernels_triton.py`: kernels with one line wrong do not pass its comparison."""

import pytest
import torch

from linearize.kernels.near_far import triton_backward, triton_forward, triton_near_far
from tests.mutations import mutated, replace_kernels
from tests.test_kernels_triton import check

pytestmark = pytest.mark.interpret

# length, window, sinks, size, features, group, dtype, far, padding
CASE = (65, 16, 4, 16, 16, 3, torch.float32, "normalizer", "left")
GATE = (65, 16, 4, 16, 16, 3, torch.float32, "gate", "left")

FORWARD = {
    "a key of the future": ("((i - past)[None, :] <= t[:, None])", "((i - past)[None, :] <= t[:, None] + 1)"),
    "own key missing": ("((i - past)[None, :] <= t[:, None])", "((i - past)[None, :] < tl.maximum(t, 1)[:, None])"),
    "chunk before missing": ("past = tl.where(local > 0, WINDOW, 0)", "past = tl.where(local > 99, WINDOW, 0)"),
    "sinks counted twice": (
        "shown = tl.minimum(tl.load(entry + SINK_COUNT), (chunk - 1) * WINDOW)",
        "shown = tl.minimum(tl.load(entry + SINK_COUNT), chunk * WINDOW)",
    ),
    "sinks in the state": ("a = (there & (position + t >= SINKS)).to(ACC)", "a = there.to(ACC)"),
    "state one chunk too new": (
        "base = ((p - 1).to(tl.int64) * KV_HEADS + head) * F",
        "base = (p.to(tl.int64) * KV_HEADS + head) * F",
    ),
    "sum before storing": ("total += new", "total += 2 * new"),
    "far mass not rescaled": ("total = total * shrink + share", "total = total + share"),
    "far value not rescaled": (
        "acc = acc * shrink[:, None]\n                factor = share / safe",
        "factor = share / safe",
    ),
    "mix of another head": ("tl.load(mixes + g * mix_head", "tl.load(mixes + (g // 2) * mix_head"),
    "features of another head": (
        "own = there & (group_of_row == g)",
        "own = there & (group_of_row == high - g + low)",
    ),
    "query of another head": (
        "g = r // WINDOW\n    t = r % WINDOW",
        "g = tl.minimum(r // WINDOW, 1)\n    t = r % WINDOW",
    ),
    "minus features as plus": ("p * sign, -float", "p * tl.abs(sign), -float"),
}
BACKWARD = {
    "delta missing": ("delta = tl.sum(do.to(ACC) * o.to(ACC), 1)", "delta = tl.sum(do.to(ACC) * o.to(ACC), 1) * 0"),
    "far delta of the norm": ("norm_factor = -w * far_delta", "norm_factor = -w"),
    "softmax of features": ("features * (y - part[:, None])", "features * y"),
    "next chunk's queries missing": ("tl.where(follows, tl.load", "tl.where(follows & (tokens < 0), tl.load"),
    "scale missing": (
        "change = weights * (near[None, :] * change - error[None, :]) * scale",
        "change = weights * (near[None, :] * change - error[None, :])",
    ),
    "only the last head": ("for g in range(0, GROUP):", "for g in range(GROUP - 1, GROUP):"),
    "far part of dv missing": ("dv_acc += tl.load(dv_far", "dv_acc += 0 * tl.load(dv_far"),
    "sinks of one chunk missing": ("range((sink // WINDOW + 2) * TILES", "range((sink // WINDOW + 3) * TILES"),
    "sinks' keys in the state": (
        "kept = stored & (tl.load(entry + CHUNK) * WINDOW + j >= SINKS)",
        "kept = stored",
    ),
}
GATED = {
    "near share forgotten": ("near = near * tl.where(some", "near = near * tl.where(some & (n < 0)"),
    "delta of both sides": ("error = near * (delta - w * n * far_delta)", "error = near * delta"),
}
REVERSED = {
    "one chunk too many": ("            total += pending\n            pending = new", "            total += new")
}


def run(case, module, change, monkeypatch, tmp_path, device):
    mutant = mutated(module, *change, tmp_path)
    replace_kernels(monkeypatch, triton_near_far, mutant, module)
    with pytest.raises(AssertionError):
        check(case, device)


class TestMutants:
    @pytest.mark.parametrize("case", [CASE, GATE], ids=["normalizer", "gate"])
    def test_the_case_itself_is_right(self, case, device):
        check(case, device)

    @pytest.mark.parametrize("change", FORWARD.values(), ids=FORWARD)
    def test_forward(self, change, monkeypatch, tmp_path, device):
        run(CASE, triton_forward, change, monkeypatch, tmp_path, device)

    @pytest.mark.parametrize("change", REVERSED.values(), ids=REVERSED)
    def test_sums_from_the_end(self, change, monkeypatch, tmp_path, device):
        run(CASE, triton_forward, change, monkeypatch, tmp_path, device)

    @pytest.mark.parametrize("change", BACKWARD.values(), ids=BACKWARD)
    def test_backward(self, change, monkeypatch, tmp_path, device):
        run(CASE, triton_backward, change, monkeypatch, tmp_path, device)

    @pytest.mark.parametrize("change", GATED.values(), ids=GATED)
    def test_backward_of_the_gate(self, change, monkeypatch, tmp_path, device):
        run(GATE, triton_backward, change, monkeypatch, tmp_path, device)
