"""How far each backend and dtype is from float64, and where a state stored in 16 bits stops being one.

    python -m linearize.benchmarks.numerics                 renews this checkout's results and docs/numerics.md
    python -m linearize.benchmarks.numerics --out FOLDER    writes numerics.json and numerics.md there

Inputs are random and made in float64; each dtype's truth is the formula in float64 on the inputs as that dtype holds
them, so an error is one of the arithmetic alone. What rounding the inputs costs is in the table `inherent`. An error is
relative: |x - truth| / |truth|, norms over the whole tensor; `worst` is the largest single difference, where outputs
are means of values about 1.

The Triton backend is measured where its kernels are compiled, on a GPU. On a CPU Triton's own interpreter is wrong in
bfloat16, so a caller that has put that right has to ask for it: `main(arguments, backends=(..., "triton"))`.

numerics.json:

    {"kind": "linearize.numerics", "schema": 1, "seconds": float, "triton": "compiled" | "interpreted" | null,
     "sizes": {...},                                                                  see `Sizes`
     "inherent": [{"rounded": str, "scale": float, "error": float}, ...],
     "logits": [{"mix": str, "dtype": str, "backend": str, "scale": float, "error": float, "worst": float}, ...],
     "lengths": [{"dtype": str, "backend": str, "length": int, "error": float}, ...],
     "growth": [{"length": int, "s": float, "z": float,
                 "scan_s": float, "scan_z": float, "update_s": float, "update_z": float}, ...],
     "features": [{"dtype": str, "backend": str, "feature_dim": int, "error": float}, ...],
     "gradients": [{"mix": str, "dtype": str, "backend": str, "scale": float, "of": str, "error": float}, ...],
     "weights": [{"dtype": str, "norm": float, "terms": int, "error": float}, ...],
     "decode": [{"window": int, "mean": float, "length": int, "chunks": int, "kept": float, "far": float,
                 "out": float, "out_float32": float}, ...],
     "machine": {...}}                                                                see linearize.benchmarks.machine

An error that is no finite number is null.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import linearize
from linearize.errors import LinearizeError
from linearize.kernels.near_far import Hedgehog, near_far_attention
from linearize.kernels.near_far.chunked import far_chunked, mix_near_far, softmax_lse
from linearize.kernels.near_far.memory import Memory, near_far_step
from linearize.kernels.near_far.mixers import State

from .files import write_json, write_text
from .inference import progress_bar
from .machine import machine_info
from .numerics_page import renew, tables

__all__ = ["FULL", "KIND", "Sizes", "main", "measure"]

KIND = "linearize.numerics"
SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = ("bfloat16", "float16")
MIXES = ("normalizer", "gate")
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: B = 1; H, K, D = V, W, S and feature_dim as everywhere.

    tokens: T of the tables by logits and features, gradient_tokens: of that of gradients; both multiples of W.
    lengths: rising; one text as long as the last, causal, so that a shorter one is its beginning. An error at a
    length, and so in `decode`, is that of the last `tail` tokens before it. reference_length: the T x T form goes no
    further. norms: |x| of the inputs of `weights`.
    """

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int = 64
    sinks: int = 4
    feature_dim: int = 64
    tokens: int = 512
    gradient_tokens: int = 256
    scales: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4)
    gradient_cases: tuple[tuple[str, float], ...] = (("normalizer", 1.0), ("gate", 100.0))
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    reference_length: int = 4096
    tail: int = 1024
    feature_dims: tuple[int, ...] = (16, 32, 64, 128, 256)
    decode_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    decode_windows: tuple[int, ...] = (64, 128)
    norms: tuple[float, ...] = (8.0, 19.0)


FULL = Sizes()


