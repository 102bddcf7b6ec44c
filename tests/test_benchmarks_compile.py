"""The offline compiler: what it derives from a launch, what it finds wrong, and the tables.

Kernels for the interpreter cannot be compiled, so all that compiles runs in processes without TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from linearize.benchmarks.compile import Bound, CompiledCase, bound
from linearize.benchmarks.offline import Resources, _problems, _read_common
from linearize.cli import app
from linearize.kernels.devices import DEVICES, TARGETS
from linearize.kernels.launch import Launch
from linearize.kernels.near_far.cases import Case

ROOT = Path(__file__).resolve().parents[1]

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def product(A, B, C, steps, P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for i in range(0, steps):
        a = tl.load(A + m[:, None] * K + k[None, :] + i * M * K)
        b = tl.load(B + k[:, None] * N + n[None, :] + i * K * N)
        acc = tl.dot(a, b, acc, input_precision=P)
    tl.store(C + m[:, None] * N + n[None, :], acc)


@triton.jit
def hoarding(X, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    tl.store(X + i, x / tl.sum(x) + tl.max(x))
"""

# Dies where a worker imports it, as a compiler dies that hits an assertion of its own.
CRASHING = """
import multiprocessing, os
if multiprocessing.parent_process() is not None:
    os._exit(9)
from offline_kernels import hoarding
hoarding.fn.__module__ = "crashing_kernels"
hoarding.fn.__name__ = "crashing"
"""

