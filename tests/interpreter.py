"""Triton's interpreter made right for bfloat16, strict about memory, and fast enough for grids of small cases.

Triton interprets kernels on the CPU where `TRITON_INTERPRET=1` was set before it was imported. As shipped (3.6, 3.7)
it adds and multiplies the bit patterns of bfloat16, truncates on conversion to it, patches `triton.language` again at
every call of a device function, reads and writes any address, and drops unknown arguments. `install` changes that for
this process:

- bfloat16 lives in float32 arrays of representable values. Every operation computes in float32 and rounds to nearest,
  ties to even; bits exist only in memory (`load`, `store`) and in bit casts. Atomics on it are refused.
- A launch knows its tensors: an access outside of all of them, and an argument that does not exist, are errors. What a
  masked load without `other` leaves undefined reads as NaN, or as the largest integer.
- `tl.dot` needs K >= 16, as the compilers do.
- Reductions and scans with a combine function of one's own work on slices instead of one element at a time.
- Autotuned kernels take their first configuration. Loop variables have `.to`, as when compiled.
- `interpreter_fast` shortcuts the usual operators and functions; anything unusual goes through Triton as before.

What the interpreter cannot show remains: TF32, denormals flushed, races, limits of registers and shared memory.
"""

import ast
import inspect
import os
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.interpreter_memory import MIN_DOT_K, memory, pack_bfloat16, round_bfloat16, unpack_bfloat16

__all__ = ["install"]

# Options that a launch may carry beside the kernel's arguments; they mean nothing to the interpreter.
OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "debug", "waves_per_eu", "matrix_instr_nonkdim", "kpack"}
OPTIONS |= {"enable_fp_fusion", "launch_cooperative_grid", "launch_pdl", "sanitize_overflow", "ir_override"}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_installed = False


def install() -> None:
    """Patch the interpreter of this process, once. Without `TRITON_INTERPRET=1` nothing happens."""
    global _installed
    if _installed or os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.standard.sum, interpreter.InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET was set after triton had been imported; set it before")
    _patch_language(interpreter)
    _patch_bfloat16(interpreter)
    _patch_reductions(interpreter)
    _patch_launches(interpreter)
    from tests.interpreter_fast import install_fast_paths

    install_fast_paths()
    _installed = True


# --- the language ------------------------------------------------------------------------------------------------


def _patch_language(interpreter: Any) -> None:
    """Patch `triton.language` now and for good, and give loop variables `.to`."""
    import triton.language as tl

    places = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    builtins = [
        (place, name, member)
        for place in places
        for name, member in inspect.getmembers(place)
        if tl.core.is_builtin(member)
    ]
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    semantic = interpreter.interpreter_semantic
    for place, name, member in builtins:
        new = vars(place).get(name)
        if getattr(new, "__qualname__", "").startswith("_patch_attr."):  # else it was made for the interpreter
            setattr(place, name, _direct(member, semantic))
    tl.tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)

    builder = interpreter.interpreter_builder
    # The check of integer overflow only matters to a debug build, which the interpreter is not; it costs 5 operations.
    builder.options = type(builder.options)(sanitize_overflow=False)
    builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, MIN_DOT_K)

    class LoopIndex(int):
        """A Python int that converts as the tensor does which it is in a compiled kernel."""

        def to(self, dtype: Any, **options: Any) -> Any:
            return semantic.cast(semantic.to_tensor(int(self)), dtype)

    def loop_indices(items: Iterable[Any]) -> Iterable[Any]:
        return map(LoopIndex, items) if isinstance(items, range) else items

    def visit_for(self: Any, node: ast.For) -> ast.For:
        self.generic_visit(node)
        node.iter = ast.Call(ast.Name("loop_indices", ast.Load()), [node.iter], [])
        return node

    # The rewriter hands the names of the interpreter's module to every kernel.
    interpreter.loop_indices = loop_indices
    interpreter.ASTTransformer.visit_For = visit_for


def _direct(member: Any, semantic: Any) -> Callable[..., Any]:
    """A builtin of the language that needs no `_semantic`."""
    inner = getattr(member, "__wrapped__", member)

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return inner(*args, **kwargs)

    call.__name__ = getattr(member, "__name__", "builtin")
    return call


# --- bfloat16 ----------------------------------------------------------------------------------------------------