def main(arguments: Sequence[str] | None = None, backends: Sequence[str] | None = None) -> None:
    """The command of the module.

    Raises:
        LinearizeError: no --out where there is no checkout to renew.
    """
    parser = argparse.ArgumentParser(prog="python -m linearize.benchmarks.numerics", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for numerics.json and numerics.md; default: this checkout's")
    folder = parser.parse_args(arguments).out
    root = Path(linearize.__file__).resolve().parents[1]
    page = root / "docs" / "numerics.md"
    if folder is None and not page.is_file():
        raise LinearizeError(f"--out: not given, and there is no {page} to renew; give a folder for the results")
    data = measure(FULL, backends)
    write_json((folder or root / "benchmarks" / "results") / "numerics.json", data)
    if folder is None:
        write_text(page, renew(page.read_text(encoding="utf-8"), tables(data)))
    else:
        write_text(folder / "numerics.md", "\n\n".join(tables(data).values()) + "\n")


def measure(sizes: Sizes = FULL, backends: Sequence[str] | None = None) -> dict[str, Any]:
    """All tables, in the form that the module describes.

    Args:
        sizes: what to measure.
        backends: of "reference", "torch" and "triton"; None is all that are right here: Triton on a GPU only.
    """
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backends is None:
        backends = ("reference", "torch", "triton") if device.type == "cuda" else ("reference", "torch")
    data: dict[str, Any] = {"kind": KIND, "schema": 1, "seconds": 0.0, "triton": None, "sizes": asdict(sizes)}
    if "triton" in backends:
        data["triton"] = "compiled" if device.type == "cuda" else "interpreted"
    bench = _Bench(sizes, tuple(backends), device)
    with progress_bar("numerics", len(_Bench.TABLES)) as advance:
        for name in _Bench.TABLES:
            data[name] = list(getattr(bench, name)())
            advance(name)
    data["seconds"] = round(time.perf_counter() - start, 1)
    data["machine"] = machine_info(seed=SEED)
    return data


@dataclass(frozen=True)
class _Inputs:
    """q, k, v, mixer and mix_logit (B, H, T): the first five arguments of `near_far_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mixer: Hedgehog
    mix_logit: Tensor

    def to(self, dtype: torch.dtype) -> "_Inputs":
        """q, k and v in `dtype`; the mixer and mix_logit stay float32 unless it is float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mixer = Hedgehog(*self.mixer.query_weight.shape[:1], *self.mixer.key_weight.shape)
        mixer = mixer.to(self.q.device, wide)
        mixer.load_state_dict(self.mixer.state_dict())
        return _Inputs(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), mixer, self.mix_logit.to(wide))


