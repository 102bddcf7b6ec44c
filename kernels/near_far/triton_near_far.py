"""Near-and-far attention in Triton: the launchers of `triton_forward` and `triton_backward`.

Under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported) they take CPU tensors.

Shape legend as in `chunked`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends import log_once
from ..devices import Target
from ..launch import current_target, launch, launch_best
from .mixers import Hedgehog, Mixer, accumulation_dtype
from .rows import Rows, real_tokens
from .triton_arguments import TL_TYPES, far_dtype, last_contiguous, precision_of, strided, tile
from .triton_backward import (
    far_backward_keys,
    far_backward_queries,
    near_backward_keys,
    near_backward_queries,
    sink_gradients,
)
from .triton_blocks import Blocks, candidates
from .triton_forward import attention_forward, chunk_sums, prefix_sums

__all__ = [
    "FarStates",
    "Problem",
    "empty_outputs",
    "far_states",
    "features_kind",
    "features_of",
    "near_far_backward",
    "near_far_forward",
]

# Beyond these a tile of x W does not stay in registers: the features are then computed before, by PyTorch.
FUSED_HALF = 128
FUSED_HEAD_DIM = 128


@dataclass(frozen=True)
class Problem:
    """What the kernels compile for. mix "far" has no near side: `far_read`."""

    window: int
    sinks: int
    mix: str
    features: str  # "none", "given", "hedgehog"
    scale: float


@dataclass(frozen=True)
class FarStates:
    """before (P, K, F, V) in the operands' dtype and norms (P, K, F): the sums before each chunk of the table.

    kept, kept_norms: those before the chunk that the table names for each sequence, and those a chunk earlier,
    (2, N, K, F, V), (2, N, K, F), float32.
    """

    before: Tensor
    norms: Tensor
    kept: Tensor
    kept_norms: Tensor


def features_of(mixer: Mixer | None, q: Tensor, k: Tensor) -> tuple[str, Tensor | None, Tensor | None]:
    """(kind, of queries, of keys) for the operator: weights that it applies itself, or features.

    Hedgehog's weights (H, D, HALF) and (K, D, HALF) where a tile of features fits in registers; any other mixer's
    features (B, H, T, F) and (B, K, T, F), in the dtype of the far products.
    """
    kind = features_kind(mixer, q)
    if mixer is None or kind == "none":
        return "none", None, None
    if kind == "hedgehog":
        assert isinstance(mixer, Hedgehog)
        return kind, mixer.query_weight, mixer.key_weight
    if q.is_cuda:
        log_once(f"the features of {type(mixer).__name__} are computed by PyTorch, outside the Triton kernels")
    dtype = far_dtype(q.dtype)
    return kind, mixer.query_features(q).to(dtype), mixer.key_features(k).to(dtype)


def features_kind(mixer: Mixer | None, q: Tensor) -> str:
    """ "none", "hedgehog" (weights, which the kernels apply) or "given" (features that PyTorch computes)."""
    if mixer is None:
        return "none"
    if type(mixer) is not Hedgehog or q.shape[-1] > FUSED_HEAD_DIM:
        return "given"
    return "hedgehog" if mixer.query_weight.shape[-1] <= FUSED_HALF else "given"


def far_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_features: Tensor | None,
    key_features: Tensor | None,
    rows: Rows,
    problem: Problem,
    initial: tuple[Tensor, Tensor] | None = None,
) -> FarStates | None:
    """The states of `near_far_forward` alone; None without features."""
    if problem.features == "none":
        return None
    return _Call(q, k, v, query_features, rows, problem).far_states(k, v, key_features, initial)


def near_far_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    mix: Tensor | None,
    query_features: Tensor | None,
    key_features: Tensor | None,
    rows: Rows,
    problem: Problem,
    initial: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, FarStates | None]:
    """(out (B, H, T, V), stats (3, B, H, T), states): see `triton_forward`. No gradient.

    sink_k, sink_v: k and v themselves, or tensors (B, K, S, .) where the table says that tokens came before.
    mix: (B, H, T) log-odds, any strides, or None for zeros. initial: the state (N, K, F, V), (N, K, F) before the
    table's first chunks.
    """
    call = _Call(q, k, v, query_features, rows, problem)
    states = None
    if problem.features != "none":
        states = call.far_states(k, v, key_features, initial)
    out, stats = empty_outputs(q, v.shape[-1], rows.padded)
    call.run(
        attention_forward,
        "queries",
        **strided(q=q, k=k, v=v, sink_k=sink_k, sink_v=sink_v, mix=mix, phi=call.phi(query_features), out=out),
        **call.weights(query_features),
        before=None if states is None else states.before,
        norms=None if states is None else states.norms,
        stats=stats,
    )
    return out, stats, states


def near_far_backward(
    dout: Tensor,
    dtop: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mix: Tensor | None,
    query_features: Tensor | None,
    key_features: Tensor | None,
    out: Tensor,
    stats: Tensor,
    rows: Rows,
    problem: Problem,
    need_weights: bool = True,
    need_inputs: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, mix (B, H, T), and of the features or their weights; see `triton_backward`.

    need_inputs: those of q, k and v are wanted; need_weights: those of hedgehog's weights. None where they are not.
    """
    call = _Call(q, k, v, query_features, rows, problem)
    far = problem.features != "none"
    states = call.far_states(k, v, key_features, None) if far else None
    dout = last_contiguous(dout)
    # Chunks without a far side, and padding, are not written.
    passed = torch.empty_like(stats)
    dmix = None if mix is None else torch.zeros_like(stats[0])
    dphi_q = dphi_k = dv_far = None
    if far:
        width = call.half if problem.features == "hedgehog" else call.num_features
        dtype = q.dtype if problem.features == "hedgehog" else far_dtype(q.dtype)
        dphi_q = torch.zeros(*q.shape[:3], width, dtype=dtype, device=q.device)
        dphi_k = torch.zeros(*k.shape[:3], width, dtype=dtype, device=q.device)
        dv_far = torch.empty(*v.shape, dtype=call.wide, device=q.device)

    call.run(
        far_backward_queries,
        "queries",
        **strided(q=q, mix=mix, phi=call.phi(query_features), out=out, dout=dout),
        **call.weights(query_features),
        before=None if states is None else states.before,
        norms=None if states is None else states.norms,
        dtop=dtop,
        stats=stats,
        dmix=dmix,
        dphi=dphi_q,
        passed=passed,
    )
    if far:
        sums, norms = call.chunk_sums(q, dout, query_features, call.group, (stats[2], passed[2]))
        call.run(
            far_backward_keys,
            "keys",
            **strided(k=k, v=v, phi=call.phi(key_features)),
            **call.weights(key_features),
            dstates=call.prefix(sums, None, far_dtype(q.dtype), reverse=True)[0],
            dnorms=call.prefix(norms, None, call.wide, reverse=True)[0],
            dphi=dphi_k,
            dv_far=dv_far,
        )
    dq = dk = dv = None
    if need_inputs:
        # Padding is not written.
        dq, dk, dv = (torch.zeros_like(x) if rows.padded else torch.empty_like(x) for x in (q, k, v))
        sinks = 0 if problem.mix == "far" else problem.sinks

        def sink_parts(blocks: Blocks) -> dict[str, Tensor]:
            shape = rows.count, call.tiles(blocks.constants["BLOCK_M"]), call.kv_heads, sinks
            return {
                name: torch.empty(*shape, x.shape[-1], dtype=call.wide, device=q.device)
                for name, x in (("dsink_k", k), ("dsink_v", v))
            }

        parts = call.run(
            near_backward_queries,
            "queries",
            sink_parts,
            **strided(q=q, k=k, v=v, sink_k=k, sink_v=v, dout=dout, dq=dq),
            **call.weights(query_features),
            stats=stats,
            dphi=dphi_q,
            passed=passed,
        )
        call.run(
            near_backward_keys,
            "keys",
            **strided(q=q, k=k, v=v, dout=dout, dk=dk, dv=dv),
            **call.weights(key_features),
            stats=stats,
            passed=passed,
            dphi=dphi_k,
            dv_far=dv_far,
        )
        if sinks:
            call.add_sinks(parts["dsink_k"], dk)
            call.add_sinks(parts["dsink_v"], dv)
    if problem.features == "hedgehog":
        assert dphi_q is not None
        assert dphi_k is not None
        if not need_weights:
            return dq, dk, dv, dmix, None, None
        dq_weight = _weight_gradient(q, dphi_q, rows, problem.window)
        return dq, dk, dv, dmix, dq_weight, _weight_gradient(k, dphi_k, rows, problem.window)
    return dq, dk, dv, dmix, dphi_q, dphi_k


