"""The decode step: the ring of the near window in PyTorch, the Triton step against the formula, the bytes it moves.

Tests marked interpret run on a GPU where there is one, else in Triton's interpreter on the CPU.
"""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.kernels.devices import TARGETS
from linearize.kernels.launch import recording
from linearize.kernels.near_far import Hedgehog, Memory, Mixer, few_tokens, near_far_reference, near_far_step
from linearize.kernels.near_far import memory as memory_module
from linearize.kernels.near_far.few_tokens import fold, wide
from linearize.kernels.near_far.traffic import DecodeShape, decode_bytes, decode_flops, decode_work
from tests.mutations import mutated, replace_kernels
from tests.near_far_cases import FAR, Functional, far_options, hedgehog, make_inputs
from tests.test_kernels_triton import covering, plain
from tests.tolerance import assert_near, worst

interpret = pytest.mark.interpret


def memory_to(memory: Memory, device: torch.device | str) -> Memory:
    return memory.map(lambda x: x.to(device, copy=True))


class TestRing:
    """PyTorch alone."""

    # H, K, T, D, V, W, S, feature_dim; a row more than the batch's first is 3 tokens shorter.
    SHAPES = ((2, 1, 12, 4, 3, 1, 2, 4), (4, 2, 43, 4, 6, 4, 3, 5), (3, 3, 29, 4, 4, 3, 10, 4))
    PIECES = ((1,), (7, 1, 1, 1), (9, 2, 1, 13, 1, 1))

    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("pieces", PIECES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_what_lies_where(self, shape, pieces, ragged):
        """After every piece: the token at t in slot t mod 2 W, the first S in the sinks, all before `start` that are
        no sinks in the state."""
        heads, kv_heads, length, size, value_size, window, sinks, features = shape
        q, k, v, mixer, mix_logit = make_inputs((2, heads, kv_heads, length, size, value_size, window, sinks, features))
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, : 3 * ragged] = False
        memory = Memory.empty(k, v, mixer, window=window, sinks=sinks)
        done, sizes = 0, itertools.chain(pieces, itertools.repeat(pieces[-1]))
        while done < length:
            part = slice(done, min(done + next(sizes), length))
            new = mask[:, part]
            with torch.no_grad():
                _, memory = near_far_step(
                    q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, mix_logit[:, :, part], window=window,
                    sinks=sinks, mask=None if bool(new.all()) else new,
                )  # fmt: skip
            done = part.stop
            for row in range(2):
                skipped = 3 * row * ragged
                seen = max(0, done - skipped)
                assert int(memory.lengths[row]) == seen
                start = max((seen - 1) // window - 1, 0) * window
                for x, near, sink in ((k, memory.near_k, memory.sink_k), (v, memory.near_v, memory.sink_v)):
                    tokens = x[row, :, skipped : skipped + seen]
                    for t in range(start, seen):
                        assert torch.equal(near[row, :, t % (2 * window)], tokens[:, t])
                    assert torch.equal(sink[row, :, :seen], tokens[:, :sinks])
                far = slice(skipped + min(sinks, start), skipped + start)
                phi = torch.stack([hedgehog(k[row, h, far], mixer.key_weight[h]) for h in range(kv_heads)])
                assert_near(memory.state.z[row], phi.sum(1))
                assert_near(memory.state.s[row], phi.transpose(1, 2) @ v[row, :, far])

    @pytest.mark.parametrize("ragged", [False, True])
    def test_decoding_moves_nothing(self, ragged):
        q, k, v, mixer, mix_logit = make_inputs((2, 4, 2, 40, 4, 6, 4, 3, 5))
        memory = Memory.empty(k, v, mixer, window=4, sinks=3)
        if ragged:
            memory.uniform = None
        tensors = (memory.near_k, memory.near_v, memory.sink_k, memory.sink_v, memory.lengths, *memory.state)
        addresses = [x.data_ptr() for x in tensors]
        options = {"window": 4, "sinks": 3}
        with torch.no_grad():
            for t in range(40):
                part = slice(t, t + 1)
                _, memory = near_far_step(
                    q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, mix_logit[:, :, part], **options
                )
        after = (memory.near_k, memory.near_v, memory.sink_k, memory.sink_v, memory.lengths, *memory.state)
        assert [x.data_ptr() for x in after] == addresses

    @pytest.mark.parametrize("pieces", ["tokens", "pieces"])
    def test_bfloat16_state(self, pieces):
        """Half the bytes of the sums."""
        shape = (1, 2, 1, 2048, 16, 16, 32, 4, 16)
        q, k, v, mixer, mix_logit = make_inputs(shape, torch.float32)
        step = 1 if pieces == "tokens" else 61
        outs, sizes = [], []
        for state_dtype in (None, torch.bfloat16):
            memory = Memory.empty(k, v, mixer, window=32, sinks=4, state_dtype=state_dtype)
            out = []
            with torch.no_grad():
                for t in range(0, 2048, step):
                    part = slice(t, min(t + step, 2048))
                    x, memory = near_far_step(
                        q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, mix_logit[:, :, part], window=32,
                        sinks=4,
                    )  # fmt: skip
                    out.append(x)
            outs.append(torch.cat(out, 2))
            sizes.append((memory.state.s.dtype, memory.state.z.dtype, memory.nbytes()[1]))
        assert sizes == [
            (torch.float32, torch.float32, 2 * (32 * 16 * 4 + 32 * 4)),
            (torch.bfloat16, torch.float32, 2 * (32 * 16 * 2 + 32 * 4)),
        ]
        error = (outs[1] - outs[0]).norm() / outs[0].norm()
        assert 1e-5 < error < 1e-3  # measured: 2.4e-4 and 1.6e-4

    def test_bfloat16_state_over_length(self):
        """It is a sum that stops growing: terms below half of its last place are lost. Keys and values have means, as
        those of models have. Measured, relative error of phi_q S / n: 1.0e-3 at 1k tokens, 2.3e-3 at 4k, 4.0e-2 at
        16k, 0.52 at 64k. Half of bfloat16's last place is 3.9e-3: the state is safe to 4k tokens, with W = 64."""
        window, size, generator = 64, 32, torch.Generator().manual_seed(0)
        mean_k, mean_v = (torch.randn(size, generator=generator) for _ in range(2))
        q = torch.randn(1, 8, 256, size, generator=generator) + mean_k
        k, mixer = torch.empty(1, 1, 0, size), Hedgehog(8, 1, size)
        memories = [Memory.empty(k, k, mixer, window=window, sinks=0, state_dtype=d) for d in (None, torch.bfloat16)]
        errors = {}
        with torch.no_grad():
            phi_q = mixer.query_features(q).flatten(1, 2)[:, None]
            for chunk in range(2, 1026):
                new = [torch.randn(1, 1, window, size, generator=generator) for _ in range(2)]
                half = slice(chunk % 2 * window, (chunk % 2 + 1) * window)
                for memory in memories:
                    memory.near_k[:, :, half], memory.near_v[:, :, half] = new[0] + mean_k, new[1] + mean_v / 2
                    memory.uniform = chunk * window
                    fold(memory, mixer, window=window, sinks=0)
                tokens = (chunk - 1) * window
                if tokens in (1024, 4096, 16384, 65536):
                    exact, rounded = (mixer.read(wide(m.state), phi_q)[0] for m in memories)
                    errors[tokens] = float((rounded - exact).norm() / exact.norm())
        assert errors[1024] < errors[4096] < 3.9e-3
        assert errors[16384] > 1e-2
        assert errors[65536] > 0.1


class TestFewTokens:
    """Up to W tokens at once are steps in place; the whole of it is what single tokens give."""

    @staticmethod
    def inputs(mixer):
        """(q, k, v, mixer, mix_logit): two rows of 70 tokens, six heads over two."""
        q, k, v, made, mix_logit = make_inputs((2, 6, 2, 70, 8, 6, 5, 3, 8))
        return (q, k, v, made, mix_logit) if mixer else (q, k, v, None, None)

    @staticmethod
    def steps(inputs, pieces, **options):
        """(outputs, memory) of tokens given in pieces of these lengths, over and over."""
        q, k, v, mixer, mix_logit = inputs
        memory, outs, at, turn = Memory.empty(k, v, mixer, window=5, sinks=3), [], 0, 0
        with torch.no_grad():
            while at < q.shape[2]:
                part = slice(at, min(at + pieces[turn % len(pieces)], q.shape[2]))
                logit = None if mix_logit is None else mix_logit[:, :, part] if mix_logit.ndim == 3 else mix_logit
                out, memory = near_far_step(
                    q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, logit, window=5, sinks=3, **options
                )
                outs.append(out)
                at, turn = part.stop, turn + 1
        return torch.cat(outs, dim=2), memory

    @pytest.mark.parametrize("pieces", [[2], [5], [4, 1, 3], [1, 5, 2, 2]], ids=str)
    @pytest.mark.parametrize("mix", ["normalizer", "peak", "gate", None])
    def test_as_one_by_one(self, mix, pieces, monkeypatch):
        inputs, options = self.inputs(mix is not None), {"mix": mix or "normalizer"}
        many = []
        monkeypatch.setattr(memory_module, "_many_tokens", lambda *args, **given: many.append(args))
        out, memory = self.steps(inputs, pieces, **options)
        assert not many
        expected, single = self.steps(inputs, [1], **options)
        assert_near(out, expected)
        assert memory.uniform == single.uniform == 70
        assert torch.equal(memory.lengths, single.lengths)
        found, like = ((x.keys, x.values, x.undo.keys, *(x.state or ())) for x in (memory, single))
        for x, y in zip(found, like, strict=True):
            assert_near(x, y)
        whole = near_far_reference(*inputs, window=5, sinks=3, **options)
        assert_near(out, whole)

    @pytest.mark.parametrize("pieces", [[2], [4, 1, 3]], ids=str)
    @pytest.mark.parametrize("softmax", [{"soft_cap": 2.0}, {"sink_logit": True}], ids=["cap", "sink"])
    def test_other_softmaxes(self, softmax, pieces):
        if "sink_logit" in softmax:
            softmax = {"sink_logit": torch.randn(6, dtype=torch.float64)}
        inputs = self.inputs(True)
        out, _ = self.steps(inputs, pieces, **softmax)
        assert_near(out, near_far_reference(*inputs, window=5, sinks=3, **softmax))

    def test_one_logit_a_head(self):
        *inputs, _ = self.inputs(True)
        inputs.append(torch.randn(6, dtype=torch.float64))
        out, _ = self.steps(inputs, [3], mix="gate")
        assert_near(out, near_far_reference(*inputs, window=5, sinks=3, mix="gate"))

    def test_nothing_moves(self):
        q, k, v, mixer, mix_logit = self.inputs(True)
        memory = Memory.empty(k, v, mixer, window=5, sinks=3)
        places = [x.data_ptr() for x in (memory.keys, memory.values, memory.lengths, *memory.state)]
        with torch.no_grad():
            for at in range(0, 70, 5):
                part = slice(at, at + 5)
                given = q[:, :, part], k[:, :, part], v[:, :, part], memory, mixer, mix_logit[:, :, part]
                memory = near_far_step(*given, window=5, sinks=3)[1]
        assert [x.data_ptr() for x in (memory.keys, memory.values, memory.lengths, *memory.state)] == places


class TestOneToken:
    """Its parts; the whole is compared with the definition in `TestMemory` and in test_kernels_near_far."""

    @pytest.mark.parametrize(("window", "sinks"), [(4, 0), (4, 3), (4, 4), (3, 11), (1, 2)])
    def test_what_is_hidden(self, window, sinks):
        """By the definition: a query sees sinks before `start`, and every token from `start` on, in its slot."""
        positions = torch.arange(20 * window)[:, None]
        hidden = few_tokens._hidden(positions, window, sinks, torch.float64)
        for position, row in zip(positions[:, 0].tolist(), hidden):
            start = max(position // window - 1, 0) * window
            seen = {j for j in range(sinks) if j < start}
            seen |= {sinks + t % (2 * window) for t in range(start, position + 1)}
            assert {j for j, x in enumerate(row.tolist()) if x == 0} == seen
            assert all(x in (0, -torch.inf) for x in row.tolist())
            alike = few_tokens._hidden_alike(position, 1, window, sinks, torch.float64, torch.device("cpu"))
            assert torch.equal(alike[0, 0, 0], row)

    def test_tensors_without_numbers_do_not_stay(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        few_tokens._hidden_alike.cache_clear()
        for mode in (FakeTensorMode(), nullcontext()):
            with mode, torch.no_grad():
                x = torch.ones(1, 1, 1, 4)
                memory = Memory.empty(x, x, None, window=2, sinks=1)
                out, _ = near_far_step(x, x, x, memory, window=2, sinks=1)
        assert_near(out, x)

    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("scale", [0.3, 30.0])
    @pytest.mark.parametrize("last", [1, 3])
    def test_one_call_on_a_cpu_is_softmax(self, monkeypatch, rows, scale, last):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(3, 2, n, 8, last, generator=generator, dtype=torch.float64)[..., 0] for n in (5, 11, 11))
        hidden = torch.zeros(rows, 1, 1, 11, dtype=torch.float64)
        hidden[..., 3:6] = -torch.inf
        assert few_tokens._flash is not None, "this version of PyTorch has it"
        out, lse = few_tokens._attend(q, k, v, hidden, scale, from_peak=False)
        monkeypatch.setattr(few_tokens, "_flash", None)
        expected, log_z = few_tokens._attend(q, k, v, hidden, scale, from_peak=False)
        logits = scale * (q @ k.transpose(2, 3)) + hidden
        assert_near(log_z, logits.logsumexp(-1))
        assert_near(expected, logits.softmax(-1) @ v)
        assert_near(out, expected)
        assert_near(lse, log_z)


def decode(q, k, v, memory, mixer, mix_logit, *, first=0, splits=None, **options) -> Tensor:
    """Outputs of the Triton step for the tokens from `first` on, one by one."""
    from linearize.kernels.near_far.triton_decode import triton_step

    outs = []
    with torch.no_grad():
        for t in range(first, q.shape[2]):
            part = slice(t, t + 1)
            logit = mix_logit[:, :, part] if mix_logit is not None and mix_logit.ndim == 3 else mix_logit
            outs.append(
                triton_step(*[x[:, :, part] for x in (q, k, v)], memory, mixer, logit, splits=splits, **options)
            )
    return torch.cat(outs, dim=2)


WINDOWS = (16, 32)
SINKS = (0, 4)
SIZES = (16, 32, 64)  # of D, and of F
GROUPS = (1, 3)
DTYPES = (torch.float32, torch.bfloat16)
SPLITS = (1, 2, 4)
ROWS = ("equal", "ragged")
WHOLE = list(itertools.product(WINDOWS, SINKS, SIZES, SIZES, GROUPS, DTYPES, FAR, SPLITS, ROWS))


def case_id(case: tuple) -> str:
    window, sinks, size, features, group, dtype, far, splits, rows = case
    return f"W{window}-S{sinks}-D{size}-F{features}-G{group}-{str(dtype)[6:]}-{far}-{splits}-{rows}"


def check(case: tuple, device: torch.device, kv_heads: int = 1, chunks: float = 3.2) -> None:
    """Every step of one case against the formula in float64, and the memory after them against PyTorch's.

    Ragged rows: one has seen 9 tokens, which a pass in PyTorch has remembered, before the other's first.
    """
    window, sinks, size, features, group, dtype, far, splits, rows = case
    past = 9 if rows == "ragged" else 0
    length = past + int(chunks * window)
    q, k, v, *rest = make_inputs(
        (2, group * kv_heads, kv_heads, length, size, size, window, sinks, features // 2), dtype
    )
    mixer, mix_logit, mix = far_options(far, *rest)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :past] = False
    options = {"window": window, "sinks": sinks, "mix": mix}
    with torch.no_grad():
        wide = [x.double() for x in (q, k, v)]
        own_mixer = None if mixer is None else copy.deepcopy(mixer).double()
        truth = near_far_reference(*wide, own_mixer, mix_logit, **options, mask=mask)[:, :, past:]
        memory = Memory.empty(k, v, mixer, window=window, sinks=sinks)
        if past:
            part = [x[:, :, :past] for x in (q, k, v)]
            logit = mix_logit[:, :, :past] if mix_logit is not None and mix_logit.ndim == 3 else mix_logit
            _, memory = near_far_step(*part, memory, mixer, logit, **options, mask=mask[:, :past])
        expected = memory_to(memory, "cpu")
        for t in range(past, length):
            part = [x[:, :, t : t + 1] for x in (q, k, v)]
            logit = mix_logit[:, :, t : t + 1] if mix_logit is not None and mix_logit.ndim == 3 else mix_logit
            _, expected = near_far_step(*part, expected, mixer, logit, **options)
        memory = memory_to(memory, device)
        moved = [x.to(device) for x in (q, k, v)]
        on_device = None if mixer is None else copy.deepcopy(mixer).to(device)
        logit = None if mix_logit is None else mix_logit.to(device)
        out = decode(*moved, memory, on_device, logit, first=past, splits=splits, **options).cpu()
    assert out.dtype == dtype
    if dtype == torch.bfloat16:
        own = plain(q, k, v, mixer, mix_logit, **options, mask=mask)[:, :, past:].detach().double()
        bound = max(2 * float((own - truth).norm() / truth.norm()), torch.finfo(dtype).eps)
        assert bool(out.isfinite().all())
        assert float((out.double() - truth).norm() / truth.norm()) <= bound
    else:
        limit = 1e-11 if dtype == torch.float64 else 2e-5
        assert worst(out, truth) <= limit * max(float(truth.abs().max()), 1.0)
    for name in ("near_k", "near_v", "sink_k", "sink_v", "lengths"):
        assert torch.equal(getattr(memory, name).cpu(), getattr(expected, name))
    assert memory.uniform == expected.uniform
    for name in ("keys", "values"):
        assert torch.equal(getattr(memory.undo, name).cpu(), getattr(expected.undo, name))
    if mixer is not None:
        for got, wanted in zip((*memory.state, *memory.undo.state), (*expected.state, *expected.undo.state)):
            assert worst(got.cpu(), wanted) <= 2e-5 * max(float(wanted.abs().max()), 1.0)


@interpret
class TestStep:
    @pytest.mark.parametrize("case", covering(WHOLE), ids=case_id)
    def test_pairs(self, case, device):
        """Every pair of settings, every position up to the fourth chunk."""
        check(case, device, kv_heads=2 if case[4] == 1 else 1)

    @pytest.mark.kernels
    @pytest.mark.parametrize("part", list(itertools.product(WINDOWS, SIZES, SIZES, DTYPES, FAR)), ids=str)
    def test_whole(self, part, device):
        for case in WHOLE:
            if (case[0], case[2], case[3], case[5], case[6]) == part:
                check(case, device, kv_heads=2)

    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("splits", [1, 2])
    def test_arithmetic_alone(self, far, splits, device):
        """In float64, where nothing but a wrong term can show. Not on a GPU, whose kernels take no float64."""
        if device.type == "cuda":
            pytest.skip("float64 is for the interpreter")
        check((16, 4, 16, 32, 3, torch.float64, far, splits, "ragged"), device, chunks=2.5)

    # batch, H, K, T, D, V, W, S, feature_dim
    SHAPES = (
        (1, 2, 1, 40, 20, 24, 8, 0, 12),  # nothing is a power of two
        (2, 2, 2, 56, 32, 16, 24, 5, 16),
        (1, 2, 2, 50, 16, 48, 5, 7, 4),  # S > W
        (1, 3, 1, 70, 16, 16, 16, 40, 8),  # S > 2 W
        (1, 20, 1, 40, 16, 16, 8, 2, 8),  # more heads in a group than in a tile
        (2, 2, 1, 11, 16, 16, 64, 3, 8),  # W > T
        (1, 2, 1, 9, 16, 16, 1, 0, 8),  # chunks of one token
        (17, 1, 1, 20, 16, 16, 4, 1, 8),  # more rows than share a read of the weights
        (0, 2, 1, 3, 16, 16, 4, 1, 8),  # no row at all
    )

    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_shapes(self, shape, far, device):
        q, k, v, *rest = make_inputs(shape, torch.float32)
        if not shape[0]:
            rest[1] = torch.zeros(1, *rest[1].shape[1:])
        mixer, mix_logit, mix = far_options(far, *rest)
        if not shape[0] and mix_logit is not None and mix_logit.ndim == 3:
            mix_logit = mix_logit[:0]
        options = {"window": shape[6], "sinks": shape[7], "mix": mix}
        expected = near_far_reference(q, k, v, mixer, mix_logit, **options).detach()
        memory = memory_to(Memory.empty(k, v, mixer, window=shape[6], sinks=shape[7]), device)
        moved = [x.to(device) for x in (q, k, v)]
        mixer = None if mixer is None else mixer.to(device)
        mix_logit = None if mix_logit is None else mix_logit.to(device)
        out = decode(*moved, memory, mixer, mix_logit, **options).cpu()
        assert out.shape == expected.shape
        if shape[0]:
            assert worst(out, expected) <= 2e-5 * max(float(expected.abs().max()), 1.0)

    def test_layouts(self, device):
        """Tokens before heads, as a model hands them over; a fused projection; a last dimension with strides."""
        q, k, v, mixer, mix_logit = make_inputs((2, 4, 2, 40, 16, 16, 8, 2, 8), torch.float32)
        expected = near_far_reference(q, k, v, mixer, mix_logit, window=8, sinks=2)
        q, k, v, mix_logit = (x.to(device) for x in (q, k, v, mix_logit))
        fused = torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2)
        strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
        for tensors in (fused.split([4, 2, 2], 1), strided):
            memory = Memory.empty(k, v, mixer, window=8, sinks=2)
            out = decode(*tensors, memory, mixer.to(device), mix_logit.transpose(1, 2).contiguous().transpose(1, 2),
                         window=8, sinks=2)  # fmt: skip
            assert worst(out.cpu(), expected) <= 2e-5 * float(expected.abs().max())

    @pytest.mark.parametrize("far", ["normalizer", "gate"])
    @pytest.mark.parametrize("splits", [1, 2])
    def test_no_mix_logit_is_zeros(self, far, splits, device):
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 40, 16, 16, 8, 2, 16), torch.float32)
        options = {"window": 8, "sinks": 2, "mix": far, "scale": 0.3}
        expected = near_far_reference(q, k, v, mixer, None, **options)
        memory = Memory.empty(k.to(device), v, mixer.to(device), window=8, sinks=2)
        out = decode(
            *(x.to(device) for x in (q, k, v)), memory_to(memory, device), mixer, None, splits=splits, **options
        )
        assert worst(out.cpu(), expected) <= 2e-5 * float(expected.abs().max())

    @pytest.mark.parametrize("far", ["normalizer", "gate"])
    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_one_side_alone(self, share, splits, far, device):
        """Log-odds of certainty: the state off, and nothing but the state where there is one."""
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 40, 16, 16, 8, 2, 16), torch.float32)
        mix_logit = torch.full((2,), 1e30 if share else -torch.inf)
        options = {"window": 8, "sinks": 2, "mix": far}
        expected = near_far_reference(q, k, v, mixer, mix_logit, **options)
        near = near_far_reference(q, k, v, window=8, sinks=2)
        assert torch.equal(expected, near) == (share == 0.0)
        memory = memory_to(Memory.empty(k, v, mixer, window=8, sinks=2), device)
        moved = [x.to(device) for x in (q, k, v)]
        out = decode(*moved, memory, mixer.to(device), mix_logit.to(device), splits=splits, **options)
        assert worst(out.cpu(), expected) <= 2e-5 * float(expected.abs().max())

    @pytest.mark.parametrize("far", FAR)
    @pytest.mark.parametrize("size", [1e2, 1e4])
    def test_any_logit_scale(self, size, far, device):
        """Queries and keys are small integers times powers of two, so that logits are exact in float32."""
        generator = torch.Generator().manual_seed(3)
        q, k, v, *rest = make_inputs((1, 2, 1, 50, 16, 16, 16, 2, 16), torch.float32)
        q, k = (torch.randint(-4, 5, x.shape, generator=generator).float() for x in (q, k))
        q = q * 2.0 ** torch.log2(torch.tensor(size / 160)).ceil()
        mixer, mix_logit, mix = far_options(far, *rest)
        if mixer is not None:
            with torch.no_grad():
                for weight in mixer.parameters():
                    weight.copy_(torch.eye(16) / 2)
        options = {"window": 16, "sinks": 2, "mix": mix}
        wide = None if mixer is None else copy.deepcopy(mixer).double()
        truth = near_far_reference(*(x.double() for x in (q, k, v)), wide, mix_logit, **options)
        memory = memory_to(Memory.empty(k, v, mixer, window=16, sinks=2), device)
        moved = [x.to(device) for x in (q, k, v)]
        mixer = None if mixer is None else mixer.to(device)
        mix_logit = None if mix_logit is None else mix_logit.to(device)
        for splits in (1, 2):
            out = decode(*moved, memory_to(memory, device), mixer, mix_logit, splits=splits, **options)
            assert worst(out.cpu(), truth) <= 2e-5 * float(truth.abs().max())

    def test_small_far_masses_count(self, device):
        """Features that hardly overlap: a far mass of about e^-80, which a large mix_logit brings back."""
        q, k, v, mixer, _ = make_inputs((1, 2, 1, 40, 16, 16, 16, 0, 16), torch.float32)
        with torch.no_grad():
            for weight in mixer.parameters():
                weight.copy_(torch.eye(16))
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0], k[..., 1] = 80, 80
        near = near_far_reference(q, k, v, window=16)
        mix_logit = torch.full((2,), 79.0)
        truth = near_far_reference(q, k, v, mixer, mix_logit, window=16)
        assert worst(truth[:, :, 32:], near[:, :, 32:]) > 0.1
        memory = memory_to(Memory.empty(k, v, mixer, window=16, sinks=0), device)
        moved = [x.to(device) for x in (q, k, v)]
        for splits in (1, 2):
            out = decode(*moved, memory_to(memory, device), mixer.to(device), mix_logit.to(device), splits=splits,
                         window=16)  # fmt: skip
            assert worst(out.cpu(), truth) <= 2e-5 * float(truth.abs().max())

    def test_one_memory_for_both_forms(self, device):
        """Passes and steps in PyTorch and steps in Triton by turns."""
        q, k, v, mixer, mix_logit = make_inputs((2, 4, 2, 80, 16, 16, 8, 3, 8), torch.float32)
        options = {"window": 8, "sinks": 3}
        expected = near_far_reference(q, k, v, mixer, mix_logit, **options)
        memory, outs, done = Memory.empty(k, v, mixer, **options), [], 0
        for i, piece in enumerate((11, 4, 1, 7, 5, 9, 19, 24)):
            part = slice(done, done + piece)
            x = [y[:, :, part] for y in (q, k, v)]
            if i % 2:
                on_device = memory_to(memory, device)
                out = decode(*(y.to(device) for y in x), on_device, copy.deepcopy(mixer).to(device),
                             mix_logit[:, :, part].to(device), **options).cpu()  # fmt: skip
                memory = memory_to(on_device, "cpu")
            else:
                with torch.no_grad():
                    out, memory = near_far_step(*x, memory, mixer, mix_logit[:, :, part], **options)
            outs.append(out)
            done += piece
        assert_near(torch.cat(outs, 2), expected.detach())

    def test_nothing_is_read_before_it_is_written(self, device):
        """Fresh buffers full of NaN, and a ring whose unseen slots are NaN, change nothing."""
        q, k, v, mixer, mix_logit = make_inputs((2, 4, 2, 40, 16, 16, 8, 3, 16), torch.float32)
        expected = near_far_reference(q, k, v, mixer, mix_logit, window=8, sinks=3)
        memory = memory_to(Memory.empty(k, v, mixer, window=8, sinks=3), device)
        for x in (memory.near_k, memory.near_v, memory.sink_k, memory.sink_v):
            x.fill_(torch.nan)
        moved = [x.to(device) for x in (q, k, v)]
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            assert bool(torch.empty(4).isnan().all())
            out = decode(*moved, memory, mixer.to(device), mix_logit.to(device), splits=2, window=8, sinks=3)
        finally:
            torch.use_deterministic_algorithms(before)
        assert worst(out.cpu(), expected) <= 2e-5 * float(expected.abs().max())

    def test_bfloat16_state(self, device):
        """The same numbers as the PyTorch step with such a state, but for sums that round the other way."""
        q, k, v, mixer, mix_logit = make_inputs((2, 2, 1, 80, 16, 16, 8, 3, 16), torch.float32)
        options = {"window": 8, "sinks": 3}
        memory = Memory.empty(k, v, mixer, **options, state_dtype=torch.bfloat16)
        on_device, outs = memory_to(memory, device), []
        with torch.no_grad():
            for t in range(80):
                x = [y[:, :, t : t + 1] for y in (q, k, v)]
                step, memory = near_far_step(*x, memory, mixer, mix_logit[:, :, t : t + 1], **options)
                outs.append(step)
        out = decode(*(x.to(device) for x in (q, k, v)), on_device, mixer.to(device), mix_logit.to(device), **options)
        assert on_device.state.s.dtype == torch.bfloat16
        assert worst(out.cpu(), torch.cat(outs, 2)) < 2e-3
        exact = near_far_reference(q, k, v, mixer.cpu(), mix_logit, **options)
        assert 1e-4 < worst(out.cpu(), exact) < 2e-2  # it was stored in bfloat16 indeed

    def test_addresses_stay(self, device):
        q, k, v, mixer, mix_logit = (x.to(device) for x in make_inputs((2, 2, 1, 40, 16, 16, 8, 3, 8), torch.float32))
        memory = Memory.empty(k, v, mixer, window=8, sinks=3)
        tensors = (memory.keys, memory.values, memory.lengths, *memory.state)
        for splits in (1, 2):
            decode(q, k, v, memory, mixer, mix_logit, window=8, sinks=3, splits=splits)
        now = (memory.keys, memory.values, memory.lengths, *memory.state)
        assert all(a is b for a, b in zip(tensors, now, strict=True))
        assert memory.lengths.tolist() == [80, 80]
        assert memory.uniform == 80

    @pytest.mark.gpu
    @pytest.mark.parametrize("batch", [1, 40])  # with splits and without
    def test_cuda_graph(self, batch, device):
        """One graph, captured at the first token, replayed through three folds."""
        from linearize.kernels.near_far.triton_decode import triton_step

        q, k, v, mixer, mix_logit = (
            x.to(device) for x in make_inputs((batch, 8, 4, 70, 64, 64, 16, 4, 64), torch.bfloat16)
        )
        options = {"window": 16, "sinks": 4}
        eager = decode(q, k, v, Memory.empty(k, v, mixer, **options), mixer, mix_logit, **options)
        held = [x[:, :, :1].clone() for x in (q, k, v, mix_logit)]
        with torch.no_grad():
            memory = Memory.empty(k, v, mixer, **options)
            triton_step(*held[:3], Memory.empty(k, v, mixer, **options), mixer, held[3], **options)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = triton_step(*held[:3], memory, mixer, held[3], **options)
            assert memory.uniform is None
            outs = []
            for t in range(70):
                for to, x in zip(held, (q, k, v, mix_logit), strict=True):
                    to.copy_(x[:, :, t : t + 1])
                graph.replay()
                outs.append(out.clone())
        assert torch.equal(torch.cat(outs, 2), eager)
        assert memory.lengths.tolist() == [70] * batch


