"""Shortcuts for what kernels do most: one numpy call instead of Triton's way from operator to builder.

Every shortcut serves the plain case only: operands of one type, or a tensor and a Python number that fits its type.
There Triton's own checks have nothing to decide but the shape, which numpy decides alike. All else, and so every error
message, is left to the function that Triton would have called.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.core import PropagateNan
from triton.runtime import interpreter

from tests.interpreter_memory import MIN_DOT_K, memory, round_bfloat16

NUMPY = {
    "fp16": np.float16,
    "bf16": np.float32,
    "fp32": np.float32,
    "fp64": np.float64,
    "int32": np.int32,
    "int64": np.int64,
}
FLOATS = ("fp16", "fp32", "fp64")  # with a Python number; bfloat16 must round it first
WIDE = ("fp32", "fp64")
INTS = ("int32", "int64")
tensor, constexpr, block_type, Handle = tl.core.tensor, tl.constexpr, tl.core.block_type, interpreter.TensorHandle

_types: dict[tuple[str, Any], tuple[Any, ...]] = {}


def install_fast_paths() -> None:
    """Replace operators and functions of `triton.language`; `tests.interpreter.install` has patched the rest."""
    tensor.__init__ = _init
    for name, op in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        _operator(name, op, tuple(NUMPY), pointers=name == "add")
    _operator("truediv", np.divide, WIDE)
    _operator("floordiv", lambda x, y: (x - np.fmod(x, y)) // y, INTS)
    _operator("mod", np.fmod, INTS)
    for name, op in (("and", np.bitwise_and), ("or", np.bitwise_or)):
        _operator(name, op, ("int1", *INTS))
    for name, op in (("lt", np.less), ("le", np.less_equal), ("gt", np.greater), ("ge", np.greater_equal)):
        _operator(name, op, tuple(NUMPY), tl.int1)
    _operator("eq", np.equal, tuple(NUMPY), tl.int1)
    _operator("ne", np.not_equal, tuple(NUMPY), tl.int1)
    for shortcut in (_maximum, _minimum, _where, _load, _store, _dot, _cast, _trans, _arange, _full):
        _function(shortcut)
    _function(_cast, "to", (tensor,))
    _function(_getitem, "__getitem__", (tensor,))
    for name, op in (("exp", np.exp), ("exp2", np.exp2), ("log", np.log), ("log2", np.log2), ("sqrt", np.sqrt)):
        _function(_unary(op), name, (tl, tl.math, tensor))
    interpreter.interpreter_semantic.to_tensor = _to_tensor(interpreter.interpreter_semantic.to_tensor)
    _device_functions()


# --- tensors -----------------------------------------------------------------------------------------------------


def _described(type_: Any) -> tuple[Any, ...]:
    """(type, shape, numel, dtype, whether it is a block) of a tensor type, made once."""
    found = getattr(type_, "described", None)
    if found is None:
        block = type_.is_block()
        sizes = tuple([int(n) for n in type_.shape] if block else [])  # Triton's own tuple is slow to compare
        key = (type_.scalar.name, sizes if block else None)
        found = _types.get(key)
        if found is None:
            shape = tl.core.tuple([constexpr(n) for n in sizes])
            found = _types[key] = (type_, shape, constexpr(math.prod(sizes)), type_.scalar, block)
        type_.described = found
    return found


def _init(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type, self.shape, self.numel, self.dtype, self.block = _described(type)


def _make(data: np.ndarray, dtype: Any, block: bool) -> Any:
    """A tensor of `data`; a scalar has no shape in the language and one element here."""
    key = (dtype.name, data.shape if block else None)
    found = _types.get(key)
    if found is None:
        found = _described(block_type(dtype, list(data.shape)) if block else dtype)
    out = tensor.__new__(tensor)
    out.handle = Handle(data, dtype)
    out.type, out.shape, out.numel, out.dtype, out.block = found
    return out


def _number(value: Any, name: str) -> Any:
    """A Python number in a tensor's type, or None where Triton must decide."""
    if isinstance(value, bool):
        return None
    if name in FLOATS:
        return NUMPY[name](value) if isinstance(value, (int, float)) else None
    if name in INTS and isinstance(value, int):
        bits = 31 if name == "int32" else 63
        return NUMPY[name](value) if -(1 << bits) <= value < 1 << bits else None
    return None


