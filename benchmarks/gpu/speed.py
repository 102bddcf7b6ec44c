"""How fast the kernels are on a GPU, beside SDPA, PyTorch's compiler and fla, and how near to what the GPU allows.

Every row of a table is one thing that was timed: `ms` is the median and `ms min` the least of its repeats, each timed
by CUDA events after a sweep that empties the L2 cache. `bound ms` is the sum over the kernels of the least time that
the device's data sheet allows (`counts`, `traffic`), `of bound` is bound / ms, `GB/s` and `TFLOP/s` are what those
counts make of ms. SDPA counts its own arithmetic (half a square of causal pairs; 2.5 times as much backward) and its
inputs and outputs once. `peak MiB` is what a call takes beyond its inputs.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from linearize.kernels import fla_engine
from linearize.kernels.launch import current_target
from linearize.kernels.near_far import Hedgehog, Memory, near_far_attention
from linearize.kernels.near_far.chunked import near_far_chunked
from linearize.kernels.near_far.counts import MODELS as KNOWN
from linearize.kernels.near_far.counts import Shape, kernel_work
from linearize.kernels.near_far.traffic import DecodeShape, decode_bytes, decode_flops, decode_work

from ..attention_work import BACKWARD, FORWARD, Work, near_far_work, sdpa_step_work, sdpa_work
from ..steps import Section, Skip, Step
from .attention import new_kernels
from .timing import both_ways, flash, graphed, labelled, peak_mib, reported, row, time_calls

__all__ = ["speed_sections"]

SINKS, WINDOW = 4, 64
MODELS = {name: KNOWN[name] for name in ("Llama-3.1-8B", "SmolLM2-135M")}
TOKENS = (2048, 8192, 32768)
PROFILED = 8192
BATCHES = (1, 16, 64)
CONTEXTS = (1024, 8192, 32768)
Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """What is measured: models, tokens of prefill, batches and contexts of decoding, W and the dtype."""

    models: dict[str, tuple[int, int, int, int]]
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    profiled: int
    window: int
    dtype: torch.dtype


FULL = Scale(MODELS, TOKENS, BATCHES, CONTEXTS, PROFILED, WINDOW, torch.bfloat16)
TINY = Scale({"tiny": (2, 1, 16, 8)}, (48,), (2,), (40,), 48, 16, torch.float32)


def speed_sections(device: torch.device, rehearse: bool) -> list[Section]:
    """By importance. rehearse: tiny shapes in float32, timed on the CPU, which says nothing about speed."""
    scale = TINY if rehearse else FULL
    prefill = [
        (f"{model}, {tokens} tokens", partial(bench_prefill, model, tokens, scale, device))
        for tokens in scale.tokens
        for model in scale.models
    ]
    decode = [
        (f"{model}, batch {batch}", partial(bench_decode, model, batch, scale, device))
        for model in scale.models
        for batch in scale.batches
    ]
    profile = [(model, partial(profile_kernels, model, scale, device)) for model in scale.models]
    compiled = [(model, partial(bench_compiled, model, scale, device)) for model in scale.models]
    fla = [(model, partial(bench_fla, model, scale, device)) for model in scale.models]
    ways = (("forward", False), ("forward + backward", True))
    tuned = [
        (f"{model}, {way}", partial(bench_tuned, model, backward, scale, device))
        for way, backward in ways
        for model in scale.models
    ]
    found = (
        ("prefill", 100.0, prefill),
        ("decode step", 60.0, decode),
        ("kernels of one forward and backward", 40.0, profile),
        ("torch.compile of the chunked form", 100.0, compiled),
        ("simple_gla of flash-linear-attention", 40.0, fla),
        ("tuned blocks", 200.0, tuned),
    )
    return [Section(name, "speed", limit, tuple(Step(name, *step) for step in steps)) for name, limit, steps in found]


# --- inputs and work -----------------------------------------------------------------------------------------------


def make_shape(model: str, tokens: int, scale: Scale) -> Shape:
    """For `counts`."""
    heads, kv_heads, head_dim, half = scale.models[model]
    element = scale.dtype.itemsize
    return Shape(heads, kv_heads, head_dim, head_dim, half, scale.window, SINKS, tokens, element)


def random_tensor(*sizes: int, scale: Scale, device: torch.device) -> Tensor:
    """(B, heads, T, size), laid out as projections leave them: (B, T, heads, size)."""
    batch, heads, tokens, size = sizes
    return torch.randn(batch, tokens, heads, size, device=device, dtype=scale.dtype).transpose(1, 2)


def prefill_inputs(shape: Shape, scale: Scale, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Hedgehog, Tensor]:
    """q, k, v, mixer, mix_logit (B, H, T) of one row."""
    torch.manual_seed(0)
    q = random_tensor(1, shape.heads, shape.tokens, shape.head_dim, scale=scale, device=device)
    k, v = (
        random_tensor(1, shape.kv_heads, shape.tokens, shape.head_dim, scale=scale, device=device) for _ in range(2)
    )
    mixer = Hedgehog(shape.heads, shape.kv_heads, shape.head_dim, shape.half).to(device)
    return q, k, v, mixer, torch.randn(1, shape.heads, shape.tokens, device=device)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, grouped queries."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# --- measurements --------------------------------------------------------------------------------------------------


def bench_prefill(model: str, tokens: int, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Near-and-far attention and SDPA, forward and forward with backward."""
    shape = make_shape(model, tokens, scale)
    q, k, v, mixer, mix_logit = prefill_inputs(shape, scale, device)
    leaves = [x.requires_grad_() for x in (q, k, v, mix_logit)]
    options: dict[str, Any] = {"window": scale.window, "sinks": SINKS, "backend": "triton"}
    table: Table = []
    forward, backward = both_ways(
        lambda: near_far_attention(q, k, v, mixer, mix_logit, **options), [*leaves, *mixer.parameters()]
    )
    for what, run, work in (
        ("near-and-far forward", forward, near_far_work(shape, False)),
        ("near-and-far forward + backward", backward, near_far_work(shape, True)),
    ):
        table.append(row(what, time_calls(run, device), work, device, **{"peak MiB": peak_mib(run, device)}))
    if device.type == "cuda":
        times = time_calls(graphed(forward), device)
        table.append(row("near-and-far forward, CUDA graph", times, near_far_work(shape, False), device))

    with reported(table, "SDPA"), flash(device):
        forward, backward = both_ways(lambda: sdpa(q, k, v), leaves[:3])
        for what, run, work in (
            ("SDPA forward", forward, sdpa_work(shape, False)),
            ("SDPA forward + backward", backward, sdpa_work(shape, True)),
        ):
            table.append(row(what, time_calls(run, device), work, device, **{"peak MiB": peak_mib(run, device)}))
    return {"table": labelled(table, model=model, tokens=tokens), "kernels": new_kernels()}


