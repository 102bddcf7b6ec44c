"""Compile a recorded launch for a GPU that is not here, and read what it needs from what the compilers made of it.

Triton's wheel carries its compilers whole: PTX and cubin with ptxas and cuobjdump, amdgcn and hsaco with LLVM. Nothing
here asks a driver. Where the numbers come from:

- NVIDIA: `ptxas -v` on Triton's PTX, which alone tells spilled bytes from other stack; `cuobjdump` on Triton's own
  cubin must show the same registers and stack. Few registers prove nothing, as ptxas can give up and spill all.
- AMD: the metadata at the end of the amdgcn text, with vector and accumulation registers as one file (CDNA).
- Shared memory: Triton compares it with the device at launch only. Too much of it compiles; here it is a problem.

What a compiler assumes of arguments decides the code, so the signature is the one that Triton's run-time compiler would
derive: pointers and integers that 16 divides say so, the integer 1 is a constant, and so is None.
"""

import importlib
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import LinearizeError
from linearize.kernels.devices import Target
from linearize.kernels.launch import Launch

__all__ = ["Compilation", "Resources", "compilation_of", "compile_launch", "compile_offline"]

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bool: "*u1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNMENT = 16
TENSOR_INSTRUCTIONS = {
    "cuda": {"wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync"},
    "hip": {"mfma": r"\bv_mfma_"},
}
# A dot that stays with ordinary arithmetic keeps the layout of ordinary values.
SCALAR_DOT = re.compile(r"= tt\.dot ([^\n]*?) : tensor<[\dx]*x(\w+), [^\n]*-> tensor<[^\n]*?, #blocked\d*>")
# Of one multiprocessor: warps at once by architecture, blocks at once, bytes of shared memory beyond a block's limit
# (CUDA keeps 1 KB a block for itself). Sources: CUDA programming guide, compute capabilities; CDNA 3 ISA reference.
WARPS_PER_SM: dict[int | str, int] = {80: 64, 90: 64, "gfx942": 32}
BLOCKS_PER_SM = 32
CUDA_RESERVED = 1024
REGISTER_FILE = 65536  # 32-bit registers of an NVIDIA multiprocessor
VGPRS_PER_LANE = 512  # of each of the 4 SIMD units of an AMD compute unit
SIMD_UNITS = 4  # of a multiprocessor of either maker; a warp stays on one
REGISTER_GRANULE = 8  # registers of a thread are given out in eights


@dataclass(frozen=True)
class Compilation:
    """What decides the machine code of a launch.

    module, kernel: where the function under `@triton.jit` is; types: a Triton type for each parameter by name;
    constants: values of the constexprs; hints: (index of the parameter, ((name, value), ...)).
    """

    module: str
    kernel: str
    target: Target
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    hints: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    num_warps: int
    num_stages: int

    @property
    def key(self) -> str:
        """Equal for equal compilations; unlike `==` it tells 1 from True."""
        return repr((self.module, self.kernel, self.target.name, self.types, self.constants, self.hints)) + repr(
            (self.num_warps, self.num_stages)
        )