def _pair(a: Any, b: Any, names: tuple[str, ...]) -> tuple[Any, Any, Any, bool] | None:
    """Arrays, common type and blockness of two operands that need no conversion."""
    if type(a) is constexpr:
        a = a.value
    if type(b) is constexpr:
        b = b.value
    if type(a) is tensor:
        dtype = a.dtype
        if dtype.name not in names:
            return None
        if type(b) is tensor:
            if b.dtype.name != dtype.name:
                if dtype.name not in INTS or b.dtype.name not in INTS or not set(INTS) <= set(names):
                    return None
                dtype = tl.int64  # the wider of the two, for numpy too
            return a.handle.data, b.handle.data, dtype, a.block or b.block
        number = _number(b, dtype.name)
        return None if number is None else (a.handle.data, number, dtype, a.block)
    if type(b) is tensor and b.dtype.name in names:
        number = _number(a, b.dtype.name)
        return None if number is None else (number, b.handle.data, b.dtype, b.block)
    return None


def _to_tensor(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Every assignment in a kernel goes through here."""
    return lambda x, check_type=True: x if type(x) is tensor else stock(x, check_type)


# --- operators ---------------------------------------------------------------------------------------------------


def _operator(
    name: str, op: Callable[..., Any], names: tuple[str, ...], result: Any = None, pointers: bool = False
) -> None:
    def apply(a: Any, b: Any) -> Any:
        found = _pair(a, b, names)
        if found is None:
            return _add_to_pointer(a, b) if pointers else None
        x, y, dtype, block = found
        out = op(x, y)
        if result is None and dtype.name == "bf16":
            out = round_bfloat16(out)
        return _make(out, result or dtype, block)

    def install(method: str, swapped: bool) -> None:
        stock = getattr(tensor, method)

        def operator(self: Any, other: Any) -> Any:
            out = apply(other, self) if swapped else apply(self, other)
            return stock(self, other) if out is None else out

        setattr(tensor, method, operator)

    install(f"__{name}__", False)
    if hasattr(tensor, f"__r{name}__"):
        install(f"__r{name}__", True)


def _add_to_pointer(a: Any, b: Any) -> Any:
    if type(a) is not tensor or not a.dtype.is_ptr():
        return None
    size = np.uint64(max(1, a.dtype.element_ty.primitive_bitwidth // 8))
    if type(b) is tensor and b.dtype.name in INTS:
        return _make(a.handle.data + b.handle.data.astype(np.uint64) * size, a.dtype, a.block or b.block)
    if isinstance(b, int) and 0 <= b < 2**31:
        return _make(a.handle.data + np.uint64(b) * size, a.dtype, a.block)
    return None


# --- functions ---------------------------------------------------------------------------------------------------


def _function(shortcut: Callable[..., Any], name: str | None = None, places: Any = None) -> None:
    """Put a shortcut in front of a function; None from it means that the function itself must run."""
    name = name or shortcut.__name__.removeprefix("_")
    for place in (tl, tl.core) if places is None else places:
        stock = getattr(place, name)

        def call(*args: Any, stock: Any = stock, **kwargs: Any) -> Any:
            kwargs.pop("_semantic", None)
            out = shortcut(*args, **kwargs)
            return stock(*args, **kwargs) if out is None else out

        setattr(place, name, call)


def _unary(op: Callable[..., Any]) -> Callable[..., Any]:
    def apply(x: Any) -> Any:
        return _make(op(x.handle.data), x.dtype, x.block) if type(x) is tensor and x.dtype.name in WIDE else None

    return apply


def _extreme(x: Any, y: Any, propagate_nan: Any, plain: Any, spreading: Any) -> Any:
    found = _pair(x, y, (*FLOATS, *INTS))
    if found is None:
        return None
    propagate_nan = propagate_nan.value if type(propagate_nan) is constexpr else propagate_nan
    op = plain if propagate_nan == PropagateNan.NONE else spreading
    return _make(op(found[0], found[1]), found[2], found[3])


def _maximum(x: Any, y: Any, propagate_nan: Any = PropagateNan.NONE) -> Any:
    return _extreme(x, y, propagate_nan, np.fmax, np.maximum)


def _minimum(x: Any, y: Any, propagate_nan: Any = PropagateNan.NONE) -> Any:
    return _extreme(x, y, propagate_nan, np.fmin, np.minimum)


def _where(condition: Any, x: Any, y: Any) -> Any:
    if type(condition) is not tensor or condition.dtype.name != "int1":
        return None
    found = _pair(x, y, (*NUMPY, "int1"))
    if found is None:
        return None
    return _make(np.where(condition.handle.data, found[0], found[1]), found[2], condition.block or found[3])


def _cast(input: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: Any = False) -> Any:
    dtype = dtype.value if type(dtype) is constexpr else dtype
    if type(input) is not tensor or fp_downcast_rounding is not None or bitcast:
        return None
    source, name = input.dtype.name, dtype.name
    if source == name:
        return input
    if name not in NUMPY or (source not in NUMPY and source != "int1"):
        return None
    data = input.handle.data
    return _make(round_bfloat16(data) if name == "bf16" else data.astype(NUMPY[name]), dtype, input.block)


def _getitem(x: Any, slices: Any) -> Any:
    if isinstance(slices, tl.core.tuple):
        slices = tuple(slices.values)
    parts = slices if isinstance(slices, tuple) else (slices,)
    for part in parts:
        if part is not None and not (type(part) is slice and part.start is part.stop is part.step is None):
            return None
    return _make(x.handle.data[parts], x.dtype, True) if x.block else None


def _trans(input: Any, *dims: Any) -> Any:
    return None if dims or input.handle.data.ndim != 2 else _make(input.handle.data.T, input.dtype, True)


def _arange(start: Any, end: Any) -> Any:
    start, end = (n.value if type(n) is constexpr else n for n in (start, end))
    count = end - start
    if count <= 0 or count & (count - 1):
        return None
    return _make(np.arange(start, end, dtype=np.int32), tl.int32, True)


def _full(shape: Any, value: Any, dtype: Any) -> Any:
    dtype = dtype.value if type(dtype) is constexpr else dtype
    value = value.value if type(value) is constexpr else value
    number = _number(value, dtype.name)
    if number is None or not shape:
        return None
    return _make(np.full([int(n) for n in shape], number), dtype, True)


def _dot(
    input: Any,
    other: Any,
    acc: Any = None,
    input_precision: Any = None,
    allow_tf32: Any = None,
    max_num_imprecise_acc: Any = None,
    out_dtype: Any = tl.float32,
) -> Any:
    a, b = input, other
    name = a.dtype.name
    input_precision = input_precision.value if type(input_precision) is constexpr else input_precision
    out_dtype = out_dtype.value if type(out_dtype) is constexpr else out_dtype
    result = tl.float64 if name == "fp64" else tl.float32
    x, y = a.handle.data, b.handle.data
    if b.dtype.name != name or name not in (*FLOATS, "bf16") or input_precision not in (None, "tf32", "tf32x3", "ieee"):
        return None
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[0] or x.shape[1] < MIN_DOT_K or not (a.block and b.block):
        return None
    if out_dtype.name != "fp32" and name != "fp64":
        return None
    if acc is not None and (acc.dtype.name != out_dtype.name or out_dtype.name != result.name):
        return None
    kind = NUMPY[result.name]
    out = np.matmul(x.astype(kind, copy=False), y.astype(kind, copy=False))
    if acc is not None:
        if acc.handle.data.shape != out.shape:
            return None
        out += acc.handle.data
    return _make(out, result, True)


def _load(pointer: Any, mask: Any = None, other: Any = None, boundary_check: Any = (), **hints: Any) -> Any:
    if type(pointer) is not tensor or not pointer.dtype.is_ptr() or boundary_check or hints.get("padding_option"):
        return None
    dtype = pointer.dtype.element_ty
    if dtype.name not in NUMPY or (mask is None and other is not None):
        return None
    seen = None
    if mask is not None:
        seen = _seen(pointer, mask)
        if seen is None:
            return None
    if type(other) is constexpr:
        other = other.value
    if other is None:
        kind = NUMPY[dtype.name]
        fill: Any = np.nan if np.issubdtype(kind, np.floating) else np.iinfo(kind).max
    elif type(other) is tensor:
        if other.dtype.name != dtype.name or (other.block and not pointer.block):
            return None
        fill = other.handle.data
    elif isinstance(other, (int, float)) and not isinstance(other, bool):
        fill = round_bfloat16(other) if dtype.name == "bf16" else _number(other, dtype.name)
        if fill is None:
            return None
    else:
        return None
    return _make(memory.load(pointer.handle.data, seen, fill, dtype.name), dtype, pointer.block)


def _store(pointer: Any, value: Any, mask: Any = None, boundary_check: Any = (), **hints: Any) -> Any:
    if type(pointer) is not tensor or not pointer.dtype.is_ptr() or boundary_check or type(value) is not tensor:
        return None
    if pointer.dtype.const or value.dtype.name != pointer.dtype.element_ty.name or value.dtype.name not in NUMPY:
        return None
    if value.block and value.handle.data.shape != pointer.handle.data.shape:
        return None
    seen = None
    if mask is not None:
        seen = _seen(pointer, mask)
        if seen is None:
            return None
    memory.store(pointer.handle.data, value.handle.data, seen, value.dtype.name)
    return _STORED


def _seen(pointer: Any, mask: Any) -> Any:
    """The array of a mask that fits into the pointers' shape."""
    if type(mask) is not tensor or mask.dtype.name != "int1" or (mask.block and not pointer.block):
        return None
    seen, shape = mask.handle.data, pointer.handle.data.shape
    return seen if seen.shape == shape or np.broadcast_shapes(seen.shape, shape) == shape else None


_STORED = object()  # a statement's value, which nothing reads


# --- device functions --------------------------------------------------------------------------------------------


def _sum(input: Any, axis: Any = None, keep_dims: Any = False, dtype: Any = None) -> Any:
    return _reduce(np.add, input, axis, keep_dims) if dtype is None else None


def _max(input: Any, axis: Any = None, return_indices: Any = False, keep_dims: Any = False) -> Any:
    return None if return_indices else _reduce(np.fmax, input, axis, keep_dims)


def _min(input: Any, axis: Any = None, return_indices: Any = False, keep_dims: Any = False) -> Any:
    return None if return_indices else _reduce(np.fmin, input, axis, keep_dims)


def _reduce(op: np.ufunc, x: Any, axis: Any, keep_dims: Any) -> Any:
    axis, keep_dims = (n.value if type(n) is constexpr else n for n in (axis, keep_dims))
    if type(x) is not tensor or not x.block or x.dtype.name not in (*WIDE, *INTS):
        return None
    data = x.handle.data
    if axis is not None and not 0 <= axis < data.ndim:
        return None
    out = op.reduce(data, axis=axis, keepdims=bool(keep_dims), dtype=data.dtype)
    block = out.ndim > 0
    return _make(out if block else np.array([out], dtype=data.dtype), x.dtype, block)


def _zeros(shape: Any, dtype: Any) -> Any:
    return _full(shape, 0, dtype)


def _device_functions() -> None:
    """Call a device function without patching the language again, and the reductions without interpreting them."""
    shortcuts = {
        tl.standard.sum.fn: _sum,
        tl.standard.max.fn: _max,
        tl.standard.min.fn: _min,
        tl.standard.zeros.fn: _zeros,
    }
    error = interpreter.InterpreterError

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        shortcut = shortcuts.get(self.fn)
        if shortcut is not None and "return_indices_tie_break_left" not in kwargs and len(args) < 3:
            out = shortcut(*args, **kwargs)
            if out is not None:
                return out
        function = self.rewritten_fn.get(self.fn) or self.rewrite()
        try:
            return function(*args, **kwargs)
        except error:
            raise
        except Exception as problem:
            raise error(repr(problem)) from problem

    interpreter.InterpretedFunction.__call__ = call
