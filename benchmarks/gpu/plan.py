"""All steps of `linearize.benchmarks.gpu_check`, by importance; a worker process builds the same list."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from linearize.kernels.near_far import near_far_attention

from ..steps import CheckFailed, Section, Step
from .attention import BF16, CASES, FP32, REHEARSED, check_attention, compare, short
from .decode import DECODED, REHEARSED_DECODED, check_decode, check_graph
from .integration import (
    ENGINES,
    check_compiled,
    check_compiled_model,
    check_divergence,
    check_engine,
    check_generate,
    check_logits,
    check_operator,
    check_split,
)
from .speed import speed_sections

__all__ = ["make_sections"]

Steps = list[tuple[str, Callable[[], dict[str, Any]]]]
REHEARSED_STEPS = 4  # of decoding: the second and the third fold a chunk in some row


def make_sections(device: torch.device, rehearse: bool) -> list[Section]:
    """Environment, correctness, speed. rehearse: tiny shapes for Triton's interpreter."""
    environment = Step("environment", "Triton kernels run here", partial(check_environment, device))
    return [
        Section("environment", "essential", 120, (environment,)),
        *_correctness(device, rehearse),
        *speed_sections(device, rehearse),
    ]


def _correctness(device: torch.device, small: bool) -> list[Section]:
    attention: Steps = [(case.name, partial(check_attention, case, device)) for case in (REHEARSED if small else CASES)]
    cases, steps = (REHEARSED_DECODED, REHEARSED_STEPS) if small else (DECODED, None)
    decode: Steps = [(case.name, partial(check_decode, case, device, None, steps)) for case in cases]
    decode += [(f"{case.name}, CUDA graph", partial(check_graph, case, device)) for case in cases]
    decode += [(f"{case.name}, one split", partial(check_decode, case, device, 1, steps)) for case in cases[:2]]
    transfer: Steps = []
    for dtype in (FP32,) if small else (FP32, BF16):
        transfer.append((f"{short(dtype)}, softmax in two parts", partial(check_split, dtype, device, small)))
        transfer.append((f"{short(dtype)}, divergence", partial(check_divergence, dtype, device, small)))
    compiler: Steps = [
        (f"opcheck, far {far}", partial(check_operator, far, device)) for far in ("none", "normalizer", "gate")
    ]
    compiler.append(("torch.compile of attention, fullgraph", partial(check_compiled, device, small)))
    model: Steps = [
        ("logits", partial(check_logits, device)),
        ("generate", partial(check_generate, device, small)),
        ("torch.compile, fullgraph", partial(check_compiled_model, device)),
    ]
    engines: Steps = [(name, partial(check_engine, name, device)) for name in ENGINES]
    found: tuple[tuple[str, float, Steps], ...] = (
        ("attention", 400.0, attention),
        ("decode", 150.0, decode),
        ("transfer", 100.0, transfer),
        ("operators", 120.0, compiler),
        ("converted Llama", 150.0, model),
        ("flash-linear-attention", 100.0, engines),
    )
    return [
        Section(name, "correctness", seconds, tuple(Step(name, *step) for step in steps), parallel=True)
        for name, seconds, steps in found
    ]


def check_environment(device: torch.device) -> dict[str, Any]:
    """What this runs on, what `linearize doctor` says of it, and whether a kernel runs at all."""
    from linearize.kernels.backends import doctor
    from linearize.kernels.tuning import tuning_file

    from ..machine import machine_info

    values: dict[str, Any] = {
        "machine": machine_info(seed=0),
        "doctor": [[check.name, check.works, check.detail] for check in doctor()],
        "tuning_file": tuning_file().exists(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "toolkit": torch.version.cuda or torch.version.hip,
        }
    q, k, v = (torch.randn(1, 1, 40, 16, device=device) for _ in range(3))
    try:
        out = near_far_attention(q, k, v, window=16, backend="triton")
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        raise CheckFailed(" ".join(f"{type(error).__name__}: {error}".split()), values) from error
    truth = near_far_attention(q.double(), k.double(), v.double(), window=16, backend="reference")
    return values | compare({"out": out}, {"out": truth}, FP32)
