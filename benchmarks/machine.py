"""What a measurement ran on, so that a number can be traced: machine, versions, commit, command line, seed.

`machine_info` returns

    {"date": "2026-01-31T12:00:00+00:00",          start, UTC
     "system": "Linux 6.1 x86_64",
     "cpu": {"model": str | null, "cores": int, "usable": int, "quota": float | null, "flags": [str, ...]},
     "memory_gib": float | null,
     "gpu": {"name": str, "memory_gib": float} | null,
     "threads": int,                               PyTorch's, on the CPU
     "threads_set": {"OMP_NUM_THREADS": "2", ...}, the variables of the environment that set them; {}: none did
     "versions": {"python": str, "torch": str, "transformers": str | null, "peft": ..., "linearize": ...},
     "commit": {"hash": str, "changed": bool} | null,
     "command": str, "seed": int | null}
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

import linearize

__all__ = ["available_memory", "machine_info", "matmul_ms", "synchronize", "time_ms"]

# The instructions that decide which dtype is fast on a CPU.
FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8")
# The names that ARM gives to the same.
FLAGS_ARM = ("asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2")
# What PyTorch's pools of threads read when they start.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
PACKAGES = ("transformers", "peft", "accelerate", "triton", "flash-linear-attention")
CGROUP, MEMINFO = Path("/sys/fs/cgroup"), Path("/proc/meminfo")
MATMUL_SIZE = 512
MATMUL_REPEATS = 7


def machine_info(seed: int | None = None, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Describe this machine and this run; the keys are in the module's docstring.

    Args:
        seed: of the run.
        command: the command line as a list; this process's by default.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu(),
        "threads": torch.get_num_threads(),
        "threads_set": {name: os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name)},
        "versions": _versions(),
        "commit": _commit(Path(linearize.__file__).resolve().parents[1]),
        "command": _command(sys.argv if command is None else command),
        "seed": seed,
    }


def matmul_ms(device: torch.device) -> float:
    """Milliseconds of one fixed float32 matrix product, 512 x 512, median of seven.

    Timed before and after a measurement it shows whether the machine itself became faster or slower in between.
    """
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, device=device)
    times = []
    for _ in range(MATMUL_REPEATS + 1):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return median(times[1:])  # the first one warms up


def time_ms(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Milliseconds of a call, as a mean over so many in a row: on a GPU by events on its stream, else by the clock."""
    synchronize(device)
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / calls
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a GPU; on a CPU nothing is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where nothing tells.

    On a GPU what is free, and what PyTorch holds without using it. On a CPU what Linux calls available, or what is left
    of a container's limit, where that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [left for left in (_meminfo_available(), _cgroup_left()) if left is not None]
    return min(found, default=None)


def _meminfo_available() -> int | None:
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_left() -> int | None:
    """What is left of the container's limit; pages of files that the kernel would give up count as left."""
    try:
        limit, used = (int((CGROUP / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        kinds = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        return None
    return max(limit - used + int(kinds.get("inactive_file", 0)), 0)


def _cpu() -> dict[str, Any]:
    model, found = None, set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines, model = [], platform.processor() or None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            found = set(value.split())
    cores = os.cpu_count() or 1
    return {
        "model": model,
        "cores": cores,
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        "quota": _cpu_quota(),
        "flags": [flag for flag in (*FLAGS, *FLAGS_ARM) if flag in found],
    }


def _cpu_quota() -> float | None:
    """How many cores' time the container may use, or None where nothing limits it. `os.cpu_count` does not know."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "linearize": linearize.__version__,
    }
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _commit(root: Path) -> dict[str, Any] | None:
    """The commit of the checkout that linearize runs from; None for an installed copy or without git."""
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _command(argv: Sequence[str]) -> str:
    """The command line as one would type it, without the folder of the program."""
    if not argv:
        return ""
    program = ["python", "-m", "linearize"] if Path(argv[0]).name == "__main__.py" else [Path(argv[0]).name]
    return shlex.join([*program, *argv[1:]])