@interpret
class TestBadInputs:
    def test_other_mixers(self, device):
        q, k, v, mixer, mix_logit = (x.to(device) for x in make_inputs((1, 2, 1, 4, 16, 16, 8, 3, 8), torch.float32))
        other = Functional(mixer, dict(mixer.named_parameters()))
        memory = Memory.empty(k, v, other, window=8, sinks=3)
        with pytest.raises(LinearizeError) as error:
            decode(q, k, v, memory, other, mix_logit, window=8, sinks=3)
        assert str(error.value) == (
            "near_far_step: the Triton step knows no mixer Functional; use Hedgehog, or the PyTorch step"
        )

    def test_memory_that_is_not_contiguous(self, device):
        q, k, v, mixer, mix_logit = (x.to(device) for x in make_inputs((2, 2, 1, 4, 16, 16, 8, 3, 8), torch.float32))
        memory = Memory.empty(k, v, mixer, window=8, sinks=3)
        memory.values = memory.values.transpose(2, 3).contiguous().transpose(2, 3)
        with pytest.raises(LinearizeError) as error:
            decode(q, k, v, memory, mixer, mix_logit, window=8, sinks=3)
        assert str(error.value) == ("near_far_step: the memory's values are not contiguous; copy it with .contiguous()")


# One line of the kernels wrong, and the case that must notice.
NORMALIZER = (16, 4, 16, 32, 3, torch.float32, "normalizer", 2, "ragged")
GATE = (16, 4, 16, 32, 3, torch.float32, "gate", 1, "equal")
GATE_SPLIT = (16, 4, 16, 32, 3, torch.float32, "gate", 2, "equal")
MUTANTS = {
    "own slot twice": (NORMALIZER, "slot % WINDOW < offset", "slot % WINDOW <= offset"),
    "newest older token missing": (NORMALIZER, "slot % WINDOW < offset", "slot % WINDOW < offset - 1"),
    "chunk before missing": (NORMALIZER, "< offset, chunk > 0)", "< offset, chunk > 1)"),
    "halves exchanged": (NORMALIZER, "own = slot // WINDOW == chunk % 2", "own = slot // WINDOW != chunk % 2"),
    "sinks twice": (NORMALIZER, "tl.minimum((chunk - 1) * WINDOW, SINKS)", "tl.minimum(chunk * WINDOW, SINKS)"),
    "sinks in the state": (NORMALIZER, "position - 2 * WINDOW + i >= SINKS", "position - 2 * WINDOW + i >= 0"),
    "last sink not written": (
        NORMALIZER,
        "tl.store(sink_v + position * V + e, new_v, mask=writes & (position < SINKS)",
        "tl.store(sink_v + position * V + e, new_v, mask=writes & (position < SINKS - 1)",
    ),
    "value not rescaled": (NORMALIZER, "acc = acc * shrink[:, None] + tl.dot", "acc = acc + tl.dot"),
    "sum not rescaled": (NORMALIZER, "total * shrink + tl.sum(weights, 1)", "total + tl.sum(weights, 1)"),
    "far sum not rescaled": (NORMALIZER, "total = total * shrink + share", "total = total + share"),
    "parts not rescaled": (NORMALIZER, "tl.exp(top - tl.max(top, 0))", "tl.exp(top - top)"),
    "wrong group": (NORMALIZER, "head = kv_head * GROUP + member", "head = kv_head + KV_HEADS * member"),
    "mix of another head": (
        NORMALIZER,
        "row * mix_row + head * mix_head, mask=live",
        "row * mix_row + 0 * head, mask=live",
    ),
    "other half folded": (NORMALIZER, "(chunk % 2) * WINDOW + i", "((chunk + 1) % 2) * WINDOW + i"),
    "fold one chunk late": (NORMALIZER, "== 0) & (chunk >= 2)", "== 0) & (chunk >= 3)"),
    "sum of features replaced": (NORMALIZER, "norm + tl.sum", "tl.sum"),
    "a later state kept": (NORMALIZER, "inside & (first == 0)", "inside & (first > 0)"),
    "a later sum kept": (NORMALIZER, "once & (first == 0)", "once & (first > 0)"),
    "keys kept elsewhere": (NORMALIZER, "undo_k + i[:, None] * D", "undo_k + slot[:, None] * D"),
    "minus features as plus": (NORMALIZER, "tl.exp(-p - minus_top", "tl.exp(p - minus_top"),
    "features of both splits twice": (NORMALIZER, "range(split * FEATURE_SHARE,", "range(0 * FEATURE_SHARE,"),
    "counted twice": (NORMALIZER, "tl.load(lengths + row) + 1", "tl.load(lengths + row) + 2"),
    "share of the near side": (GATE, "1.0 / (1.0 + tl.exp(-logit)), 0.0)", "1.0 / (1.0 + tl.exp(logit)), 0.0)"),
    "far value not divided": (GATE, "(u / safe[:, None] - acc)", "(u - acc)"),
    "far part of one split": (GATE_SPLIT, "u = tl.sum(tl.load(far_acc", "u = tl.max(tl.load(far_acc"),
}


