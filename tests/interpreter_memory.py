"""What an interpreted kernel may read and write, and bfloat16 by value: bits in memory, float32 everywhere else."""

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = ["MIN_DOT_K", "memory", "pack_bfloat16", "round_bfloat16", "unpack_bfloat16"]

MIN_DOT_K = 16  # the compilers' limit, which the interpreter keeps too
# How the interpreter keeps each type in memory.
STORED = {
    "fp64": np.float64,
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int1": np.bool_,
    **{f"{u}int{n}": np.dtype(f"{u}int{n}").type for u in ("", "u") for n in (8, 16, 32, 64)},
    **dict.fromkeys(("fp8e5", "fp8e5b16", "fp8e4nv", "fp8e4b8", "fp8e4b15"), np.uint8),
}


def round_bfloat16(x: Any) -> Any:
    """float32 (or wider) to the nearest bfloat16, ties to even, as float32. NaN stays NaN."""
    x = np.asarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded &= np.uint32(0xFFFF0000)
    bad = np.isnan(x)
    if bad.any():  # the carry could turn a NaN into an infinity or a zero
        rounded = np.where(bad, np.uint32(0x7FC00000), rounded)
    return rounded.view(np.float32)


def pack_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 holding bfloat16 values to their 16 bits."""
    return (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def unpack_bfloat16(bits: np.ndarray) -> np.ndarray:
    """16 bits to the value, as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


class Memory:
    """The storages of a launch's tensors, which are the only addresses that its programs may use."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int, np.ndarray]] = []
        self._views: dict[tuple[int, Any], np.ndarray] = {}

    def open(self, tensors: Iterable[Any]) -> None:
        """Allow the storages of these tensors."""
        self.regions, self._views = [], {}
        seen = set()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            if size and start not in seen:
                seen.add(start)
                raw = (ctypes.c_uint8 * size).from_address(start)
                self.regions.append((start, start + size, np.ctypeslib.as_array(raw)))

    def locate(self, ptr: np.ndarray, stored: Any) -> tuple[np.ndarray, np.ndarray] | None:
        """The storage that all pointers lie in, as an array, and their indices; None if they lie in several."""
        itemsize = stored(0).itemsize
        low, high = int(ptr.min()), int(ptr.max()) + itemsize
        for number, (start, end, raw) in enumerate(self.regions):
            if start <= low and high <= end:
                view = self._views.get((number, stored))
                if view is None:
                    view = self._views[number, stored] = raw[: raw.size // itemsize * itemsize].view(stored)
                return view, ((ptr - np.uint64(start)) // np.uint64(itemsize)).view(np.int64)
        self.check(ptr, itemsize)
        return None

    def check(self, ptr: np.ndarray, itemsize: int) -> None:
        """Raises IndexError unless every pointer lies in a tensor of the launch."""
        inside = np.zeros(ptr.shape, dtype=bool)
        for start, end, _ in self.regions:
            inside |= (ptr >= np.uint64(start)) & (ptr <= np.uint64(end - itemsize))
        if not inside.all():
            wrong = int(ptr[~inside][0])
            near = min((start for start, _, _ in self.regions), key=lambda start: abs(wrong - start), default=0)
            raise IndexError(
                f"{(~inside).sum()} of {ptr.size} pointers are outside of every tensor of the launch; the first is "
                f"{(wrong - near) // itemsize} items from the start of the nearest"
            )

    def load(self, ptr: np.ndarray, mask: np.ndarray | None, other: Any, name: str) -> np.ndarray:
        """Values at `ptr` where `mask` holds, else `other`; bfloat16 as float32."""
        stored = STORED[name]
        if mask is not None and not mask.all():
            value_type = np.float32 if name == "bf16" else stored
            out = np.empty(np.broadcast_shapes(ptr.shape, mask.shape), dtype=value_type)
            out[...] = other
            mask = np.broadcast_to(mask, out.shape)
            if mask.any():
                out[mask] = self.load(np.broadcast_to(ptr, out.shape)[mask], None, 0, name)
            return out
        place = self.locate(ptr, stored)
        if place is None:
            values = np.empty(ptr.shape, dtype=stored)
            for index, address in np.ndenumerate(ptr):
                view, item = self.locate(np.array([address]), stored)  # type: ignore[misc]
                values[index] = view[item[0]]
        else:
            values = place[0][place[1]]
        return unpack_bfloat16(values) if name == "bf16" else values

    def store(self, ptr: np.ndarray, value: np.ndarray, mask: np.ndarray | None, name: str) -> None:
        """Write `value` at `ptr` where `mask` holds."""
        stored = STORED[name]
        if name == "bf16":
            value = pack_bfloat16(np.ascontiguousarray(value))
        if mask is not None and not mask.all():
            mask = np.broadcast_to(mask, ptr.shape)
            if not mask.any():
                return
            ptr, value = ptr[mask], np.broadcast_to(value, mask.shape)[mask]
        place = self.locate(ptr, stored)
        if place is not None:
            place[0][place[1]] = value
            return
        for address, item in zip(ptr.ravel(), np.broadcast_to(value, ptr.shape).ravel()):
            view, index = self.locate(np.array([address]), stored)  # type: ignore[misc]
            view[index[0]] = item


memory = Memory()