LAUNCHES = """
import sys, json
from dataclasses import asdict
from pathlib import Path
import torch
import offline_kernels as kernels
from linearize.benchmarks.compile import bench_compile
from linearize.benchmarks.offline import compilation_of, compile_launch
from linearize.kernels.devices import TARGETS
from linearize.kernels.launch import Launch
from linearize.kernels.near_far.cases import Case


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def product(m, n, k, dtype=torch.bfloat16, precision="tf32", warps=4, stages=2, steps=5):
    a, b, c = meta(m, k, dtype=dtype), meta(k, n, dtype=dtype), meta(m, n, dtype=torch.float32)
    arguments = dict(A=a, B=b, C=c, steps=steps, P=precision, M=m, N=n, K=k)
    return Launch(kernels.product, (3, 2), arguments, warps, stages)


hoard = Launch(kernels.hoarding, (1,), dict(X=meta(8192, dtype=torch.float32), N=8192), 1, 1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("offline")
    (path / "offline_kernels.py").write_text(KERNELS)
    (path / "crashing_kernels.py").write_text(CRASHING)
    return path


def process(folder: Path, code: str, *arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess:
    """Run code after `LAUNCHES`, as a file: processes that it spawns must be able to find it."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "TRITON_CACHE_DIR": str(folder / "cache")}
    if interpret is not None:
        env["TRITON_INTERPRET"] = interpret
    script = folder / "script.py"
    script.write_text(LAUNCHES + "\nif __name__ == '__main__':\n" + "\n".join(f"    {x}" for x in code.splitlines()))
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def result(folder: Path, code: str, *arguments: str):
    """The JSON on the last line that the code prints."""
    done = process(folder, code, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- from a launch to the compiler -------------------------------------------------------------------------------

SIGNATURES = """
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends import backends
from triton.backends.compiler import GPUTarget

wide = meta(64, 64, dtype=torch.bfloat16)
tensors = [wide, wide[1:, 3:], wide[:, 8:], meta(2**30, dtype=torch.float32)]
tensors += [meta(3, dtype=dtype) for dtype in (torch.bool, torch.int32, torch.int64, torch.float16, torch.float64)]
numbers = [0, 1, 5, 16, -16, 2**31 - 1, 2**31, 2**40, True, False, 0.5, 1.0, None]
different = []
for target in TARGETS.values():
    name = {"cuda": "nvidia", "hip": "amd"}[target.backend]
    backend = backends[name].compiler(GPUTarget(target.backend, target.arch, target.warp))
    for value in tensors + numbers:
        launch = product(64, 64, 64)
        launch.arguments["steps"] = value
        plan = compilation_of(launch, target)
        kind, key = native_specialize_impl(backend, value, False, True, True)
        hints = {tuple(hint) for hint in backend.parse_attr(key)} if isinstance(key, str) else set()
        mine = dict(plan.types)["steps"], set(dict(plan.hints).get(3, ()))
        if mine != (kind, hints):
            different.append([target.name, str(value), str(mine), str((kind, hints))])
        assert ("steps" in dict(plan.constants)) == (kind == "constexpr")
one, true = product(64, 64, 64), product(64, 64, 64)
one.arguments["P"], true.arguments["P"] = 1, True
keys = [compilation_of(launch, TARGETS["sm_90"]).key for launch in (one, true, product(64, 64, 64, steps=5))]
same = [compilation_of(product(64, 64, 64, steps=n), TARGETS["sm_90"]).key for n in (5, 7)]
print(json.dumps([different, len(tensors + numbers), len(set(keys)), len(set(same))]))
"""


def test_signature_is_the_run_time_compilers(folder: Path) -> None:
    different, count, keys, same = result(folder, SIGNATURES)
    assert different == []
    assert count == 22
    assert keys == 3  # 1 and True are equal to Python, not to a compiler
    assert same == 1


RESOURCES = """
found = {}
for target in TARGETS.values():
    found[target.name] = {
        "good": compile_launch(product(64, 64, 32), target),
        "ieee": compile_launch(product(16, 16, 32, torch.float32, "ieee"), target),
        "small": compile_launch(product(16, 16, 16), target),
    }
found["sm_90"]["greedy"] = compile_launch(product(128, 128, 256), TARGETS["sm_90"])
found["sm_90"]["hoard"] = compile_launch(hoard, TARGETS["sm_90"])
found["sm_80"]["short"] = compile_launch(product(16, 16, 8), TARGETS["sm_80"])
print(json.dumps({name: {key: asdict(x) for key, x in rows.items()} for name, rows in found.items()}))
"""


def test_resources_and_problems(folder: Path) -> None:
    found = result(folder, RESOURCES)
    for name, kind in (("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("gfx942", "mfma")):
        good = found[name]["good"]
        assert good["problems"] == []
        assert good["notes"] == []
        assert list(good["tensor_instructions"]) == [kind]
        assert 32 <= good["registers"] < good["register_limit"]
        assert 8192 <= good["shared"] <= 16384
        assert good["shared_limit"] == TARGETS[name].shared
        assert (good["dots"], good["scalar_dots"], good["spill"]) == (1, 0, 0)
        assert 4 <= good["blocks_per_sm"] <= 16
        assert found[name]["ieee"]["problems"] == []
    assert found["sm_80"]["good"]["async_copies"] > 0
    assert found["sm_80"]["ieee"]["scalar_dots"] == 1
    assert found["sm_80"]["ieee"]["tensor_instructions"] == {}
    assert found["sm_90"]["small"]["problems"] == []
    assert "mma.sync instead of wgmma" in found["sm_90"]["small"]["notes"][0]
    greedy, hoard, short = found["sm_90"]["greedy"], found["sm_90"]["hoard"], found["sm_80"]["short"]
    assert "bytes of shared memory, 232448 are allowed" in greedy["problems"][0]
    assert greedy["blocks_per_sm"] == 0
    assert hoard["spill"] > 0
    assert hoard["stack"] > 0
    assert f"spills {hoard['spill']} bytes a thread" in hoard["problems"]
    assert "does not compile: CompilationError: at " in short["problems"][0]
    assert "K >= 16" in short["problems"][0]
    assert "tl.dot" not in short["problems"][0]  # the source is not quoted


def test_dots_on_ordinary_arithmetic_are_told_apart() -> None:
    layout = "tensor<64x32x{0}, #ttg.dot_op<{{opIdx = 0, parent = #blocked}}>> * tensor<32x64x{0}, #x> -> tensor<{1}>"
    dots = [
        "%1 = tt.dot %a, %b, %c : " + layout.format("f32", "64x64xf32, #blocked"),
        "%2 = tt.dot %a, %b, %c, inputPrecision = tf32 : " + layout.format("bf16", "64x64xf32, #blocked2"),
        "%3 = tt.dot %a, %b, %c, inputPrecision = tf32 : " + layout.format("bf16", "64x64xf32, #mma"),
    ]
    asm = {"ttir": "\n".join(dots), "ttgir": "\n".join(dots), "ptx": "mma.sync.aligned"}
    binary = SimpleNamespace(asm=asm, metadata=SimpleNamespace(shared=0))
    found = _read_common(binary, TARGETS["sm_80"]) | {"spill": 0}
    assert (found["dots"], found["scalar_dots"]) == (3, 2)
    assert _problems(found, TARGETS["sm_80"]) == ("1 dots without tensor cores that float32 'ieee' does not explain",)


# --- the command -------------------------------------------------------------------------------------------------

TABLES = """
import crashing_kernels
def cases(target):
    yield Case("model A", 64, "product", product(64, 64, 32), 10**9, 10**6)
    yield Case("model B", 64, "product", product(64, 64, 32, steps=7), 10**6, 10**9)
    yield Case("model B", 128, "crash", Launch(crashing_kernels.hoarding, (1,), hoard.arguments, 1, 1), 1, 1)
done = bench_compile(Path(sys.argv[1]), ["sm_80", "gfx942"], None, cases)
print(json.dumps(len(done)))
"""


def test_tables_and_a_compiler_that_crashes(folder: Path, tmp_path: Path) -> None:
    assert result(folder, TABLES, str(tmp_path)) == 6
    data = json.loads((tmp_path / "compile.json").read_text())
    page = (tmp_path / "compile.md").read_text()
    assert (data["kind"], data["problems"], data["compilations"]) == ("linearize.compile", 2, 4)
    first, _, crash = data["cases"][:3]
    assert first["resources"]["problems"] == []
    assert first["bounds"] == {"A100": {"us": pytest.approx(1e15 / 312e12), "by": "arithmetic"}}
    assert crash["resources"]["problems"] == ["does not compile: the compiler crashed"]
    assert "Nothing here ran on a GPU" in page
    assert page.count("| model A | 64 | product |") == 4  # resources and bounds of two targets
    assert "- crash: does not compile: the compiler crashed (model B W 128)" in page
    widths = [line.count("|") for line in page.splitlines() if line.startswith("| model")]
    assert widths.count(12) == 8
    assert widths.count(8) == 8


def test_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    device = DEVICES["H100"]
    assert bound(0, 3_350_000, device) == Bound(pytest.approx(1.0), "memory")
    assert bound(989_000_000, 1, device) == Bound(pytest.approx(1.0), "arithmetic")


def test_command_names_what_exists(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "compile", "--targets", "sm_80,sm_70", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr == "error: targets: 'sm_70' is unknown; known: sm_80, sm_90, gfx942\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("problems", [(), ("spills 8 bytes a thread",)])
def test_command_fails_where_a_kernel_has_a_problem(problems: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    case = Case("model A", 64, "product", Launch(None, (1,), {}, 4, 1), 1, 1)
    row = CompiledCase(case, TARGETS["sm_90"], Resources("product", "sm_90", 4, 1, problems=problems))
    asked = []
    monkeypatch.setattr(
        "linearize.benchmarks.compile.bench_compile", lambda *arguments: asked.append(arguments) or [row]
    )
    words = ["bench", "compile", "--targets", "sm_90, gfx942", "--models", "model A", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert asked == [(tmp_path, ["sm_90", "gfx942"], ["model A"])]
    assert done.stdout == f"{tmp_path / 'compile.md'}\n"
    assert done.exit_code == len(problems)
    assert done.stderr == "".join(f"sm_90, model A, W 64, product: {problem}\n" for problem in problems)


def test_interpreted_kernels_cannot_be_compiled(folder: Path) -> None:
    done = process(folder, "compilation_of(product(64, 64, 64), TARGETS['sm_90'])", interpret="1")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "product: TRITON_INTERPRET='1' made it a kernel for the interpreter" in last
    assert last.endswith("unset TRITON_INTERPRET")


REFUSED = """
messages = []
for name, value in (("A", "text"), ("extra", 1), ("A", meta(3, dtype=torch.complex64))):
    launch = product(64, 64, 64)
    launch.arguments[name] = value
    try:
        compilation_of(launch, TARGETS["sm_90"])
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
print(json.dumps(messages))
"""


def test_launches_that_fit_no_kernel_are_refused(folder: Path) -> None:
    text, extra, dtype = result(folder, REFUSED)
    assert text == "LinearizeError: product: A is a str; give a tensor, a number or None"
    assert extra.startswith("LinearizeError: product: extra is in the launch or in the kernel only")
    assert dtype.startswith("LinearizeError: product: A is torch.complex64; use one of torch.bfloat16")


def test_defaults_neither_spill_nor_exceed_shared_memory(tmp_path: Path) -> None:
    """A sample; `linearize bench compile` does all of them."""
    code = """
import sys
from pathlib import Path
from linearize.benchmarks.compile import bench_compile
if __name__ == "__main__":
    done = bench_compile(Path(sys.argv[1]), ["sm_90"], ["SmolLM2-135M"])
    assert not [problem for row in done for problem in row.resources.problems]
    assert all(row.resources.spill == 0 for row in done)
    kinds = {row.case.kernel for row in done if row.resources.tensor_instructions}
    assert {"chunk_sums", "attention_forward", "far_backward_queries", "near_backward_keys", "far_queries"} <= kinds
"""
    script = tmp_path / "sample.py"
    script.write_text(code)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "## Bytes of a decode step" in (tmp_path / "compile.md").read_text()