@dataclass(frozen=True)
class Resources:
    """What a kernel needs of its target.

    registers, register_limit: of a thread (AMD: of a lane, vector and accumulation together); spill: bytes a thread
    stores to and loads from memory for want of registers; stack: bytes of local memory a thread, spills included;
    shared, shared_limit: bytes a block; dots: `tl.dot` in the source's loops; scalar_dots: dots that use no tensor
    core; tensor_instructions: their static count by kind; async_copies: static count of cp.async; blocks_per_sm: how
    many blocks one multiprocessor holds by registers, shared memory and warps; seconds: of this call, little where
    Triton had the result on disk; problems: why this must not ship; notes: what is worth knowing.
    """

    kernel: str
    target: str
    num_warps: int
    num_stages: int
    registers: int = 0
    register_limit: int = 0
    spill: int = 0
    stack: int = 0
    shared: int = 0
    shared_limit: int = 0
    dots: int = 0
    scalar_dots: int = 0
    tensor_instructions: dict[str, int] = field(default_factory=dict)
    async_copies: int = 0
    blocks_per_sm: int = 0
    seconds: float = 0.0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compile one launch for `target`. Raises as `compilation_of`; what the compiler refuses is in `problems`."""
    return compile_offline(compilation_of(launch, target))


def compilation_of(launch: Launch, target: Target) -> Compilation:
    """The signature, constants and hints of a launch, as Triton's run-time compiler would derive them.

    Raises:
        LinearizeError: the kernel was decorated for the interpreter; an argument is missing, unknown or of a type that
            no kernel takes; the target's multiprocessor is not known.
    """
    kernel = launch.kernel
    name = getattr(kernel, "__name__", repr(kernel))
    if not hasattr(kernel, "params"):
        raise LinearizeError(
            f"{name}: TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')!r} made it a kernel for the "
            "interpreter, which cannot be compiled; unset TRITON_INTERPRET"
        )
    if target.arch not in WARPS_PER_SM:
        raise LinearizeError(
            f"target: {target.name!r} is not known; use one of {', '.join(_arch(x) for x in WARPS_PER_SM)}"
        )
    names = [param.name for param in kernel.params]
    wrong = set(names) ^ launch.arguments.keys()
    if wrong:
        raise LinearizeError(
            f"{name}: {', '.join(sorted(wrong))} is in the launch or in the kernel only; give all alike"
        )
    types, constants, hints = [], [], []
    for index, param in enumerate(kernel.params):
        value = launch.arguments[param.name]
        value = value.value if type(value).__name__ == "constexpr" else value
        kind, found = ("constexpr", ()) if param.is_constexpr else _specialise(name, param, value, target)
        types.append((param.name, kind))
        if kind == "constexpr":
            constants.append((param.name, value))
        elif found:
            hints.append((index, found))
    parts = (tuple(types), tuple(constants), tuple(hints))
    return Compilation(kernel.fn.__module__, name, target, *parts, launch.num_warps, launch.num_stages)


def _arch(arch: int | str) -> str:
    return f"sm_{arch}" if isinstance(arch, int) else arch


def _specialise(kernel: str, param: Any, value: Any, target: Target) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Triton's type of one argument, and its hints."""
    aligned = not param.do_not_specialize and not param.do_not_specialize_on_alignment
    divisible = (("tt.divisibility", ALIGNMENT),)
    if isinstance(value, Tensor):
        kind = POINTERS.get(value.dtype)
        if kind is None:
            raise LinearizeError(f"{kernel}: {param.name} is {value.dtype}; use one of {', '.join(map(str, POINTERS))}")
        start = value.storage_offset() * value.element_size()  # an allocation itself is aligned
        hints = divisible if aligned and start % ALIGNMENT == 0 else ()
        small = target.backend == "hip" and value.untyped_storage().nbytes() < 2**31
        return kind, hints + ((("tt.pointer_range", 32),) if small and not param.do_not_specialize else ())
    if value is None:
        return "constexpr", ()
    if isinstance(value, bool):
        return "u1", ()
    if isinstance(value, int):
        if value == 1 and not param.do_not_specialize:
            return "constexpr", ()
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, divisible if aligned and value % ALIGNMENT == 0 else ()
    if isinstance(value, float):
        return "fp32", ()
    raise LinearizeError(f"{kernel}: {param.name} is a {type(value).__name__}; give a tensor, a number or None")


def compile_offline(compilation: Compilation) -> Resources:
    """Compile, and read the resources; what the compiler refuses is a problem of the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    target = compilation.target
    kernel = getattr(importlib.import_module(compilation.module), compilation.kernel)
    common: dict[str, Any] = {
        "kernel": compilation.kernel,
        "target": target.name,
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "shared_limit": target.shared,
    }
    hints = {(index,): [list(hint) for hint in found] for index, found in compilation.hints}
    source = ASTSource(kernel, dict(compilation.types), dict(compilation.constants), hints)
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    try:
        binary = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)
    except Exception as error:  # whatever part of the compiler it comes from, it is the answer
        problem = f"does not compile: {type(error).__name__}: {_reason(str(error))}"
        return Resources(**common, seconds=time.perf_counter() - start, problems=(problem,))
    found = _read_cuda(binary, compilation) if target.backend == "cuda" else _read_hip(binary, compilation)
    found |= _read_common(binary, target)
    found["problems"] = (*found.pop("mismatch", ()), *_problems(found, target))
    found["notes"] = _notes(found, target)
    found["blocks_per_sm"] = _blocks_per_sm(found, compilation)
    return Resources(**common, **found, seconds=time.perf_counter() - start)


def _reason(message: str) -> str:
    """A compiler's message in one line, without the source that it quotes up to a caret."""
    where = re.match(r"at \d+:\d+", message)
    text = " ".join(re.split(r"^\s*\^\s*$", message, flags=re.MULTILINE)[-1].split())
    return f"{where.group()}: {text[-300:]}" if where else text[-300:]