def bench_decode(model: str, batch: int, scale: Scale, device: torch.device) -> dict[str, Any]:
    """A decode step at any context, and SDPA over as many keys as there are: on a GPU as CUDA graphs, without Python in
    between. `keys` says what is attended to; rows fold a chunk into the state once in W steps."""
    from linearize.kernels.near_far.triton_decode import decode_blocks, triton_step

    heads, kv_heads, head_dim, half = scale.models[model]
    group, element, window = heads // kv_heads, scale.dtype.itemsize, scale.window
    torch.manual_seed(0)
    q, k, v = (random_tensor(batch, n, 1, head_dim, scale=scale, device=device) for n in (heads, kv_heads, kv_heads))
    mixer = Hedgehog(heads, kv_heads, head_dim, half).to(device)
    mix_logit = torch.randn(batch, heads, 1, device=device)
    memory = Memory.empty(k, v, mixer, window=window, sinks=SINKS)
    assert memory.state is not None
    for x in (memory.near_k, memory.near_v, memory.sink_k, memory.sink_v, memory.state.s):
        x.normal_()
    memory.state.z.fill_(100.0)
    memory.uniform = None

    @torch.no_grad()
    def step() -> Tensor:
        return triton_step(q, k, v, memory, mixer, mix_logit, window=window, sinks=SINKS)

    def folding_step() -> Tensor:
        memory.lengths.fill_(10 * window)  # one more small kernel
        return step()

    sizes: dict[str, Any] = {"batch": batch, "kv_heads": kv_heads, "window": window, "sinks": SINKS}
    sizes |= {"head_dim": head_dim, "value_dim": head_dim, "half": half}
    blocks = decode_blocks(current_target(device), group=group, element_bytes=element, **sizes)
    shape = DecodeShape(heads=heads, element=element, splits=blocks.SPLITS, **sizes)
    moved, fold = decode_bytes(shape), window * decode_work("decode_fold", shape)[0]
    plain = [(decode_flops(shape) - fold / window, moved.from_memory - moved.fold + moved.weights)]
    folding = [(plain[0][0] + fold, plain[0][1] + window * moved.fold)]
    graph = graphed if device.type == "cuda" else _itself
    table: Table = []
    for what, run, work in (
        ("near-and-far step, called from Python", step, plain),
        ("near-and-far step", graph(step), plain),
        ("near-and-far step, all rows fold", graph(folding_step), folding),
    ):
        memory.lengths.fill_(10 * window + 1)  # the next W - 1 steps fold nothing
        table.append(row(what, time_calls(run, device), work, device, keys="any"))
    # The G queries of a group as rows of one head: keys are then read once by definition.
    forms = (("SDPA, grouped heads", q), ("SDPA, groups as rows", q.reshape(batch, kv_heads, group, head_dim)))
    for keys in scale.contexts:
        old = [torch.randn(batch, kv_heads, keys, head_dim, device=device, dtype=scale.dtype) for _ in "kv"]
        work = sdpa_step_work(make_shape(model, keys, scale), batch)
        for what, queries in forms:
            attend = torch.no_grad()(partial(attend_all, queries, *old))
            with reported(table, what), flash(device):
                table.append(row(what, time_calls(graph(attend), device), work, device, keys=keys))
    return {
        "table": labelled(table, model=model, batch=batch),
        "splits": blocks.SPLITS,
        "bytes": moved._asdict(),
        "kernels": new_kernels(),
    }


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries over all keys."""
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _itself(run: Callable[[], Any]) -> Callable[[], Any]:
    return run


def profile_kernels(model: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Each kernel of one forward and backward pass: launches, time, and its bound."""
    if device.type != "cuda":
        raise Skip("there are no kernels to profile on a CPU")
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    shape = make_shape(model, scale.profiled, scale)
    q, k, v, mixer, mix_logit = prefill_inputs(shape, scale, device)
    leaves = [x.requires_grad_() for x in (q, k, v, mix_logit)]
    options: dict[str, Any] = {"window": scale.window, "sinks": SINKS, "backend": "triton"}
    _, both = both_ways(
        lambda: near_far_attention(q, k, v, mixer, mix_logit, **options), [*leaves, *mixer.parameters()]
    )
    both()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
        both()
        torch.cuda.synchronize()
    work: dict[str, Work] = {}
    for name in FORWARD + BACKWARD:
        work.setdefault(name.replace("chunk_sums_backward", "chunk_sums"), []).append(kernel_work(name, shape))
    table: Table = []
    events = [event for event in measured.key_averages() if event.device_type == DeviceType.CUDA]
    for event in sorted(events, key=lambda event: -event.self_device_time_total):
        ms = event.self_device_time_total / 1e3
        if ms <= 0:
            continue
        if event.key in work:
            found = row(event.key, (ms, ms), work[event.key], device)
        else:
            found = {"what": event.key[:60], "ms": round(ms, 4)}
        found.pop("ms min", None)
        table.append({"launches": event.count, **found})
    return {"table": labelled(table, model=model, tokens=scale.profiled)}