@interpret
class TestMutants:
    @pytest.mark.parametrize("case", [NORMALIZER, GATE, GATE_SPLIT], ids=case_id)
    def test_the_cases_themselves_are_right(self, case, device):
        check(case, device, kv_heads=2, chunks=2.6)

    @pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
    def test_mutant(self, mutant, monkeypatch, tmp_path, device):
        from linearize.kernels.near_far import triton_decode, triton_decode_kernels

        case, old, new = mutant
        changed = mutated(triton_decode_kernels, old, new, tmp_path)
        replace_kernels(monkeypatch, triton_decode, changed, triton_decode_kernels)
        with pytest.raises(AssertionError):
            check(case, device, kv_heads=2, chunks=2.6)


class TestSplits:
    """Needs triton, but launches nothing."""

    @pytest.mark.parametrize("batch", [1, 3, 16, 200])
    @pytest.mark.parametrize("window", [1, 16, 64, 100, 512])
    @pytest.mark.parametrize("half", [0, 16, 96, 256])
    @pytest.mark.parametrize("target", [*TARGETS])
    def test_everything_has_an_owner(self, target, half, window, batch):
        from linearize.kernels.near_far.triton_decode import decode_blocks

        blocks = decode_blocks(
            TARGETS[target], batch=batch, kv_heads=8, group=4, window=window, sinks=5, head_dim=128, value_dim=128,
            half=half, element_bytes=2,
        )  # fmt: skip
        splits = blocks.SPLITS
        assert splits & (splits - 1) == 0
        for count, share, block in (
            (2 * window, blocks.SLOT_SHARE, blocks.BLOCK_N),
            (5, blocks.SINK_SHARE, blocks.BLOCK_S),
            (half, blocks.FEATURE_SHARE, blocks.BLOCK_F),
        ):
            assert share * splits >= count
            assert share % block == 0
            assert block >= 16
        # As many as fill a GPU, unless no split would have 16 slots or features.
        assert splits == 1 or 8 * batch * splits // 2 < 128
        assert 8 * batch * splits >= 128 or max(2 * window, half) // (2 * splits) < 16

    @pytest.mark.parametrize("mix", ["none", "normalizer", "gate"])
    def test_recorded_launches(self, mix):
        """On meta tensors: three kernels, two without a state; a batch that fills the GPU is not split."""
        from linearize.kernels.near_far.triton_decode import triton_step

        for batch, names in (
            (1, ["decode_prepare", "decode_step", "decode_combine"]),
            (32, ["decode_prepare", "decode_step"]),
        ):
            with torch.device("meta"), recording(TARGETS["sm_90"]) as launches:
                q, k = torch.empty(batch, 32, 1, 128), torch.empty(batch, 8, 1, 128)
                mixer = None if mix == "none" else Hedgehog(32, 8, 128)
                memory = Memory.empty(k, k, mixer, window=64, sinks=4)
                out = triton_step(
                    q, k, k, memory, mixer, window=64, sinks=4, mix="gate" if mix == "gate" else "normalizer"
                )
            assert out.shape == (batch, 32, 1, 128)
            assert [x.kernel.__name__ for x in launches] == names[mix == "none" :]
            assert (launches[-1].arguments["SPLITS"] > 1) == (batch == 1)