def _read_common(binary: Any, target: Target) -> dict[str, Any]:
    text = binary.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    counts = {name: len(re.findall(sign, text)) for name, sign in TENSOR_INSTRUCTIONS[target.backend].items()}
    scalar = SCALAR_DOT.findall(binary.asm["ttgir"])
    return {
        "shared": binary.metadata.shared,
        "dots": len(re.findall(r"= tt\.dot(?:_scaled)? ", binary.asm["ttir"])),
        "scalar_dots": len(scalar),
        "meant_scalar": sum(kind in ("f32", "f64") and "inputPrecision" not in how for how, kind in scalar),
        "tensor_instructions": {name: count for name, count in counts.items() if count},
        "async_copies": len(re.findall(r"cp\.async\.(?:ca|cg|bulk\.tensor)", text)),
    }


def _read_cuda(binary: Any, compilation: Compilation) -> dict[str, Any]:
    """Registers, spills and stack from ptxas, checked against the cubin."""
    from triton import knobs

    arch = int(compilation.target.arch)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin, again = (str(Path(folder) / name) for name in ("kernel.ptx", "kernel.cubin", "again.cubin"))
        Path(ptx).write_text(binary.asm["ptx"])
        Path(cubin).write_bytes(binary.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
        made = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
        # Triton's versions call ptxas with different options; those that give its cubin's numbers are its own.
        for flags in (["--regAllocOptLevel=2"], []):
            name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
            log = _output(knobs.nvidia.ptxas.path, "-v", "-lineinfo", *flags, name, ptx, "-o", again)
            registers, stack = _number(r"Used (\d+) registers", log), _number(r"(\d+) bytes stack frame", log)
            if (registers, stack) == made:
                break
    threads = 32 * compilation.num_warps
    found: dict[str, Any] = {
        "registers": registers,
        "register_limit": min(255, REGISTER_FILE // threads),
        "spill": _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        "stack": stack,
    }
    if (registers, stack) != made:
        found["mismatch"] = (f"ptxas reports registers, stack {(registers, stack)}, the cubin {made}",)
    return found


def _read_hip(binary: Any, compilation: Compilation) -> dict[str, Any]:
    """The kernel's metadata. Scalar registers spill into vector registers, which is cheap and not counted."""
    text = binary.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "register_limit": VGPRS_PER_LANE // max(1, compilation.num_warps // SIMD_UNITS),
        "spill": 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
    }


def _output(program: str, *arguments: str) -> str:
    """What a program printed, on both channels: ptxas reports on the second."""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in what the compiler reported: {text[:200]!r}")
    return int(found.group(1))


def _problems(found: dict[str, Any], target: Target) -> tuple[str, ...]:
    problems = []
    if found["spill"]:
        problems.append(f"spills {found['spill']} bytes a thread")
    if found["shared"] > target.shared:
        problems.append(f"{found['shared']} bytes of shared memory, {target.shared} are allowed: it would not launch")
    slow = found["scalar_dots"] - found.pop("meant_scalar")
    if slow:
        problems.append(f"{slow} dots without tensor cores that float32 'ieee' does not explain")
    return tuple(problems)


def _notes(found: dict[str, Any], target: Target) -> tuple[str, ...]:
    notes = []
    if target.arch == 90 and "mma.sync" in found["tensor_instructions"]:
        notes.append("mma.sync instead of wgmma, which needs 64 rows and 4 warps")
    if found["scalar_dots"]:
        notes.append(f"{found['scalar_dots']} dots without tensor cores")
    if found["stack"] and not found["spill"]:
        notes.append(f"{found['stack']} bytes of stack, not from spills")
    return tuple(notes)


def _blocks_per_sm(found: dict[str, Any], compilation: Compilation) -> int:
    """Blocks that fit on one multiprocessor at once; 0 where shared memory is over the limit."""
    target, warps = compilation.target, compilation.num_warps
    if found["shared"] > target.shared:
        return 0
    registers = max(REGISTER_GRANULE, -(-found["registers"] // REGISTER_GRANULE) * REGISTER_GRANULE)
    if target.backend == "cuda":
        by_registers = SIMD_UNITS * (REGISTER_FILE // SIMD_UNITS // (32 * registers))
        by_shared = (target.shared + CUDA_RESERVED) // (found["shared"] + CUDA_RESERVED)
    else:
        by_registers = SIMD_UNITS * (VGPRS_PER_LANE // registers)
        by_shared = target.shared // max(1, found["shared"])
    return min(BLOCKS_PER_SM, min(WARPS_PER_SM[target.arch], by_registers) // warps, by_shared)