def _patch_bfloat16(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    bfloat16 = tl.bfloat16
    stock_type = interpreter._get_np_dtype
    stock = {name: getattr(builder, name) for name in STOCK}
    types: dict[str, np.dtype] = {}

    def is_bfloat16(x: Any) -> bool:
        return x.dtype.scalar == bfloat16

    def numpy_type(dtype: Any) -> np.dtype:
        scalar = dtype.scalar
        found = types.get(scalar.name)
        if found is None:
            found = np.dtype(np.float32) if scalar == bfloat16 else stock_type(scalar)
            types[scalar.name] = found
        return found

    def fits(data: np.ndarray, dtype: Any) -> bool:
        if isinstance(dtype, tl.pointer_type):
            return True
        return data.itemsize <= numpy_type(dtype).itemsize

    def init(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data = data
        self.dtype = dtype
        self.attr = {} if attr is None else attr

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if op in COMPARISONS:
            return handle(op(lhs.data, rhs.data), tl.int1)
        if is_bfloat16(lhs):
            return handle(round_bfloat16(op(lhs.data, rhs.data)), bfloat16)
        return stock["binary_op"](self, lhs, rhs, op)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        y = op(x.data)
        return handle(round_bfloat16(y) if is_bfloat16(x) else y, x.dtype.scalar)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        dtype = c.dtype.scalar
        return handle(op(a.data, b.data, c.data).astype(numpy_type(dtype), copy=False), dtype)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        out = x.data * y.data + z.data
        return handle(round_bfloat16(out) if is_bfloat16(z) else out, z.dtype.scalar)

    def create_fabs(self: Any, x: Any) -> Any:
        return handle(np.abs(x.data), x.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        dtype = dst_type.scalar
        if dtype == bfloat16:
            return handle(round_bfloat16(src.data), dtype)
        return handle(src.data.astype(numpy_type(dtype)), dtype)

    def bits(x: Any) -> Any:
        """A handle as the stock interpreter holds it."""
        return handle(pack_bfloat16(np.ascontiguousarray(x.data)), x.dtype) if is_bfloat16(x) else x

    def create_bitcast(self: Any, src: Any, dst_type: Any) -> Any:
        data = bits(src).data.view(stock_type(dst_type))
        dtype = dst_type.scalar
        return handle(unpack_bfloat16(data) if dtype == bfloat16 else data, dtype)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        dtype = dst_type.scalar
        if dtype == bfloat16 and rounding == interpreter._ir.ROUNDING_MODE.RTZ and src.dtype.scalar == tl.float32:
            return handle((src.data.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), dtype)
        if bfloat16 in (dtype, src.dtype.scalar):  # no kernel here goes through 8 bits
            raise NotImplementedError(f"the interpreter converts no {src.dtype.scalar} to {dtype} with {rounding}")
        return stock["create_fp_to_fp"](self, src, dst_type, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar.primitive_bitwidth == 8:
            return stock["create_dot"](self, a, b, d, *rest)
        # float16 first becomes float32, as on a tensor core: numpy has no fast product for it.
        x, y = (t.data.astype(d.data.dtype, copy=False) for t in (a, b))
        return handle(np.matmul(x, y) + d.data, d.dtype.scalar)

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        dtype = ptrs.get_element_ty()
        seen = mask if isinstance(mask, np.ndarray) else mask.data  # block pointers hand over the array itself
        fill = 0 if other is None else other.data
        return handle(memory.load(ptrs.data, seen, fill, dtype.name), dtype)

    def create_load(self: Any, ptr: Any, *rest: Any) -> Any:
        dtype = ptr.get_element_ty()
        return handle(memory.load(ptr.data, None, 0, dtype.name), dtype)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen = mask if isinstance(mask, np.ndarray) else mask.data
        memory.store(ptrs.data, value.data, seen, ptrs.get_element_ty().name)

    def create_store(self: Any, ptr: Any, value: Any, *rest: Any) -> Any:
        memory.store(ptr.data, value.data, None, ptr.get_element_ty().name)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if is_bfloat16(value):
            raise NotImplementedError("the interpreter has no atomics on bfloat16; use float32")
        memory.check(ptr.data[np.broadcast_to(mask.data, ptr.data.shape)], value.data.itemsize)
        return stock["create_atomic_rmw"](self, op, ptr, value, mask, *rest)

    interpreter._get_np_dtype = numpy_type
    interpreter._validate_np_data_size = fits
    handle.__init__ = init
    builder.get_bf16 = lambda self, value: handle(round_bfloat16(np.array([value], np.float32)), bfloat16)
    changed = (binary_op, unary_op, ternary_op, create_fma, create_fabs, cast_impl, create_bitcast, create_fp_to_fp)
    changed += (create_dot, create_load, create_masked_load, create_store, create_masked_store, create_atomic_rmw)
    for function in changed:
        setattr(builder, function.__name__, function)
    builder.create_int_to_ptr = builder.create_ptr_to_int = create_bitcast


STOCK = ("binary_op", "create_fp_to_fp", "create_dot", "create_atomic_rmw")


# --- reductions and launches -------------------------------------------------------------------------------------


def _patch_reductions(interpreter: Any) -> None:
    import triton.language as tl

    stock_to_tensor = interpreter.ReduceScanOpInterface.to_tensor

    def to_tensor(self: Any, value: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16:
            value = round_bfloat16(value)
        elif np.shape(value) == ():
            value = np.asarray(value)
        return stock_to_tensor(self, value[()] if np.shape(value) == () else value, dtype)

    def combine(self: Any, left: list[Any], right: list[Any], inputs: Any) -> list[np.ndarray]:
        """The combine function on whole slices: it works on each element by itself."""
        tensors = [self.to_tensor(x, t.dtype) for x, t in zip([*left, *right], [*inputs, *inputs])]
        out = self.combine_fn.fn(*tensors)
        return [x.handle.data.reshape(np.shape(y)) for x, y in zip(out if isinstance(out, tuple) else (out,), left)]

    def generic_reduce(self: Any, inputs: Any) -> list[Any]:
        data = [t.handle.data.ravel() if self.axis is None else t.handle.data for t in inputs]
        axis = self.axis or 0
        left = [np.take(x, 0, axis) for x in data]
        for i in range(1, data[0].shape[axis]):
            left = combine(self, left, [np.take(x, i, axis) for x in data], inputs)
        if self.keep_dims:
            rank = len(inputs[0].handle.data.shape)
            left = [x.reshape((1,) * rank) if self.axis is None else np.expand_dims(x, axis) for x in left]
        return [self.to_tensor(x, t.dtype) for x, t in zip(left, inputs)]

    def generic_scan(self: Any, inputs: Any) -> list[Any]:
        data = [t.handle.data for t in inputs]
        steps = [[np.take(x, 0, self.axis) for x in data]]
        for i in range(1, data[0].shape[self.axis]):
            steps.append(combine(self, steps[-1], [np.take(x, i, self.axis) for x in data], inputs))
        return [self.to_tensor(np.stack(x, self.axis), t.dtype) for x, t in zip(zip(*steps), inputs)]

    interpreter.ReduceScanOpInterface.to_tensor = to_tensor
    interpreter.ReduceOps.generic_reduce = generic_reduce
    interpreter.ScanOps.generic_scan = generic_scan


def _patch_launches(interpreter: Any) -> None:
    from triton.runtime.autotuner import Autotuner

    builder = interpreter.interpreter_builder

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        """Run the programs of the grid one after the other."""
        unknown = kwargs.keys() - OPTIONS - set(self.arg_names)
        if unknown:
            raise TypeError(f"{self.fn.__name__} has no argument {', '.join(sorted(unknown))}")
        kwargs = {name: value for name, value in kwargs.items() if name in self.arg_names}
        for hook in self.pre_run_hooks:
            hook(*args, **kwargs)
        given = inspect.getcallargs(self.fn, *args, **kwargs)
        tensors = list(_tensors(given.values()))
        wrong = next((x for x in tensors if x.device.type != "cpu"), None)
        if wrong is not None:
            raise TypeError(f"a tensor on {wrong.device} cannot be interpreted; move it to the CPU")
        values = {n: x if n in self.constexprs else interpreter._implicit_cvt(x) for n, x in given.items()}
        grid = self.grid(values) if callable(self.grid) else self.grid
        grid = (*map(int, grid), 1, 1)[:3] if len(grid) < 3 else tuple(map(int, grid))
        builder.set_grid_dim(*grid)
        outer = memory.regions, memory._views
        memory.open(tensors)
        try:
            with np.errstate(all="ignore"):  # as on a GPU, infinities and NaN are values
                for index in np.ndindex(*grid):
                    builder.grid_idx = index
                    self.fn(**values)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error
        finally:
            memory.regions, memory._views = outer

    def first_configuration(self: Any, *args: Any, config: Any, **options: Any) -> list[float]:
        return [float(self.configs.index(config))] * 3

    interpreter.GridExecutor.__call__ = call
    Autotuner._bench = first_configuration


def _tensors(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif hasattr(value, "untyped_storage"):
            yield value
        elif hasattr(value, "base") and hasattr(value.base, "untyped_storage"):  # a descriptor or a wrapper
            yield value.base
