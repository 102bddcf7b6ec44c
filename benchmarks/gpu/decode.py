"""The decode step against the full form, and as a captured CUDA graph against itself."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.near_far import Memory, near_far_attention, near_far_step

from ..steps import CheckFailed, Skip
from .attention import (
    BF16,
    FP16,
    FP32,
    Case,
    Inputs,
    compare,
    make_inputs,
    new_kernels,
    plain_attention,
    plain_dtype,
)

__all__ = ["DECODED", "REHEARSED_DECODED", "check_decode", "check_graph"]

DECODED = (
    Case(BF16, 3, 3, 64, 64, 64, batch=3),
    Case(FP32, 2, 4, 64, 64, 64, batch=3),
    Case(BF16, 2, 4, 128, 128, 64, "gate", batch=3),
    Case(FP32, 1, 1, 128, 128, 16, "one a head", batch=3),
    Case(FP16, 2, 4, 128, 128, 64, "none", batch=3),
    Case(BF16, 1, 20, 256, 64, 100, batch=3),
)
REHEARSED_DECODED = (Case(FP32, 1, 2, 16, 8, 16, batch=3),)


@dataclass(frozen=True)
class Stream:
    """Rows of tokens, of which `lengths` (B,) were remembered before the first step."""

    inputs: Inputs
    lengths: Tensor
    steps: int

    def tokens(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and mix_logit of step n: (B, heads, 1, .), (B, H, 1)."""
        i = self.inputs
        row = torch.arange(i.q.shape[0], device=i.q.device)
        q, k, v = (x[row, :, self.lengths + n][:, :, None] for x in (i.q, i.k, i.v))
        mix_logit = i.mix_logit
        if mix_logit is not None and mix_logit.ndim == 3:
            mix_logit = mix_logit[row, :, self.lengths + n][..., None]
        return q, k, v, mix_logit

    def at_steps(self, x: Tensor) -> Tensor:
        """x (B, H, T, V) at the positions of the steps: (B, H, steps, V)."""
        row = torch.arange(x.shape[0], device=x.device)[:, None]
        position = self.lengths[:, None] + torch.arange(self.steps, device=x.device)
        return x[row, :, position].transpose(1, 2)


def start_stream(case: Case, device: torch.device, steps: int | None) -> tuple[Stream, Memory]:
    """Rows of different lengths, the first about to fold a chunk, and the memory before the first step."""
    steps = 3 * case.window if steps is None else steps
    lengths = torch.tensor([2 * case.window - 2, 3 * case.window - 1, 1], device=device)[: case.batch]
    inputs = make_inputs(case, device, length=int(lengths.max()) + steps)
    before = int(lengths.max())
    memory = Memory.empty(inputs.k, inputs.v, inputs.mixer, window=case.window, sinks=case.sinks)
    mask = torch.arange(before, device=device) < lengths[:, None]
    logit = inputs.mix_logit
    if logit is not None and logit.ndim == 3:
        logit = logit[..., :before]
    q, k, v = (x[:, :, :before] for x in (inputs.q, inputs.k, inputs.v))
    with torch.no_grad():
        _, memory = near_far_step(q, k, v, memory, inputs.mixer, logit, **case.options, mask=mask)
    return Stream(inputs, lengths, steps), memory


def run_steps(case: Case, stream: Stream, memory: Memory, splits: int | None) -> Tensor:
    """(B, H, steps, V) of the Triton step; the memory goes on in place."""
    from linearize.kernels.near_far.triton_decode import triton_step

    outs = []
    with torch.no_grad():
        for n in range(stream.steps):
            q, k, v, logit = stream.tokens(n)
            outs.append(triton_step(q, k, v, memory, stream.inputs.mixer, logit, **case.options, splits=splits))
    return torch.cat(outs, dim=2)


def check_decode(case: Case, device: torch.device, splits: int | None, steps: int | None) -> dict[str, Any]:
    """Steps of ragged rows across chunk borders (over 3 W tokens unless named) against the full form."""
    stream, memory = start_stream(case, device, steps)
    got = run_steps(case, stream, memory, splits)
    expected = []
    for form in ("truth", "plain"):
        dtype, wide = (torch.float64, torch.float64) if form == "truth" else (plain_dtype(case), FP32)
        leaves, mixer = stream.inputs.leaves(dtype, wide)
        arguments = leaves["q"], leaves["k"], leaves["v"], mixer, leaves.get("mix_logit")
        with torch.no_grad():
            if form == "truth":
                out = near_far_attention(*arguments, **case.options, backend="reference")
            else:
                out = plain_attention(case, stream.inputs, *arguments)
        expected.append({"out": stream.at_steps(out)})
    return compare({"out": got}, expected[0], plain_dtype(case), expected[1]) | {"kernels": new_kernels()}


def check_graph(case: Case, device: torch.device) -> dict[str, Any]:
    """One step, captured once and replayed over 3 W tokens of ragged rows: the bits of the steps themselves."""
    if device.type != "cuda":
        raise Skip("CUDA graphs need a GPU")
    from linearize.kernels.near_far.triton_decode import triton_step

    stream, memory = start_stream(case, device, None)
    replayed, scratch = memory.map(torch.clone), memory.map(torch.clone)
    expected = run_steps(case, stream, memory, None)
    static = [None if x is None else x.clone() for x in stream.tokens(0)]

    def step(into: Memory) -> Tensor:
        q, k, v, logit = static
        assert q is not None and k is not None and v is not None  # noqa: PT018
        return triton_step(q, k, v, into, stream.inputs.mixer, logit, **case.options)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        step(scratch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = step(replayed)
    outs = []
    for n in range(stream.steps):
        for place, x in zip(static, stream.tokens(n)):
            if place is not None and x is not None:
                place.copy_(x)
        graph.replay()
        outs.append(out.clone())
    different = (torch.cat(outs, dim=2) != expected).flatten(0, 1).any(-1).any(0)
    held = {"lengths": (replayed.lengths, memory.lengths), "near_k": (replayed.near_k, memory.near_k)}
    if replayed.state is not None and memory.state is not None:
        held |= {"state": (replayed.state.s, memory.state.s), "normaliser": (replayed.state.z, memory.state.z)}
    wrong = [name for name, (x, y) in held.items() if not torch.equal(x, y)]
    values = {"tokens": stream.steps, "tokens_different": int(different.sum())}
    if wrong or bool(different.any()):
        first = int(different.int().argmax())
        raise CheckFailed(
            f"{int(different.sum())} of {stream.steps} tokens differ, the first is {first}; in the end differ: "
            f"{', '.join(wrong) or 'no tensors'}",
            values,
        )
    return values