class _Bench:
    """Every table is a method that yields its rows."""

    TABLES = ("inherent", "logits", "lengths", "growth", "features", "gradients", "weights", "decode")

    def __init__(self, sizes: Sizes, backends: tuple[str, ...], device: torch.device):
        self.sizes, self.backends, self.device = sizes, backends, device

    def inputs(
        self, tokens: int, scale: float = 1.0, feature_dim: int | None = None, mean: float = 0.0, heads: int = 0
    ) -> _Inputs:
        """Random normal q, k, v in float64, and a mixer and a mix_logit whose float32 values are exact in float64.

        scale: standard deviation of the logits; q and k each have its square root. mean: how much of a vector, random
        but the same for all tokens, the values have besides. heads: of one key head, where it is not 0.
        """
        sizes = self.sizes
        generator = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        heads, kv_heads = (heads, 1) if heads else (sizes.heads, sizes.kv_heads)
        q, k = (scale**0.5 * normal(1, h, tokens, sizes.head_dim) for h in (heads, kv_heads))
        v = normal(1, kv_heads, tokens, sizes.head_dim)
        v = v + mean * normal(sizes.head_dim)
        mixer = Hedgehog(heads, kv_heads, sizes.head_dim, feature_dim or sizes.feature_dim)
        with torch.no_grad():
            for weight in mixer.parameters():
                weight.add_(0.1 * normal(*weight.shape))  # as after training: no entry is a round number
        mix_logit = normal(1, heads, tokens).float().double()
        q, k, v, mix_logit = (x.to(self.device) for x in (q, k, v, mix_logit))
        return _Inputs(q, k, v, mixer.to(self.device).double(), mix_logit)

    @torch.no_grad()
    def attend(self, inputs: _Inputs, backend: str, mix: str = "normalizer", window: int | None = None) -> Tensor:
        """`near_far_attention` with this backend."""
        q, k, v, mixer, mix_logit = inputs.q, inputs.k, inputs.v, inputs.mixer, inputs.mix_logit
        window = window or self.sizes.window
        sinks = self.sizes.sinks
        return near_far_attention(q, k, v, mixer, mix_logit, window=window, sinks=sinks, mix=mix, backend=backend)

    def against_truth(self, inputs: _Inputs, mix: str = "normalizer") -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(dtype, backend, output, truth) for all of both."""
        for name, dtype in DTYPES.items():
            narrow = inputs.to(dtype)
            truth = self.attend(narrow.to(torch.float64), "reference", mix)
            for backend in self.backends:
                yield name, backend, self.attend(narrow, backend, mix), truth

    def inherent(self) -> Iterator[Row]:
        """What roundings cost that no implementation can avoid, everything else being float64."""
        for scale in self.sizes.scales:
            inputs = self.inputs(self.sizes.tokens, scale)
            truth = self.attend(inputs, "reference")
            results: dict[str, Tensor] = {}
            for name, dtype in DTYPES.items():
                q, k = (x.to(dtype).double() for x in (inputs.q, inputs.k))
                rounded = _Inputs(q, k, inputs.v, inputs.mixer, inputs.mix_logit)
                results[f"q and k to {name}"] = self.attend(rounded, "reference")
            results["q and k to TF32, for q·k only"] = self.from_logits(inputs, operands=_tf32)
            results["q·k to float32"] = self.from_logits(inputs, logits=lambda x: x.float().double())
            for name, dtype in DTYPES.items():
                results[f"the output to {name}"] = truth.to(dtype)
            for name, result in results.items():
                yield {"rounded": name, "scale": scale, "error": _relative(result, truth)}

    def from_logits(
        self,
        inputs: _Inputs,
        operands: Callable[[Tensor], Tensor] = lambda x: x,
        logits: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """The definition with q and k of the near logits, or these logits, passed through a rounding."""
        sizes, q, k, v = self.sizes, inputs.q, inputs.k, inputs.v
        far, log_mass, _ = far_chunked(q, k, v, inputs.mixer, window=sizes.window, sinks=sizes.sinks)
        group = sizes.heads // sizes.kv_heads
        products = operands(q) @ operands(k).repeat_interleave(group, 1).mT * sizes.head_dim**-0.5
        token = torch.arange(q.shape[2], device=q.device)
        query, key = token[:, None], token
        near = (key <= query) & ((key < sizes.sinks) | (key >= (query // sizes.window - 1) * sizes.window))
        weights, lse = softmax_lse(logits(products).masked_fill(~near, -torch.inf))
        return mix_near_far(
            weights @ v.repeat_interleave(group, 1), lse, far, log_mass, inputs.mix_logit, "normalizer"
        ).detach()

    def logits(self) -> Iterator[Row]:
        """Outputs by the standard deviation of the logits."""
        for mix in MIXES:
            for scale in self.sizes.scales:
                found = self.against_truth(self.inputs(self.sizes.tokens, scale), mix)
                for dtype, backend, out, truth in found:
                    error, worst = _relative(out, truth), _finite(float((out.double() - truth).abs().max()))
                    row = {"mix": mix, "dtype": dtype, "backend": backend, "scale": scale}
                    yield row | {"error": error, "worst": worst}

    def lengths(self) -> Iterator[Row]:
        """Outputs by length, values with a mean; two query heads of one key head."""
        sizes = self.sizes
        inputs = self.inputs(sizes.lengths[-1], mean=1.0, heads=2)
        for name, dtype in DTYPES.items():
            narrow = inputs.to(dtype)
            truth = self.attend(narrow.to(torch.float64), "torch")
            for backend in self.backends:
                reached = [n for n in sizes.lengths if backend != "reference" or n <= sizes.reference_length]
                q, k, v, mix_logit = (x[:, :, : reached[-1]] for x in (narrow.q, narrow.k, narrow.v, narrow.mix_logit))
                out = self.attend(_Inputs(q, k, v, narrow.mixer, mix_logit), backend)
                for length in reached:
                    last = slice(length - sizes.tail, length)
                    error = _relative(out[:, :, last], truth[:, :, last])
                    yield {"dtype": name, "backend": backend, "length": length, "error": error}

    @torch.no_grad()
    def growth(self) -> Iterator[Row]:
        """Largest entries of the state after each length, and the errors of both its running sums in float32: of the
        chunked form, and of decoding, which adds one chunk at a time."""
        sizes = self.sizes
        inputs = self.inputs(sizes.lengths[-1], mean=1.0, heads=2).to(torch.float32)

        def chunks(x: _Inputs) -> tuple[Tensor, Tensor]:
            phi_k, v = (y.unflatten(2, (-1, sizes.window)) for y in (x.mixer.key_features(x.k), x.v))
            return phi_k, v

        wide = inputs.to(torch.float64)
        phi_k, v = chunks(inputs)
        single = empty = inputs.mixer.empty_state(inputs.k, inputs.v)
        states = inputs.mixer.scan(empty, phi_k, v)
        truth = wide.mixer.scan(wide.mixer.empty_state(wide.k, wide.v), *chunks(wide))
        for chunk in range(1, phi_k.shape[2] + 1):
            single = inputs.mixer.update(single, phi_k[:, :, chunk - 1], v[:, :, chunk - 1])
            length = chunk * sizes.window
            if length in sizes.lengths:
                s, z = (x[:, :, chunk] for x in truth)
                row: Row = {"length": length, "s": float(s.abs().max()), "z": float(z.max())}
                row |= {"scan_s": _relative(states.s[:, :, chunk], s), "scan_z": _relative(states.z[:, :, chunk], z)}
                yield row | {"update_s": _relative(single.s, s), "update_z": _relative(single.z, z)}

    def features(self) -> Iterator[Row]:
        """Outputs by the number of features."""
        for size in self.sizes.feature_dims:
            for dtype, backend, out, truth in self.against_truth(self.inputs(self.sizes.tokens, feature_dim=size)):
                yield {"dtype": dtype, "backend": backend, "feature_dim": size, "error": _relative(out, truth)}

    def gradients(self) -> Iterator[Row]:
        """Gradients of everything, under a random gradient of the output."""
        sizes = self.sizes
        generator = torch.Generator().manual_seed(SEED + 1)
        for mix, scale in sizes.gradient_cases:
            inputs = self.inputs(sizes.gradient_tokens, scale)
            passed = torch.randn(inputs.q.shape, generator=generator, dtype=torch.float64).to(self.device)

            for name, dtype in DTYPES.items():
                dout = passed.to(dtype)
                truth = self.backward(inputs.to(dtype).to(torch.float64), "reference", mix, dout.double())
                for backend in self.backends:
                    for of, gradient in self.backward(inputs.to(dtype), backend, mix, dout).items():
                        row = {"mix": mix, "dtype": name, "backend": backend, "scale": scale, "of": of}
                        yield row | {"error": _relative(gradient, truth[of])}

    def backward(self, inputs: _Inputs, backend: str, mix: str, dout: Tensor) -> dict[str, Tensor]:
        """Gradients of everything, by name, where `dout` is that of the output."""
        q, k, v, mixer, mix_logit = inputs.q, inputs.k, inputs.v, inputs.mixer, inputs.mix_logit
        leaves = {"q": q, "k": k, "v": v, "mix_logit": mix_logit, **dict(mixer.named_parameters())}
        for leaf in leaves.values():
            leaf.requires_grad_()
        window, sinks = self.sizes.window, self.sizes.sinks
        out = near_far_attention(q, k, v, mixer, mix_logit, window=window, sinks=sinks, mix=mix, backend=backend)
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))

    @torch.no_grad()
    def weights(self) -> Iterator[Row]:
        """Features of 16-bit inputs where their weights are one 16-bit term, or two that add up to them."""
        inputs = self.inputs(self.sizes.tokens)
        for name in HALVES:
            dtype = DTYPES[name]
            for norm in self.sizes.norms:
                x = (inputs.q * norm * self.sizes.head_dim**-0.5).to(dtype).double()
                mixer = inputs.to(torch.float64).mixer
                truth, weight = mixer.query_features(x), mixer.query_weight.detach().clone()
                high = weight.to(dtype).double()
                for terms, approximate in ((1, high), (2, high + (weight - high).to(dtype).double())):
                    mixer.query_weight.copy_(approximate)
                    error = _relative(mixer.query_features(x), truth)
                    yield {"dtype": name, "norm": norm, "terms": terms, "error": error}

    def decode(self) -> Iterator[Row]:
        """A state stored in bfloat16 against one in float32, inputs in float32.

        kept: the first state's size along the second, <s16, s> / <s, s>. far: error of phi_q S / n against the second,
        for queries of the tail. out, out_float32: errors of both outputs. The text goes in in pieces of a chunk, which
        rounds the state as often as single tokens do: once a chunk.
        """
        for window in self.sizes.decode_windows:
            for mean in (0.0, 1.0):
                yield from self._decode(window, mean)

    @torch.no_grad()
    def _decode(self, window: int, mean: float) -> Iterator[Row]:
        sizes = self.sizes
        inputs = self.inputs(sizes.decode_lengths[-1], mean=mean, heads=2).to(torch.float32)
        q, k, v, mixer, mix_logit = inputs.q, inputs.k, inputs.v, inputs.mixer, inputs.mix_logit
        truth = self.attend(inputs.to(torch.float64), "torch", window=window)
        outputs: list[list[Tensor]] = [[], []]
        memories = [
            Memory.empty(k, v, mixer, window=window, sinks=sizes.sinks, state_dtype=dtype)
            for dtype in (torch.bfloat16, None)
        ]
        for first in range(0, q.shape[2], window):
            new = slice(first, first + window)
            q_new, k_new, v_new, mix_new = (x[:, :, new] for x in (q, k, v, mix_logit))
            for i, memory in enumerate(memories):
                out, memories[i] = near_far_step(
                    q_new, k_new, v_new, memory, mixer, mix_new, window=window, sinks=sizes.sinks, backend="torch"
                )
                outputs[i].append(out)
            length = first + window
            if length not in sizes.decode_lengths:
                continue
            last = slice(length - sizes.tail, length)
            stored, true = memories[0].state, memories[1].state
            assert stored is not None, "a memory made for a mixer has a state"
            assert true is not None
            phi_q = mixer.query_features(q[:, :, last]).flatten(1, 2)[:, None]
            far, _ = mixer.read(State(stored.s.float(), stored.z), phi_q)
            true_far, _ = mixer.read(true, phi_q)
            tails = [torch.cat(pieces[-(sizes.tail // window) :], 2) for pieces in outputs]
            yield {
                "window": window,
                "mean": mean,
                "length": length,
                "chunks": length // window - 2,
                "kept": float((stored.s.double() * true.s).sum() / true.s.double().square().sum()),
                "far": _relative(far, true_far),
                "out": _relative(tails[0], truth[:, :, last]),
                "out_float32": _relative(tails[1], truth[:, :, last]),
            }


def _relative(x: Tensor, truth: Tensor) -> float | None:
    """|x - truth| / |truth| in float64."""
    x, truth = x.double(), truth.double()
    return _finite(float((x - truth).norm() / truth.norm()))


def _finite(x: float) -> float | None:
    return x if abs(x) < float("inf") else None


def _tf32(x: Tensor) -> Tensor:
    """x rounded to TF32: float32 with the 10 bits of float16's mantissa, to nearest."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11)


if __name__ == "__main__":
    try:
        main()
    except LinearizeError as error:
        sys.exit(f"error: {error}")