def bench_compiled(model: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """What PyTorch's compiler makes of the chunked form. compile s: its first call."""
    if device.type != "cuda":
        raise Skip("code of torch.compile for a CPU says nothing here")
    shape = make_shape(model, scale.profiled, scale)
    q, k, v, mixer, mix_logit = prefill_inputs(shape, scale, device)
    leaves = [x.requires_grad_() for x in (q, k, v, mix_logit)]
    torch._dynamo.reset()
    compiled = torch.compile(near_far_chunked, dynamic=False)
    table: Table = []
    for form, function in (("chunked", near_far_chunked), ("chunked, compiled", compiled)):
        start = time.perf_counter()
        forward, backward = both_ways(
            partial(function, q, k, v, mixer, mix_logit, window=scale.window, sinks=SINKS),
            [*leaves, *mixer.parameters()],
        )
        for what, run, work in (
            ("forward", forward, near_far_work(shape, False)),
            ("forward + backward", backward, near_far_work(shape, True)),
        ):
            run()
            torch.cuda.synchronize()
            seconds = round(time.perf_counter() - start, 1)
            more = {"peak MiB": peak_mib(run, device), "first call s": seconds}
            table.append(row(f"{form}, {what}", time_calls(run, device), work, device, **more))
            start = time.perf_counter()
    return {"table": labelled(table, model=model, tokens=scale.profiled)}


def bench_fla(model: str, scale: Scale, device: torch.device) -> dict[str, Any]:
    """fla's linear attention with a decay a head on the same q, k, v: no window, no sinks, a state of D x V. Keys are
    repeated for its heads inside the timed call, as it has no grouped queries."""
    if find_spec("fla") is None:
        raise Skip("flash-linear-attention is not installed")
    if device.type != "cuda":
        raise Skip("flash-linear-attention's kernels need a GPU")
    shape = make_shape(model, scale.profiled, scale)
    q, k, v, _, _ = prefill_inputs(shape, scale, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    log_decay = -torch.rand(shape.kv_heads, device=device) / 16
    forward, backward = both_ways(lambda: fla_engine.simple_gla(q, k, v, log_decay, backend="fla")[0], leaves)
    table: Table = []
    for what, run in (("simple_gla forward", forward), ("simple_gla forward + backward", backward)):
        ms, least = time_calls(run, device)
        found = {"what": what, "ms": round(ms, 4), "ms min": round(least, 4), "peak MiB": peak_mib(run, device)}
        table.append(found)
    return {"table": labelled(table, model=model, tokens=scale.profiled)}


def bench_tuned(model: str, backward: bool, scale: Scale, device: torch.device) -> dict[str, Any]:
    """Default blocks against those that a measurement chooses (LINEARIZE_TUNE=1), from an empty cache of choices.

    gain: the default's ms over the tuned. choices: index of the candidate by kernel and shape, 0 is the default.
    """
    if device.type != "cuda":
        raise Skip("blocks are tuned on a GPU")
    from linearize.kernels import launch, tuning

    shape = make_shape(model, scale.profiled, scale)
    q, k, v, mixer, mix_logit = prefill_inputs(shape, scale, device)
    leaves = [x.requires_grad_() for x in (q, k, v, mix_logit)]
    options: dict[str, Any] = {"window": scale.window, "sinks": SINKS, "backend": "triton"}
    before = {name: os.environ.get(name) for name in ("LINEARIZE_TUNE", "XDG_CACHE_HOME")}
    table: Table = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.environ["XDG_CACHE_HOME"] = folder
            for form in ("default", "tuned"):
                os.environ["LINEARIZE_TUNE"] = "1" if form == "tuned" else "0"
                launch._chosen.clear()
                tuning._choices.cache_clear()
                start = time.perf_counter()
                ways = both_ways(
                    lambda: near_far_attention(q, k, v, mixer, mix_logit, **options), [*leaves, *mixer.parameters()]
                )
                ways[backward]()
                torch.cuda.synchronize()
                more = {"first call s": round(time.perf_counter() - start, 1)}
                times = time_calls(ways[backward], device)
                table.append(row(form, times, near_far_work(shape, backward), device, **more))
            choices = dict(tuning._choices())
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            launch._chosen.clear()
            tuning._choices.cache_clear()
    table[1]["gain"] = round(table[0]["ms"] / table[1]["ms"], 3)
    labels = {"model": model, "pass": "forward + backward" if backward else "forward"}
    return {"table": labelled(table, **labels), "choices": choices}