class TestTraffic:
    LLAMA = DecodeShape(batch=16, heads=32, kv_heads=8, head_dim=128, value_dim=128, half=128, window=64, sinks=4)

    def test_near_is_what_a_query_sees(self):
        positions = torch.arange(64, 128)
        seen = (few_tokens._hidden(positions[:, None], 16, 0, torch.float32) == 0).sum(-1) - 1  # without its own
        shape = DecodeShape(1, 1, 1, 16, 16, 16, 16, 0)
        assert float(seen.double().mean()) == shape.near

    def test_least_is_what_a_memory_holds(self):
        k = torch.empty(16, 8, 1, 128, dtype=torch.bfloat16, device="meta")
        memory = Memory.empty(k, k, Hedgehog(32, 8, 128).to("meta"), window=64, sinks=4)
        memory.undo = None  # which no step reads
        near, state = memory.nbytes()
        moved = decode_bytes(self.LLAMA)
        assert moved.state == state
        assert moved.sinks + moved.window * 128 / self.LLAMA.near == near

    def test_llama(self):
        """Within a tenth of states + window + sinks: at any batch what crosses the memory bus, with one split all."""
        moved = decode_bytes(self.LLAMA)
        assert moved.parts == 0
        assert 1.0 < moved.of_rows / moved.least < 1.08
        for batch, splits in ((1, 8), (4, 4), (64, 1)):
            moved = decode_bytes(DecodeShape(batch, 32, 8, 128, 128, 128, 64, 4, splits=splits))
            assert 1.0 < moved.from_memory / moved.least < 1.06
            assert moved.from_memory < moved.of_rows < moved.total
        # By hand, batch 1: (64 + 31.5) keys and values of 8 heads, and 256 features by 128 values and a normaliser.
        moved = decode_bytes(DecodeShape(1, 32, 8, 128, 128, 128, 64, 4, splits=8))
        assert moved.window == 8 * 95.5 * 2 * 128 * 2
        assert moved.state == 8 * 256 * 129 * 4
        assert moved.parts == 2 * 8 * 32 * (128 + 2) * 4
        assert moved.weights == 128 * 128 * 4 * (32 + 8 / 64)

    def test_without_a_state(self):
        moved = decode_bytes(DecodeShape(1, 32, 8, 128, 128, 0, 64, 4))
        assert moved.state == moved.projected == moved.weights == 0
        assert moved.fold == 8 * 2 * 2 * 128 * 2  # once in W a chunk is put aside
        assert moved.least == moved.window + moved.sinks

    def test_halves(self):
        """A state in bfloat16 moves half the bytes of its sums, and splits nothing else."""
        half = decode_bytes(DecodeShape(16, 32, 8, 128, 128, 128, 64, 4, state_element=2))
        norms = 16 * 8 * 256 * 4
        assert 2 * (half.state - norms) == decode_bytes(self.LLAMA).state - norms
        assert half.window == decode_bytes(self.LLAMA).window

    @pytest.mark.parametrize("splits", [1, 8])
    @pytest.mark.parametrize("gate", [False, True])
    def test_kernels_add_up(self, splits, gate):
        """To the step's bytes, but for what several kernels read: `lengths` and q, and mix_logit twice at most."""
        shape = DecodeShape(2, 32, 8, 128, 128, 128, 64, 4, splits=splits, gate=gate)
        kernels = ["decode_prepare", "decode_fold", "decode_step", *(["decode_combine"] if splits > 1 else [])]
        total = sum(decode_work(name, shape)[1] for name in kernels)
        again = 2 * 32 * 128 * 2 + 2 * 8 * (3 if splits > 1 else 1)
        assert abs(total - decode_bytes(shape).total - again) <= 2 * 8 * 2

    def test_operations(self):
        """2 m k n of each product, by hand: batch 1."""
        shape = DecodeShape(1, 4, 2, 16, 8, 32, 16, 4)
        near = 2 * 4 * (16 + 7.5 + 1 + 4) * (16 + 8)
        far = 2 * 4 * (16 * 32 + 64 * (8 + 1))
        assert decode_flops(shape) == near + far
        assert decode_work("decode_fold", shape)[0] == 2 * (2 * 16 * 32 + 2 * 64 * 8)


def test_mixers_of_ones_own_decode_in_pytorch():
    """A subclass may have other features: the Triton step must not be taken for it."""

    class Own(Hedgehog):
        pass

    from linearize.kernels.near_far.memory import _steps_in_triton

    assert _steps_in_triton(None)
    assert _steps_in_triton(Hedgehog(2, 1, 16))
    assert not _steps_in_triton(Own(2, 1, 16))
    assert issubclass(Own, Mixer)
