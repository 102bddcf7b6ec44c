"""Near-and-far attention, forward and backward, against the formula in float64: what `gpu_check` asks of every kernel.

Bounds. float32 (products in tf32x3): 2e-5 of the largest number of the truth, or of 1. bfloat16: at most twice the
error of plain PyTorch in bfloat16, as |x - truth| / |truth| over all elements. float16: likewise, but against plain
bfloat16 where there is a far side, whose products are bfloat16 ones; see `triton_near_far.far_dtype`. No bound is below
twice the resolution of the dtype.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.near_far import Hedgehog, near_far_attention

from ..steps import CheckFailed

__all__ = [
    "BF16",
    "CASES",
    "FP16",
    "FP32",
    "REHEARSED",
    "Case",
    "Inputs",
    "check_attention",
    "compare",
    "judge",
    "make_inputs",
    "new_kernels",
    "plain_attention",
    "plain_dtype",
    "short",
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOAT32_BOUND = 2e-5
RAGGED = (0, 7, 3)  # columns of padding of a batch's rows
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes as in `counts.Shape`. far: "none", "normalizer", "gate", or "one a head" (normalizer, a log-odds a head);
    padding: "full", "left", "right", "holes" or "documents" (batch 1)."""

    dtype: torch.dtype
    kv_heads: int
    group: int
    head_dim: int
    half: int
    window: int
    far: str = "normalizer"
    padding: str = "full"
    batch: int = 2
    chunks: float = 4.3
    sinks: int = 4
    value_dim: int | None = None

    @property
    def name(self) -> str:
        """In one line."""
        sizes = f"D {self.head_dim} G {self.group} W {self.window}"
        if self.far != "none":
            sizes += f" F {2 * self.half}"
        if self.value_dim is not None:
            sizes += f" V {self.value_dim}"
        return f"{short(self.dtype)} {sizes} {self.far} {self.padding}"

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return round(self.chunks * self.window)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def mix(self) -> str:
        """For `near_far_attention`."""
        return "gate" if self.far == "gate" else "normalizer"

    @property
    def options(self) -> dict[str, Any]:
        """For `near_far_attention` and `near_far_step`."""
        return {"window": self.window, "sinks": self.sinks, "mix": self.mix}


# Each adds something that those before it have not; shapes of SmolLM2 and Llama-3.1 first.
CASES = (
    Case(BF16, 3, 3, 64, 64, 64),
    Case(FP32, 2, 3, 64, 64, 64, padding="left"),
    Case(BF16, 1, 4, 128, 128, 64, padding="right"),
    Case(BF16, 1, 4, 128, 128, 128, "gate"),
    Case(FP32, 1, 4, 128, 128, 64, "gate", "documents", batch=1),
    Case(BF16, 2, 3, 64, 64, 16, "one a head", "documents", batch=1, chunks=9.5),
    Case(FP16, 2, 1, 64, 64, 64, "gate", "left"),
    Case(BF16, 2, 4, 128, 128, 64, "none", "left"),
    Case(BF16, 2, 2, 128, 128, 64, padding="holes"),
    Case(FP16, 1, 4, 128, 128, 64),
    Case(BF16, 1, 4, 64, 64, 100, padding="holes"),
    Case(BF16, 2, 1, 256, 64, 64),
    Case(BF16, 1, 3, 64, 144, 64),  # more features than a tile holds: PyTorch computes them
    Case(FP32, 1, 1, 256, 32, 64, "gate"),
    Case(FP32, 1, 3, 64, 64, 16, "none", "documents", batch=1, chunks=9.5),
    Case(FP32, 2, 2, 40, 12, 24, "one a head", "right", value_dim=72),  # nothing is a power of two
    Case(BF16, 1, 8, 64, 64, 512, chunks=2.6, batch=1),
)
REHEARSED = (
    Case(FP32, 1, 3, 16, 8, 16, padding="left", chunks=3.2),
    Case(FP32, 1, 1, 16, 8, 16, "gate", "documents", batch=1, chunks=3.2),
    Case(FP32, 1, 2, 16, 8, 16, "none", batch=1, chunks=3.2),
)

# --- errors and bounds ---------------------------------------------------------------------------------------------


