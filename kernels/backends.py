"""What runs where: the choice of `backend="auto"`, why a backend cannot run, and the one line that a fallback logs."""

import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["BACKENDS", "Check", "choose_backend", "doctor", "interpreted", "log_once", "triton_obstacle"]

BACKENDS = ("auto", "reference", "torch", "triton")
MAX_HEAD_DIM = 256
MAX_FEATURES = 512

logger = logging.getLogger("linearize")


@lru_cache(maxsize=512)
def log_once(message: str) -> None:
    """Log `message` as a warning, the first time that it comes up in this process."""
    logger.warning(message)


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU: TRITON_INTERPRET=1 when triton was imported."""
    if find_spec("triton") is None:
        return False
    from .near_far.triton_forward import attention_forward

    return type(attention_forward).__name__ == "InterpretedFunction"


def device_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device at all; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return _gpu_obstacle(device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if interpreted() else "TRITON_INTERPRET=1 was set after triton had been imported"
    return f"Triton has no kernels for {device.type} tensors"


@lru_cache  # asked at every call of every layer
def _gpu_obstacle(device: torch.device) -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"the GPU has compute capability {major}.{minor}, below 8.0"


def triton_obstacle(q: Tensor, v: Tensor, num_features: int) -> str | None:
    """Why the Triton kernels cannot take this call; None where they can. q: (B, H, T, D), v: (B, K, T, V)."""
    obstacle = device_obstacle(q.device)
    if obstacle is not None:
        return obstacle
    if q.dtype == torch.float64 and q.device.type == "cuda":
        return "they take float32, bfloat16 and float16, not float64"
    for name, size in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if size > MAX_HEAD_DIM:
            return f"{name} has head size {size}, above {MAX_HEAD_DIM}"
    if num_features > MAX_FEATURES:
        return f"the mixer has {num_features} features, above {MAX_FEATURES}"
    return None


def choose_backend(backend: str, q: Tensor, v: Tensor, num_features: int = 0, obstacle: str | None = None) -> str:
    """ "reference", "torch" or "triton" for a call with these tensors.

    "auto" is "triton" on a GPU that it supports and "torch" elsewhere; a GPU that must do with "torch" logs why, once.
    obstacle: what else keeps the Triton kernels from this call, in words, where the caller knows of something.

    Raises:
        LinearizeError: an unknown backend, or "triton" where it cannot run.
    """
    from linearize.errors import LinearizeError

    if backend not in BACKENDS:
        raise LinearizeError(f"backend: {backend!r} is unknown; known: {', '.join(BACKENDS)}")
    if backend in ("reference", "torch") or (backend == "auto" and q.device.type == "cpu"):
        return "torch" if backend == "auto" else backend
    obstacle = triton_obstacle(q, v, num_features) or obstacle
    if obstacle is None:
        return "triton"
    if backend == "auto":
        log_once(f"near-and-far attention runs in PyTorch on {q.device.type}: {obstacle}")
        return "torch"
    raise LinearizeError(
        f"backend: 'triton' cannot run here: {obstacle}; use backend='auto' or 'torch', which runs on any device"
    )


@dataclass(frozen=True)
class Check:
    """A line of `doctor`. works: whether this is used, or could be; detail: what it is, or why it is not."""

    name: str
    works: bool
    detail: str


def doctor() -> list[Check]:
    """What runs on this machine and why: devices, Triton, the backend that "auto" takes, flash-linear-attention."""
    checks = [Check("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")]
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if not devices:
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no device" if built else "torch is built for the CPU only"
        checks.append(Check("GPU", False, why))
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        checks.append(Check(f"GPU {device.index}", True, detail))
    for device in devices or [torch.device("cpu")]:
        obstacle = device_obstacle(device)
        name = f"Triton kernels on {device}"
        works = "compiled" if device.type == "cuda" else "in the interpreter, for tests"
        checks.append(Check(name, obstacle is None, obstacle or works))
        chosen = "triton" if obstacle is None and device.type == "cuda" else "torch"
        checks.append(Check(f"backend 'auto' on {device}", True, chosen))
    checks.append(_fla())
    return checks


def _fla() -> Check:
    if find_spec("fla") is None:
        return Check("flash-linear-attention", False, "not installed; states with decay or delta rule run in PyTorch")
    if not torch.cuda.is_available():
        return Check("flash-linear-attention", False, "installed; its kernels need a GPU, PyTorch runs instead")
    return Check("flash-linear-attention", True, "installed")
