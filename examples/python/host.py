"""A host that takes the C library through ctypes, with no binding. host.py LIBRARY ADAPTER"""

from __future__ import annotations

import ctypes as c
import struct
import sys
from pathlib import Path

IN, OUT, ROWS, STEPS = 96, 80, 4, 25
ABI, FLOAT32, APPLIED = 1, 0, 1


class Array(c.Structure):
    """le_array"""

    _fields_ = [
        ("data", c.c_void_p),
        ("shape", c.c_int64 * 4),
        ("strides", c.c_int64 * 4),
        ("ndim", c.c_int32),
        ("dtype", c.c_int32),
        ("flags", c.c_uint32),
    ]


class PoolOptions(c.Structure):
    """le_pool_options"""

    _fields_ = [
        ("in_features", c.c_int64),
        ("out_features", c.POINTER(c.c_int64)),
        ("num_slices", c.c_int32),
        ("dtype", c.c_int32),
        ("capacity", c.c_int64),
        ("max_rank", c.c_int32),
        ("history", c.c_int32),
        ("seed", c.c_uint64),
    ]


class Step(c.Structure):
    """le_step"""

    _fields_ = [
        ("lr", c.c_float),
        ("lr_ratio", c.c_float),
        ("max_norm", c.c_float),
        ("weight_decay", c.c_float),
        ("train_A", c.c_int32),
        ("ewc", c.c_void_p),
    ]


def load(path: str) -> c.CDLL:
    """The library, its functions declared."""
    lib = c.CDLL(path)
    handle, array, slot = c.c_void_p, c.POINTER(Array), c.c_int32
    out = c.POINTER(c.c_void_p)
    names, size = c.POINTER(c.c_char_p), c.POINTER(c.c_size_t)
    lib.le_last_error.restype = c.c_char_p
    for name, *arguments in (
        ("le_last_error", handle),
        ("le_context_create", handle, out),
        ("le_context_destroy", handle),
        ("le_pool_create", handle, c.POINTER(PoolOptions), out),
        ("le_pool_destroy", handle),
        ("le_pool_import", handle, c.c_char_p, c.c_size_t, names, c.c_float, c.POINTER(slot)),
        ("le_pool_export", handle, slot, names, c.c_char_p, c.c_size_t, size),
        ("le_pool_forward_slot", handle, slot, array, c.c_int32, c.c_int32, array),
        ("le_pool_adapt_slot", handle, slot, array, array, c.POINTER(Step),
         c.POINTER(c.c_uint8), c.POINTER(c.c_double)),
    ):  # fmt: skip
        getattr(lib, name).argtypes = arguments
    return lib


class Stream:
    """Multiples of 1/16 from -1 to 1 (an LCG: Numerical Recipes)."""

    state = 1

    def draw(self, to: c.Array[c.c_float]) -> None:
        for i in range(len(to)):
            self.state = (self.state * 1664525 + 1013904223) % (1 << 32)
            to[i] = ((self.state >> 8) % 33 - 16) / 16


def fnv1a(digest: int, data: bytes) -> int:
    for byte in data:
        digest = (digest ^ byte) * 16777619 % (1 << 32)
    return digest


def matrix(data: c.Array[c.c_float], rows: int, cols: int) -> Array:
    strides = (c.c_int64 * 4)(cols, 1)
    return Array(c.addressof(data), (c.c_int64 * 4)(rows, cols), strides, 2, FLOAT32, 0)


def main(library: str, adapter: str) -> None:
    lib = load(library)

    def check(status: int) -> None:
        if status:
            raise RuntimeError(lib.le_last_error(None).decode())

    assert lib.le_abi_version() == ABI
    context, pool, slot = c.c_void_p(), c.c_void_p(), c.c_int32()
    check(lib.le_context_create(None, c.byref(context)))
    outs = (c.c_int64 * 1)(OUT)
    options = PoolOptions(IN, outs, 1, FLOAT32, 0, 0, 0, 0)
    check(lib.le_pool_create(context, c.byref(options), c.byref(pool)))
    data = Path(adapter).read_bytes()
    check(lib.le_pool_import(pool, data, len(data), None, 2.0, c.byref(slot)))

    x, y, target = ((c.c_float * (ROWS * n))() for n in (IN, OUT, OUT))
    of_x, of_y = matrix(x, ROWS, IN), matrix(y, ROWS, OUT)
    step = Step(0.001, 1.0, 1.0, 0.0, 1, None)
    stream, digest = Stream(), 2166136261
    outcome, norm = c.c_uint8(), c.c_double()
    for _ in range(STEPS):
        stream.draw(x)
        stream.draw(target)
        check(lib.le_pool_forward_slot(pool, slot, of_x, 0, 0, of_y))
        digest = fnv1a(digest, bytes(y))
        for e in range(len(y)):
            y[e] -= target[e]
        told = step, c.byref(outcome), c.byref(norm)
        check(lib.le_pool_adapt_slot(pool, slot, of_x, of_y, *told))
        assert outcome.value == APPLIED

    names, size = (c.c_char_p * 1)(b"served"), c.c_size_t()
    check(lib.le_pool_export(pool, slot, names, None, 0, c.byref(size)))
    learned = c.create_string_buffer(size.value)
    check(lib.le_pool_export(pool, slot, names, learned, size.value, c.byref(size)))
    digest = fnv1a(digest, learned.raw)
    print(f"digest {struct.pack('>I', digest).hex()}")
    lib.le_pool_destroy(pool)
    lib.le_context_destroy(context)


if __name__ == "__main__":
    main(*sys.argv[1:])