def compare(got: Tensors, truth: Tensors, dtype: torch.dtype, plain: Tensors | None = None) -> dict[str, Any]:
    """{"errors": {name: [error, bound]}}, by the module's rules.

    plain: the same in plain PyTorch, for the 16-bit dtypes. Raises CheckFailed where an error is above its bound.
    """
    errors = {}
    for name, expected in truth.items():
        actual, expected = got[name].detach().double(), expected.detach().double()
        if actual.shape != expected.shape:
            raise CheckFailed(f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
        difference = actual - expected
        if dtype == FP32:
            error = difference.abs().max()
            bound = FLOAT32_BOUND * max(float(expected.abs().max()), 1.0)
        else:
            norm = float(expected.norm()) + 1e-3
            error = difference.norm() / norm
            own = 0.0 if plain is None else float((plain[name].detach().double() - expected).norm()) / norm
            bound = 2 * max(own, torch.finfo(dtype).eps)
        errors[name] = [float(error) if bool(actual.isfinite().all()) else float("nan"), bound]
    return judge(errors)


def judge(errors: dict[str, list[float]]) -> dict[str, Any]:
    """{"errors": ...} of {name: [error, bound]}; raises CheckFailed with it where one is above its bound, or NaN."""
    values: dict[str, Any] = {"errors": errors}
    wrong = [f"{name} {error:.2g} (bound {bound:.2g})" for name, (error, bound) in errors.items() if not error <= bound]
    if wrong:
        raise CheckFailed("error of " + ", ".join(wrong), values)
    return values


def short(dtype: torch.dtype) -> str:
    """Its name without torch."""
    return str(dtype).removeprefix("torch.")


# --- attention -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """q, k, v in the case's dtype; mixer and mix_logit in float32; real (B, T), or documents' borders."""

    q: Tensor
    k: Tensor
    v: Tensor
    mixer: Hedgehog | None
    mix_logit: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None

    def leaves(self, dtype: torch.dtype, wide: torch.dtype) -> tuple[Tensors, Hedgehog | None]:
        """Fresh leaves for gradients: q, k, v in `dtype`, the others in `wide`; and a mixer of those."""
        leaves = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v")}
        mixer = None
        if self.mixer is not None and self.mix_logit is not None:
            leaves["mix_logit"] = self.mix_logit.to(wide)
            heads, head_dim, half = self.mixer.query_weight.shape
            with self.q.device:
                mixer = Hedgehog(heads, self.mixer.key_weight.shape[0], head_dim, half).to(wide)
            mixer.load_state_dict(self.mixer.state_dict())
        return {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}, mixer


def make_inputs(case: Case, device: torch.device, length: int | None = None) -> Inputs:
    """Random, the same on every machine, with logits and features as sharp as those of trained models."""
    generator = torch.Generator().manual_seed(0)
    length = case.length if length is None else length

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    q = 2 * normal(case.batch, case.heads, length, case.head_dim)
    k = normal(case.batch, case.kv_heads, length, case.head_dim)
    v = normal(case.batch, case.kv_heads, length, case.value_dim or case.head_dim)
    mixer, mix_logit = None, None
    if case.far != "none":
        mixer = Hedgehog(case.heads, case.kv_heads, case.head_dim, case.half)
        with torch.no_grad():
            for weight in mixer.parameters():
                weight.copy_(normal(*weight.shape) * case.head_dim**-0.25)
        mixer = mixer.to(device)
        mix_logit = normal(case.batch, case.heads, length).to(device, FP32)
        if case.far == "one a head":
            mix_logit = mix_logit[0, :, 0]
    column = torch.arange(length)
    pad = torch.tensor(RAGGED)[torch.arange(case.batch) % len(RAGGED), None]
    mask = {
        "left": column >= pad,
        "right": column < length - pad,
        "holes": (column * 7 + 3 * pad) % 5 > 0,
    }.get(case.padding)
    third = length // 3
    documents = torch.tensor([0, third, third, length]) if case.padding == "documents" else None
    q, k, v = (x.to(device, case.dtype) for x in (q, k, v))
    mask, documents = (None if x is None else x.to(device) for x in (mask, documents))
    return Inputs(q, k, v, mixer, mix_logit, mask, documents)


def run_attention(case: Case, inputs: Inputs, form: str) -> Tensors:
    """Output and gradients of a random linear function of it. form: "truth", "triton" or "plain"."""
    if form == "truth":
        dtype, wide = torch.float64, torch.float64
    else:
        dtype, wide = (plain_dtype(case) if form == "plain" else case.dtype), FP32
    leaves, mixer = inputs.leaves(dtype, wide)
    arguments = leaves["q"], leaves["k"], leaves["v"], mixer, leaves.get("mix_logit")
    if form == "plain":
        out = plain_attention(case, inputs, *arguments)
    else:
        out = near_far_attention(
            *arguments, **case.options, mask=inputs.mask, cu_seqlens=inputs.cu_seqlens,
            backend="reference" if form == "truth" else "triton",
        )  # fmt: skip
    parameters = {} if mixer is None else dict(mixer.named_parameters())
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    wanted = leaves | parameters
    gradients = torch.autograd.grad((out * weight).sum(), list(wanted.values()))
    return {"out": out.detach(), **{f"d {name}": x for name, x in zip(wanted, gradients)}}


def plain_attention(
    case: Case, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, mixer: Hedgehog | None, mix_logit: Tensor | None
) -> Tensor:
    """The formula as one would write it in PyTorch, all of it in the dtype of q."""
    length = q.shape[2]
    real = torch.ones(q.shape[0], length, dtype=torch.bool, device=q.device) if inputs.mask is None else inputs.mask
    document = torch.zeros_like(real, dtype=torch.long)
    position = real.long().cumsum(-1) - 1
    if inputs.cu_seqlens is not None:
        column = torch.arange(length, device=q.device)
        document = torch.searchsorted(inputs.cu_seqlens, column, right=True)[None]
        position = column - inputs.cu_seqlens[document - 1]
    query, key = position[:, None, :, None], position[:, None, None, :]
    seen = (key <= query) & real[:, None, None, :] & (document[:, None, :, None] == document[:, None, None, :])
    near = seen & ((key < case.sinks) | (key >= (query // case.window - 1) * case.window))
    near = near | (torch.eye(length, dtype=torch.bool, device=q.device) & ~real[:, None, :, None])
    k, v = (x.repeat_interleave(case.group, 1) for x in (k, v))
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~near, -torch.inf)
    out = logits.softmax(-1) @ v
    if mixer is not None and mix_logit is not None:
        key_weight = mixer.key_weight.repeat_interleave(case.group, 0)
        phi_q, phi_k = (
            torch.cat([(x @ w.to(x.dtype)).softmax(-1), (-(x @ w.to(x.dtype))).softmax(-1)], -1)
            for x, w in ((q, mixer.query_weight), (k, key_weight))
        )
        weights = (phi_q @ phi_k.transpose(-1, -2)) * (seen & ~near)
        mass = weights.sum(-1, keepdim=True)
        some = mass > 0
        safe = torch.where(some, mass, 1.0)
        logit = (mix_logit[:, None] if mix_logit.ndim == 1 else mix_logit).to(q.dtype)[..., None]
        if case.mix == "normalizer":
            logit = logit + safe.log() - logits.logsumexp(-1, keepdim=True)
        out = out + torch.where(some, logit.sigmoid(), 0.0) * (weights @ v / safe - out)
    return out * real[:, None, :, None]


def plain_dtype(case: Case) -> torch.dtype:
    """What the plain form of a case computes in; see the module."""
    return BF16 if case.dtype == FP16 and case.far != "none" else case.dtype


def check_attention(case: Case, device: torch.device) -> dict[str, Any]:
    """Forward and backward of one case; what its kernels needed of the GPU."""
    inputs = make_inputs(case, device)
    truth, got = run_attention(case, inputs, "truth"), run_attention(case, inputs, "triton")
    plain = None if case.dtype == FP32 else run_attention(case, inputs, "plain")
    return compare(got, truth, plain_dtype(case), plain) | {"kernels": new_kernels()}


_reported: set[int] = set()


def new_kernels() -> list[dict[str, Any]]:
    """What this process has compiled since it was last asked, as the driver reports it. local_bytes: spills and other
    memory of a thread's own."""
    found = []
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("linearize.kernels")]
    for kernel in {id(x): x for module in modules for x in vars(module).values()}.values():
        for device, cache in list(getattr(kernel, "device_caches", {}).items()):
            for compiled in cache[0].values():
                if id(compiled) in _reported or getattr(compiled, "n_regs", None) is None:
                    continue
                _reported.add(id(compiled))
                metadata = compiled.metadata
                found.append(
                    {
                        "kernel": metadata.name,
                        "device": device,
                        "warps": metadata.num_warps,
                        "stages": metadata.num_stages,
                        "registers": compiled.n_regs,
                        "local_bytes": 4 * compiled.n_spills,
                        "shared": metadata.shared,
                    }
                )
    return found
