"""How kernels are launched: the device, the configuration, the compiled handle.

Arguments of a kernel come in four groups, in this order: pointers (tensors, or None),
sizes (numbers that change from call to call, each in the kernel's ``do_not_specialize``),
shape (numbers that Triton specialises on) and constants (``tl.constexpr``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IN_INTERPRETER = tl.constexpr(INTERPRETED)  # the same, for kernels to read
HIP = bool(torch.version.hip)

FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Device(NamedTuple):
    """What configurations depend on. arch: 80, 90, ... or "gfx942"; shared: bytes a block has."""

    backend: str
    arch: int | str
    processors: int
    shared: int

    @property
    def name(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


DEVICES = {
    "sm_80": Device("cuda", 80, 108, 163 * 1024),
    "sm_90": Device("cuda", 90, 132, 227 * 1024),
    "sm_100": Device("cuda", 100, 148, 227 * 1024),
    "gfx942": Device("hip", "gfx942", 304, 64 * 1024),
}


class Config(NamedTuple):
    """How a kernel is compiled.

    fp_fusion: whether a * b + c may become one rounding. registers: the most a thread may
    have on NVIDIA, all of which the compiler then uses before it spills; 0: as it sees fit.
    """

    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True
    registers: int = 0

    def options(self, backend: str) -> dict[str, Any]:
        """In Triton's words. On AMD one matrix instruction for all tilings, as on NVIDIA: the
        order of its sums is a row's."""
        limit = {"maxnreg": self.registers} if self.registers and backend == "cuda" else {}
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
            **limit,
            **({"matrix_instr_nonkdim": 16} if backend == "hip" else {}),
        }


@cache
def device_of(index: int | None) -> Device:
    """The device of that index; the interpreter stands in for an H200.

    Raises RuntimeError for one that the kernels are not made for.
    """
    if INTERPRETED:
        return DEVICES["sm_90"]
    properties = torch.cuda.get_device_properties(index)
    count = properties.multi_processor_count
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        known = DEVICES.get(arch)
        if known is None:
            raise RuntimeError(f"triton: device: expected gfx942, got {arch}")
        return known._replace(processors=count)
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise RuntimeError(
            f"triton: device: expected compute capability 8.0 or newer, got {major}.{minor}"
        )
    shared = int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))
    return Device("cuda", 10 * major + minor, count, shared)


_MOST_BLOCKS = 65535  # of CUDA's grids in y and z
_HANDLES: dict[Any, Any] = {}
_MANY = 4096  # handles: a layout may bring the number of rows into the shape, as a stride


def launch(
    fn: Any,
    grid: tuple[int, int, int],
    pointers: tuple[torch.Tensor | None, ...],
    sizes: tuple[float, ...],
    shape: tuple[int, ...],
    constants: tuple[Any, ...],
    config: Config,
) -> None:
    """Runs a kernel; the compiled one is looked up once a shape, dtype and device.

    Triton's own dispatch goes through every argument on every call. Here the key is what
    the call's shape fixes, and pointers that are not 16-byte aligned take Triton's way.
    """
    if 0 in grid:
        return
    if max(grid[1:]) > _MOST_BLOCKS:
        raise ValueError(f"launch: grid: expected at most {_MOST_BLOCKS} blocks a side, got {grid}")
    arguments = (*pointers, *sizes, *shape, *constants)
    if INTERPRETED:
        fn[grid](*arguments)
        return
    index = pointers[0].device.index  # type: ignore[union-attr]  # the first is always there
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(fn, grid, pointers, sizes, shape, constants, config)
    aligned = True
    kinds = [_kind(size) for size in sizes]
    for p in pointers:
        if p is None:
            kinds.append(None)
        else:
            kinds.append(p.dtype)
            aligned = aligned and p.data_ptr() % 16 == 0
            if HIP:  # offsets of 32 bits, where they reach all of the storage
                kinds.append(p.untyped_storage().nbytes() < 2**31)
    # fn.fn: hashing a JITFunction takes a lock
    key = (fn.fn, index, tuple(kinds), shape, constants, config)
    handle = _HANDLES.get(key) if aligned else None
    if handle is not None:
        handle[grid](*arguments)
        return
    handle = fn[grid](*arguments, **config.options("hip" if HIP else "cuda"))
    if aligned:
        if len(_HANDLES) >= _MANY:
            _HANDLES.clear()
        _HANDLES[key] = handle


def _kind(size: Any) -> Any:
    """What of a size Triton compiles into the kernel: its type."""
    if isinstance(size, float):
        return float
    return 32 if -(2**31) <= size < 2**31 else 64 if size < 2**63 else "unsigned"


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class _Scratch(threading.local):
    """Of each thread its own: between the launches of one op come those of others."""

    def __init__(self) -> None:
        self.held: dict[Any, torch.Tensor] = {}


_SCRATCH = _Scratch()


def scratch(name: str, like: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """At least ``count`` elements of working memory, kept for the thread's next call on the stream.

    A graph that is being captured gets memory of its own, which lives as long as the graph.
    """
    stream = None
    if like.is_cuda:
        if capturing(like.device):
            return torch.empty(count, dtype=dtype, device=like.device)
        stream = triton.runtime.driver.active.get_current_stream(like.device.index)
    key = (name, like.device, stream, dtype)
    held = _SCRATCH.held.get(key)
    if held is None or held.numel() < count:
        held = torch.empty(max(count, 1024), dtype=dtype, device=like.device)
        _SCRATCH.held[key] = held
    return held


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Variant(NamedTuple):
    """One thing a launcher can launch, for compiling it without a GPU.

    pointers: element types ("fp32", "bf16", "i32", ...; None for None); sizes: "i32" or
    "fp32"; shape: values that specialise as the launcher's would; constants, config: as
    launched; matrix: whether the machine code must hold matrix instructions.
    """

    name: str
    fn: Any
    pointers: tuple[str | None, ...]
    sizes: tuple[str, ...]
    shape: tuple[int, ...]
    constants: tuple[Any, ...]
    config: Config
    matrix: bool


Variants = Iterator[Variant]