_blocks: dict[tuple, list[Blocks]] = {}


class _Call:
    """One call's tensors and sizes, put into the arguments that the kernels share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, features: Tensor | None, rows: Rows, problem: Problem):
        self.q, self.rows, self.problem = q, rows, problem
        self.batch, self.heads, self.length, self.head_dim = q.shape
        self.kv_heads, self.value_dim = k.shape[1], v.shape[-1]
        self.group = self.heads // self.kv_heads
        self.target: Target = current_target(q.device)
        self.wide = accumulation_dtype(q)
        self.half = self.num_features = 0
        self._operands: dict[int, dict[str, Any]] = {}
        if features is not None:
            self.half = features.shape[-1]
            self.num_features = self.half * (2 if problem.features == "hedgehog" else 1)
        self.precision = precision_of(q.dtype, self.target)

    def blocks(self, kernel: Any, **changes: Any) -> list[Blocks]:
        """The kernel's blocks at these sizes, by preference."""
        key = self.key() | changes
        where = kernel.__name__, self.target, *key.values()
        if where not in _blocks:
            _blocks[where] = candidates(kernel.__name__, key, self.target)
        return _blocks[where]

    def key(self) -> dict[str, Any]:
        """What blocks are chosen by."""
        return {
            "dtype": self.q.dtype,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "half": self.half,
            "features": self.problem.features,
            "window": self.problem.window,
            "group": self.group,
            "sinks": self.problem.sinks,
        }

    def run(
        self, kernel: Any, axis: str, make: Callable[[Blocks], dict[str, Tensor]] | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """Launch with these arguments, and of the sizes and blocks those that the kernel takes; returns them all.

        axis: what the programs are: tiles of "queries" or "keys" of a chunk, or parts of a chunk's sums ("chunks").
        make: further arguments, whose shapes depend on the blocks.
        """
        group = arguments.get("GROUP", self.group)
        named: dict[str, Any] = {}

        def run_with(blocks: Blocks) -> None:
            named.update(self.sizes() | blocks.constants | arguments)
            if make is not None:
                named.update(make(blocks))
            if axis != "keys":  # whether no tile has rows of two heads
                named["ONE_HEAD"] = group == 1 or self.problem.window % blocks.constants["BLOCK_M"] == 0
            taken = {name: named[name] for name in kernel.arg_names}
            grid = self.grid(axis, blocks.constants)
            launch(kernel, grid, taken, num_warps=blocks.num_warps, num_stages=blocks.num_stages)

        key = self.key() | {"group": group}
        launch_best(
            (kernel.__name__, self.problem.mix, *key.values()), self.blocks(kernel, group=group), run_with, self.q
        )
        return named

    def grid(self, axis: str, constants: dict[str, int]) -> tuple[int, ...]:
        """Programs of a launch; see `run`."""
        count, problem = self.rows.count, self.problem
        if axis == "keys":
            return count * -(-problem.window // constants["BLOCK_N"]), self.kv_heads
        if axis == "queries":
            return count * self.tiles(constants["BLOCK_M"]), self.kv_heads
        halves = 2 if problem.features == "hedgehog" else -(-self.num_features // constants["BLOCK_F"])
        return count, self.kv_heads, halves * -(-self.value_dim // constants["BLOCK_V"])

    def sizes(self) -> dict[str, Any]:
        """Every size and constant, by the kernels' names."""
        problem = self.problem
        return {
            "chunks": self.rows.chunks,
            "plane": self.batch * self.heads * self.length,
            "T": self.length,
            "KV_HEADS": self.kv_heads,
            "D": self.head_dim,
            "V": self.value_dim,
            "F": self.num_features,
            "scale": problem.scale,
            "tiny": torch.finfo(self.wide).tiny,
            "WINDOW": problem.window,
            "GROUP": self.group,
            "SINKS": problem.sinks,
            "HALF": self.half,
            "FEATURES": problem.features,
            "MIX": problem.mix,
            "ACC": TL_TYPES[self.wide],
            "FAR": TL_TYPES[far_dtype(self.q.dtype)],
            "PRECISION": self.precision,
        }

    def phi(self, features: Tensor | None) -> Tensor | None:
        """The features, where they are given."""
        return features if self.problem.features == "given" else None

    def weights(self, features: Tensor | None) -> dict[str, Any]:
        """Hedgehog's weights as operands: themselves, or two terms of the 16-bit dtype that add up to them."""
        if self.problem.features != "hedgehog" or features is None:
            return {"weight": None, "weight_low": None}
        if id(features) not in self._operands:
            weight = features.detach()
            high = weight.to(self.q.dtype).contiguous()
            low = None
            if self.q.dtype not in (torch.float32, torch.float64):
                low = (weight - high.to(weight.dtype)).to(self.q.dtype).contiguous()
            self._operands[id(features)] = {"weight": high, "weight_low": low}
        return self._operands[id(features)]

    def tiles(self, block_m: int) -> int:
        """Tiles of query rows of a chunk and KV group."""
        return -(-self.group * self.problem.window // block_m)

    def far_states(
        self, k: Tensor, v: Tensor, features: Tensor | None, initial: tuple[Tensor, Tensor] | None
    ) -> FarStates:
        """The states before every chunk."""
        assert features is not None
        sums, norms = self.chunk_sums(k, v, features, 1, None)
        state, state_norms = initial if initial is not None else (None, None)
        before, kept = self.prefix(sums, state, far_dtype(self.q.dtype), reverse=False)
        norms_before, kept_norms = self.prefix(norms, state_norms, self.wide, reverse=False)
        return FarStates(before, norms_before, kept, kept_norms)

    def chunk_sums(
        self, x: Tensor, y: Tensor, features: Tensor | None, group: int, factors: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(sums (P, K, F, V), norms (P, K, F)) of `chunk_sums`."""
        count = self.rows.count
        sums = torch.empty(count, self.kv_heads, self.num_features, self.value_dim, dtype=self.wide, device=x.device)
        norms = torch.empty(count, self.kv_heads, self.num_features, dtype=self.wide, device=x.device)
        self.run(
            chunk_sums,
            "chunks",
            **strided(x=x, y=y, phi=self.phi(features)),
            **self.weights(features),
            factor=None if factors is None else factors[0],
            factor_norm=None if factors is None else factors[1],
            sums=sums,
            norms=norms,
            GROUP=group,
        )
        return sums, norms

    def prefix(
        self, sums: Tensor, initial: Tensor | None, dtype: torch.dtype, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """(before, kept) of `prefix_sums`."""
        size = sums[0, 0].numel()
        before = torch.empty_like(sums, dtype=dtype)
        sequences = self.rows.sequences
        kept = None
        if not reverse:
            kept = torch.zeros(2, sequences.shape[0], *sums.shape[1:], dtype=sums.dtype, device=sums.device)
        block = min(1024, 1 << (size - 1).bit_length())
        arguments = {
            "sums": sums,
            "initial": initial,
            "before": before,
            "kept": kept,
            "sequences": sequences,
            "KV_HEADS": self.kv_heads,
            "SIZE": size,
            "BLOCK": block,
            "ACC": TL_TYPES[self.wide],
            "REVERSE": reverse,
        }
        grid = (sequences.shape[0], self.kv_heads, -(-size // block))
        launch(prefix_sums, grid, arguments, num_warps=4, num_stages=3)
        return before, before if kept is None else kept

    def add_sinks(self, parts: Tensor, dx: Tensor) -> None:
        """The sinks' gradients, in parts (P, tiles, K, S, size), into dx."""
        tiles, size = parts.shape[1], parts.shape[-1]
        arguments = {
            "parts": parts,
            "sequences": self.rows.sequences,
            "chunks": self.rows.chunks,
            **strided(dx=dx),
            "KV_HEADS": self.kv_heads,
            "SIZE": size,
            "WINDOW": self.problem.window,
            "SINKS": self.problem.sinks,
            "TILES": tiles,
            "BLOCK": tile(size),
            "ACC": TL_TYPES[self.wide],
        }
        grid = (self.rows.sequences.shape[0], self.kv_heads, self.problem.sinks)
        launch(sink_gradients, grid, arguments, num_warps=4, num_stages=2)


def empty_outputs(q: Tensor, value_dim: int, padded: bool) -> tuple[Tensor, Tensor]:
    """out (B, H, T, V), contiguous as (B, T, H, V), and stats (3, B, H, T); zeros where padding stays unwritten."""
    batch, heads, length, _ = q.shape
    make = torch.zeros if padded else torch.empty
    out = make(batch, length, heads, value_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    return out, make(3, batch, heads, length, dtype=accumulation_dtype(q), device=q.device)


def _weight_gradient(x: Tensor, dp: Tensor, rows: Rows, window: int) -> Tensor:
    """sum over batch and tokens of x^T dp, (heads, D, HALF), accumulated in float32 (float64)."""
    if rows.padded:  # dp is 0 there, but a NaN times 0 is one
        x = torch.where(real_tokens(rows, x.shape[0], x.shape[2], window)[:, None, :, None], x, 0)
    x, dp = (y.transpose(0, 1).flatten(1, 2) for y in (x, dp))
    if x.is_cuda and x.element_size() == 2 and not torch.version.hip:
        return torch.bmm(x.transpose(1, 2), dp, out_dtype=torch.float32)
    wide = accumulation_dtype(x)
    return x.to(wide).transpose(1, 2) @ dp.to(wide)
