"""The least time that a piece of work can take: bytes that must move over bandwidth, operations over peak.

    seconds >= max(bytes / bandwidth, operations / peak) + overhead

The rates are those of a data sheet (`named_roof`) or of this machine (`bandwidth`, `measured_roof`). A sheet's rates
are reached by no program, and a machine's own by few, so what comes out is a bound: no faster than this. The overhead
is what a step takes besides, whatever it moves (Python, launches, small operations); nothing but measured steps can
tell it (`calibrate`), and without them it is left out.

What a model's step moves and computes is counted in `linearize.benchmarks.step_costs`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from linearize.benchmarks.machine import available_memory, machine_info, time_ms
from linearize.benchmarks.step_costs import ModelCosts, StepBytes, model_costs, step_bytes, step_flops
from linearize.errors import LinearizeError
from linearize.kernels.devices import DEVICES

__all__ = [
    "GPUS",
    "HERE",
    "ModelCosts",
    "Roof",
    "StepBytes",
    "bandwidth",
    "calibrate",
    "measured_roof",
    "model_costs",
    "named_roof",
    "predict",
    "predicted_crossover",
    "step_bytes",
    "step_flops",
    "step_seconds",
]

HERE = "here"
# Names on the command line -> those of `linearize.kernels.devices`, which has the sources of the figures.
GPUS = {
    "h100": "H100",
    "h200": "H200",
    "a100-80g": "A100",
    "a10": "A10",
    "l4": "L4",
    "l40s": "L40S",
    "rtx4090": "RTX 4090",
    "mi300x": "MI300X",
}
MIB = 2**20
# Of the buffer that is read: several times any last-level cache, but no large share of what is free.
CPU_MIB, GPU_MIB = 256, 1024
CACHES, FREE_SHARE = 4, 1 / 8
COLUMNS = 4096  # of the buffer as a matrix
MATMUL = {"cpu": 768, "cuda": 4096}
REPEATS = 7
FURTHEST = 2**30  # tokens; a crossover beyond is none


@dataclass(frozen=True)
class Roof:
    """What bounds a step on one device.

    Attributes:
        name: of the device.
        bandwidth: bytes a second that memory gives.
        peaks: operations a second of matrix products, by dtype.
        memory: its bytes; None where nothing says it.
        measured: on this machine, rather than read in a data sheet.
        overhead_s: seconds that every step takes besides; None where no step was measured.
    """

    name: str
    bandwidth: float
    peaks: Mapping[str, float]
    memory: float | None
    measured: bool = False
    overhead_s: float | None = None


def named_roof(name: str) -> Roof:
    """The data sheet of a GPU, one of `GPUS`: full rates, without sparsity, float32 without TF32.

    Raises:
        LinearizeError: another name.
    """
    if name not in GPUS:
        raise LinearizeError(f"gpu: {name!r} is unknown; use {HERE} for this machine, or one of {', '.join(GPUS)}")
    sheet = DEVICES[GPUS[name]]
    peaks = {"float32": sheet.fp32, "bfloat16": sheet.bf16, "float16": sheet.bf16}
    return Roof(sheet.name, sheet.bandwidth, peaks, sheet.memory)


def measured_roof(
    device: str | torch.device = "cpu", dtypes: Sequence[str] = ("float32",), found: dict[str, Any] | None = None
) -> Roof:
    """This machine: `found` of `bandwidth`, measured now where it is left out."""
    device = torch.device(device)
    found = found or bandwidth(device, dtypes=dtypes)
    peaks = {dtype: 1e9 * rate for dtype, rate in found["matmul_gflop_s"].items()}
    return Roof(found["name"], 1e9 * found["read_gb_s"], peaks, _total_memory(device), measured=True)


def predict(moved: float, operations: float, roof: Roof, dtype: str) -> float:
    """Seconds of work of `moved` bytes and so many operations in `dtype`; see the module.

    Raises:
        LinearizeError: a dtype that the roof has no peak for.
    """
    if dtype not in roof.peaks:
        raise LinearizeError(f"dtype: there is no rate in {dtype!r} for {roof.name}; use {', '.join(roof.peaks)}")
    return max(moved / roof.bandwidth, operations / roof.peaks[dtype]) + (roof.overhead_s or 0.0)


def step_seconds(costs: ModelCosts, context: int, batch: int, roof: Roof) -> float:
    """`predict` of a decode step of `batch` rows with `context` tokens behind each."""
    moved = step_bytes(costs, context, batch).total
    return predict(moved, step_flops(costs, context, batch), roof, costs.dtype)


def calibrate(roof: Roof, steps: Sequence[tuple[float, float]]) -> Roof:
    """The roof with the overhead that measured steps show: the median of what they took beyond their bounds.

    steps: (seconds by the bound alone, seconds measured). One overhead is not below 0; without steps there is none.
    """
    excess = [max(0.0, measured - bound) for bound, measured in steps]
    return replace(roof, overhead_s=median(excess) if excess else None)


def predicted_crossover(original: ModelCosts, student: ModelCosts, roof: Roof, batch: int = 1) -> int | None:
    """The least context in tokens from which a step of the student is predicted to take less time; None where it never
    does. Between bounds that differ by a constant and a slope there is one such context."""

    def faster(context: int) -> bool:
        return step_seconds(student, context, batch, roof) < step_seconds(original, context, batch, roof)

    high = 1
    while not faster(high):
        high *= 2
        if high > FURTHEST:
            return None
    low = high // 2  # not faster, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high


# --- this machine --------------------------------------------------------------------------------------------------


def bandwidth(
    device: str | torch.device = "cpu",
    threads: int | None = None,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    buffer_mib: int | None = None,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Measure how fast a device reads and copies memory and multiplies matrices.

    Reading sums a float32 buffer much larger than the caches, and multiplies it as a matrix with a vector: both read
    all of it once, and the faster one counts. A copy counts every byte twice, once read and once written. Repeats take
    turns; the best of them is what the memory gives, the medians show how busy the machine was.

    Args:
        device: "cpu", "cuda", ...
        threads: of PyTorch, while measuring; what is set now if left out.
        dtypes: of the matrix products.
        buffer_mib: size of the buffer; if left out 256 MiB (GPU: 1024), at least 4 times the last-level caches, and at
            most an eighth of what is free.
        repeats: of each test.

    Returns:
        {"device": str, "name": str, "threads": int, "read_gb_s": float, "read_gb_s_median": float, "copy_gb_s": float,
        "copy_gb_s_median": float, "matmul_gflop_s": {dtype: float}, "matmul_gflop_s_median": {dtype: float},
        "matmul_size": int, "buffer_mib": int, "last_level_cache_mib": float | null, "repeats": int}, with GB and GFLOP
        of 1e9.

    Raises:
        LinearizeError: a number below 1, or too little free memory for a buffer.
    """
    device = torch.device(device)
    for option, value in (("threads", threads), ("buffer_mib", buffer_mib), ("repeats", repeats)):
        if value is not None and value < 1:
            raise LinearizeError(f"{option}: {value} is below 1; use 1 or more")
    caches = _last_level_cache(device)
    mib = _buffer_mib(device, caches) if buffer_mib is None else buffer_mib
    with _threads(threads), torch.no_grad():
        matrix = torch.ones(mib * MIB // (4 * COLUMNS), COLUMNS, device=device)
        vector, other = torch.ones(COLUMNS, device=device), torch.empty_like(matrix)
        size = MATMUL["cuda" if device.type == "cuda" else "cpu"]
        pairs: dict[str, Tensor] = {
            dtype: torch.ones(size, size, device=device, dtype=getattr(torch, dtype)) for dtype in dtypes
        }
        tests: dict[str, Callable[[], Any]] = {
            "sum": lambda: matrix.sum(),
            "product": lambda: matrix @ vector,
            "copy": lambda: other.copy_(matrix),
        }
        tests |= {dtype: lambda x=x: x @ x for dtype, x in pairs.items()}  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in tests}
        for repeat in range(repeats + 1):
            for name, test in tests.items():
                ms = time_ms(test, device)
                if repeat:  # the first one warms up
                    times[name].append(ms)
        used = torch.get_num_threads()
    gigabytes, giga_operations = 4 * matrix.numel() / 1e9, 2 * size**3 / 1e9
    reader = min(("sum", "product"), key=lambda name: min(times[name]))
    machine = machine_info()
    return {
        "device": str(device),
        "name": machine["gpu"]["name"] if device.type == "cuda" else machine["cpu"]["model"] or "this CPU",
        "threads": used,
        "read_gb_s": 1e3 * gigabytes / min(times[reader]),
        "read_gb_s_median": 1e3 * gigabytes / median(times[reader]),
        "copy_gb_s": 2e3 * gigabytes / min(times["copy"]),
        "copy_gb_s_median": 2e3 * gigabytes / median(times["copy"]),
        "matmul_gflop_s": {dtype: 1e3 * giga_operations / min(times[dtype]) for dtype in dtypes},
        "matmul_gflop_s_median": {dtype: 1e3 * giga_operations / median(times[dtype]) for dtype in dtypes},
        "matmul_size": size,
        "buffer_mib": mib,
        "last_level_cache_mib": None if caches is None else round(caches / MIB, 1),
        "repeats": repeats,
    }


def _buffer_mib(device: torch.device, caches: int | None) -> int:
    """As large as `bandwidth` says."""
    wanted = max(GPU_MIB if device.type == "cuda" else CPU_MIB, CACHES * (caches or 0) // MIB)
    free = available_memory(device)
    mib = wanted if free is None else min(wanted, int(free * FREE_SHARE) // MIB)
    if mib < 1:
        raise LinearizeError(f"buffer_mib: {device} has {free or 0} bytes free, too few to measure with; free some")
    return mib


def _total_memory(device: torch.device) -> float | None:
    """Bytes that the device has; None where nothing says it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    gib = machine_info()["memory_gib"]
    return None if gib is None else gib * 2**30


def _last_level_cache(device: torch.device, root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Bytes of all last-level caches together, or None where nothing says it."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or None
    found: dict[tuple[int, str], int] = {}  # (level, who shares it) -> bytes
    for folder in root.glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            found[int(level), shared] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
