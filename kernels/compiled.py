"""A kernel compiled for a device that need not be there: what it takes, its machine code.

Arguments are bound and specialised by Triton's own dispatch, as in a launch; only the
driver, which would name the device, is stood in for. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget

from .launch import FLOATS, Device, Variant

_FAR = 1 << 31  # bytes: past what a 32-bit offset reaches
_TYPES = {name: dtype for dtype, name in FLOATS.items()}
_MATRIX = re.compile(
    r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*|\bv_(?:mfma|smfmac)_\w+"
)


class Resources(NamedTuple):
    """What a kernel takes, by its machine code.

    registers: of a thread. spills: bytes of a thread's memory that stand for registers.
    scalar_spills: AMD's scalar registers that are kept in lanes of vector registers, not in
    memory. shared: bytes of a block. matrix: the matrix instructions, each once.
    """

    registers: int
    spills: int
    scalar_spills: int
    shared: int
    matrix: tuple[str, ...]


class _Pointer:
    """What Triton reads of a tensor: type, alignment and, on AMD, the storage's extent."""

    def __init__(self, dtype: str, plain: bool) -> None:
        self.dtype = _TYPES.get(dtype, dtype)
        self._address, self._extent = (4, _FAR) if plain else (0, 0)

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._extent


class _Driver:
    """Stands in for the driver of a device; compiled kernels are kept under its name."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def get_current_target(self) -> GPUTarget:
        nvidia = self.device.backend == "cuda"
        return GPUTarget(self.device.backend, self.device.arch, 32 if nvidia else 64)

    def get_current_device(self) -> str:
        return self.device.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _driver(device: Device) -> Iterator[None]:
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(device))
    try:
        yield
    finally:
        config._active = before


def arguments(variant: Variant, plain: bool) -> tuple[Any, ...]:
    """Stand-ins for what the launcher would pass. ValueError: not as the kernel declares it."""
    sizes = {"i32": 1, "i64": _FAR, "fp32": 1.0}
    first, last = len(variant.pointers), len(variant.pointers) + len(variant.sizes)
    for p in variant.fn.params[first:last]:
        if not p.do_not_specialize:
            raise ValueError(f"{p.name}, a size, is not in do_not_specialize")
    for p in variant.fn.params[last : last + len(variant.shape)]:
        if p.do_not_specialize or p.is_constexpr:
            raise ValueError(f"{p.name}, of the shape, is not specialised")
    return (
        *(None if p is None else _Pointer(p, plain) for p in variant.pointers),
        *(sizes[s] for s in variant.sizes),
        *(_plain(i) if plain else i for i in variant.shape),
        *variant.constants,
    )


def _plain(i: int) -> int:
    """A number near i that Triton does not specialise on."""
    return 3 if i == 1 else i + 1 if i % 16 == 0 else i


def compile_variant(variant: Variant, device: Device, plain: bool = False) -> Any:
    """Triton's compiled kernel.

    plain: as for pointers without alignment into memory past 2 GB and for odd sizes and
    strides, which no specialisation helps.
    """
    given = arguments(variant, plain)
    with _driver(device):
        return variant.fn.warmup(
            *given,
            grid=(1, 1, 1),
            **variant.config.options(device.backend),
        )


def resources(kernel: Any) -> Resources:
    """Read from the machine code, not from what the compiler meant to use."""
    shared = kernel.metadata.shared  # given at launch
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

        return Resources(
            field("vgpr_count"),
            field("private_segment_fixed_size") + 4 * field("vgpr_spill_count"),
            field("sgpr_spill_count"),
            max(shared, field("group_segment_fixed_size")),
            _matrix(text),
        )
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", _cuobjdump(kernel, "-res-usage")))
    reserved = 1024 if kernel.metadata.target.arch >= 90 else 0  # by the system, past the limit
    return Resources(
        int(usage["REG"]),
        _spills(kernel, int(usage["STACK"]) + int(usage["LOCAL"])),
        0,
        shared + int(usage["SHARED"]) - reserved,
        _matrix(kernel.asm["ptx"]),
    )


def _matrix(text: str) -> tuple[str, ...]:
    return tuple(sorted(set(_MATRIX.findall(text))))


def _spills(kernel: Any, reserved: int) -> int:
    """Of the bytes reserved for a thread, those that are used: Triton 3.7 reserves some that
    no instruction touches."""
    if not reserved:
        return 0
    return reserved if re.search(r"\b(STL|LDL)\b", machine_code(kernel)) else 0


def machine_code(kernel: Any) -> str:
    """The instructions as text."""
    return kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else _cuobjdump(kernel, "-sass")


def _cuobjdump(kernel: Any, what: str) -> str:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def problems(variant: Variant, device: Device, used: Resources) -> list[str]:
    """What keeps the kernel from running well on the device, in words."""
    found = []
    if used.spills:
        found.append(f"{used.spills} bytes spilled at {used.registers} registers a thread")
    if used.shared > device.shared:
        found.append(f"{used.shared} bytes of shared memory, there are {device.shared}")
    if variant.matrix and not used.matrix:
        found.append("no matrix instructions")
    return found
