"""What kernels are compiled for (`Target`) and what they run on (`Device`): limits and peak rates.

Sources: NVIDIA CUDA C++ programming guide, table of compute capabilities (shared memory of a block, registers);
NVIDIA data sheets A100 80 GB SXM, H100 SXM, H200 SXM, A10, L4, L40S (dense rates); NVIDIA Ada GPU architecture white
paper, table of the GeForce RTX 4090 (tensor cores with float32 sums); AMD CDNA 3 white paper and MI300X data sheet.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["DEVICES", "INTERPRETER", "TARGETS", "Device", "Target", "target_of"]


@dataclass(frozen=True)
class Target:
    """A compilation target.

    arch: as Triton names it; backend: "cuda" or "hip"; warp: threads a warp; shared: bytes of shared memory that one
    block may have.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int


@dataclass(frozen=True)
class Device:
    """A GPU's memory and peak rates.

    bandwidth: bytes a second; bf16, tf32: dense operations a second on tensor cores; fp32: those without tensor cores;
    memory: bytes, with the data sheet's GB read as 1e9: what a GPU shows is up to 7 % more, which is about what driver,
    context and allocator take of it.
    """

    name: str
    target: Target
    bandwidth: float
    bf16: float
    tf32: float
    fp32: float
    memory: float


TARGETS = {
    "sm_80": Target("sm_80", "cuda", 80, 32, 163 * 1024),
    "sm_90": Target("sm_90", "cuda", 90, 32, 227 * 1024),
    "gfx942": Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
}
# Triton's interpreter on a CPU has no limits; small blocks make its grids run through every loop.
INTERPRETER = Target("interpreter", "cuda", 90, 32, 48 * 1024)

# What cards other than those of data centres have; nothing is compiled for them ahead of time.
SM_86 = Target("sm_86", "cuda", 86, 32, 99 * 1024)
SM_89 = Target("sm_89", "cuda", 89, 32, 99 * 1024)

DEVICES = {
    "A100": Device("A100", TARGETS["sm_80"], 2.039e12, 312e12, 156e12, 19.5e12, 80e9),
    "H100": Device("H100", TARGETS["sm_90"], 3.35e12, 989e12, 494e12, 67e12, 80e9),
    "H200": Device("H200", TARGETS["sm_90"], 4.8e12, 989e12, 494e12, 67e12, 141e9),
    "A10": Device("A10", SM_86, 0.6e12, 125e12, 62.5e12, 31.2e12, 24e9),
    "L4": Device("L4", SM_89, 0.3e12, 121e12, 60e12, 30.3e12, 24e9),
    "L40S": Device("L40S", SM_89, 0.864e12, 362e12, 183e12, 91.6e12, 48e9),
    "RTX 4090": Device("RTX 4090", SM_89, 1.008e12, 165e12, 82.6e12, 82.6e12, 24e9),
    "MI300X": Device("MI300X", TARGETS["gfx942"], 5.3e12, 1307e12, 653e12, 163e12, 192e9),
}


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a torch device; `INTERPRETER` for anything that is no GPU."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return TARGETS.get(arch) or Target(arch, "hip", arch, properties.warp_size, 64 * 1024)
    name = f"sm_{properties.major}{properties.minor}"
    capability = 10 * properties.major + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)  # the least of any since sm_80
    return TARGETS.get(name) or Target(name, "cuda", capability, 32, shared)
