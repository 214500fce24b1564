"""The launch path as on a GPU, the driver stood in for: run by test_triton_launch.py.

Triton compiles as it would there; what would go to the device is recorded instead.
"""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from lora_engine.kernels import launch as path
from lora_engine.kernels import lora_delta as op
from lora_engine.kernels import tunable
from lora_engine.kernels.compiled import Resources, compile_variant, problems, resources
from lora_engine.kernels.launch import DEVICES, Config, Variant

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}


@triton.jit(do_not_specialize=["n", "scale"])
def _scaled(p_x, p_b, p_y, n, scale, stride, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i * stride, i < n, 0.0).to(tl.float32) * scale
    if p_b is not None:
        b_x += tl.load(p_b + i, i < n, 0.0)
    tl.store(p_y + i * stride, b_x + BIAS, i < n)


class Storage(NamedTuple):
    size: int

    def nbytes(self) -> int:
        return self.size


class OnDevice:
    """What launch() and Triton read of a tensor."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype, address: int = 256, index: int = 0, size: int = 64):
        self.dtype, self.address, self.size = dtype, address, size
        self.device = torch.device("cuda", index)

    def data_ptr(self) -> int:
        return self.address

    def untyped_storage(self) -> Storage:
        return Storage(self.size)

    def ptr_range(self) -> int:
        return self.size


class Launch(NamedTuple):
    source: Any  # triton.compiler.ASTSource: signature, constants, attributes
    device: int
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]


class Driver:
    """A driver that loads nothing and records launches."""

    def __init__(self, backend: str) -> None:
        self.target = TARGETS[backend]
        self.device, self.stream, self.compiled = 0, 7, 0
        self.launches: list[Launch] = []
        self.utils = self
        self.dispatched = 0  # through JITFunction.run, not through a handle

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + device

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 64 * 1024}

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        return object(), object(), 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.compiled += 1

        def run(x, y, z, stream, function, packed, about, enter, leave, *arguments):
            self.launches.append(Launch(source, self.device, (x, y, z), stream, arguments))

        return run

    @contextmanager
    def on(self, index: int) -> Any:
        before, self.device = self.device, index
        yield
        self.device = before


@pytest.fixture
def make_driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(backend: str) -> Driver:
        driver = Driver(backend)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        monkeypatch.setattr(torch.cuda, "current_device", driver.get_current_device)
        monkeypatch.setattr(torch.cuda, "device", driver.on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(path, "HIP", backend == "hip")
        monkeypatch.setattr(path, "_HANDLES", {})
        monkeypatch.setattr(tunable, "identity", lambda index: {"name": "stand-in"})
        for fn in (_scaled, op._shrink, op._expand):
            fn.device_caches.clear()
        run = _scaled.run

        def counted(*args: Any, **kwargs: Any) -> Any:
            driver.dispatched += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(_scaled, "run", counted)
        return driver

    return make


@pytest.fixture
def driver(make_driver: Any) -> Driver:
    return make_driver("cuda")


PLAIN = Config(4, 2)
DIVISIBLE = ["tt.divisibility", 16]
X, B, Y = (OnDevice(torch.bfloat16), OnDevice(torch.float32), OnDevice(torch.float32))


def scaled(
    pointers: Any = (X, B, Y),
    sizes: Any = (100, 0.5),
    shape: Any = (64,),
    constants: Any = (128, 2),
    config: Config = PLAIN,
    grid: tuple[int, int, int] = (3, 2, 1),
) -> None:
    path.launch(_scaled, grid, pointers, sizes, shape, constants, config)


def test_a_shape_is_compiled_once_and_then_only_its_handle_is_used(driver: Driver) -> None:
    for n in (100, 1, 16):
        scaled(sizes=(n, 0.5 * n), grid=(n, 2, 1))
    assert (driver.compiled, driver.dispatched) == (1, 1)
    assert [launch.grid for launch in driver.launches] == [(100, 2, 1), (1, 2, 1), (16, 2, 1)]
    for launch, n in zip(driver.launches, (100, 1, 16), strict=True):
        assert launch.arguments == (X, B, Y, n, 0.5 * n, 64, 128, 2)
        assert launch.stream == 7
    source = driver.launches[0].source
    assert source.signature == {
        "p_x": "*bf16", "p_b": "*fp32", "p_y": "*fp32", "n": "i32", "scale": "fp32",
        "stride": "i32", "BLOCK": "constexpr", "BIAS": "constexpr",
    }  # fmt: skip
    assert source.constants == {(6,): 128, (7,): 2}
    divisible = [i for (i,), known in source.attrs.items() if DIVISIBLE in known]
    assert divisible == [0, 1, 2, 5]  # never the sizes


@pytest.mark.parametrize(
    "other",
    [
        {"pointers": (OnDevice(torch.float16), B, Y)},
        {"pointers": (X, None, Y)},
        {"shape": (1,)},
        {"shape": (65,)},
        {"shape": (2**31,)},
        {"constants": (256, 2)},
        {"constants": (128, 3)},
        {"config": Config(8, 2)},
        {"config": Config(4, 3)},
        {"config": Config(4, 2, fp_fusion=False)},
        {"sizes": (2**31, 0.5)},
        {"sizes": (2**63, 0.5)},
        {"sizes": (100, 2)},
    ],
    ids=str,
)
def test_what_differs_in_code_is_compiled_apart(driver: Driver, other: dict[str, Any]) -> None:
    for _ in range(2):
        scaled()
        scaled(**other)
    assert (driver.compiled, driver.dispatched) == (2, 2)
    first, second, third, fourth = driver.launches
    assert first.source is third.source
    assert second.source is fourth.source
    given = {"pointers": (X, B, Y), "sizes": (100, 0.5), "shape": (64,), "constants": (128, 2)}
    given.update({name: value for name, value in other.items() if name in given})
    assert second.arguments == fourth.arguments == tuple(v for g in given.values() for v in g)


def test_sizes_are_typed_by_their_value(driver: Driver) -> None:
    types = []
    for n in (2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63):
        scaled(sizes=(n, 0.5))
        types.append(driver.launches[-1].source.signature["n"])
    assert types == ["i32", "i64", "i32", "i64", "u64"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_misaligned_pointer_never_meets_code_for_aligned_ones(driver: Driver, which: int) -> None:
    off = [X, B, Y]
    off[which] = OnDevice(off[which].dtype, 264)
    for pointers in ((X, B, Y), off, (X, B, Y), off):
        scaled(tuple(pointers))
    assert driver.compiled == 2
    assert driver.dispatched == 3  # each of the misaligned
    for i, launch in enumerate(driver.launches):
        assert (DIVISIBLE in launch.source.attrs[(which,)]) == (i % 2 == 0)


def test_a_misaligned_first_call_leaves_no_handle(driver: Driver) -> None:
    scaled((OnDevice(torch.bfloat16, 264), B, Y))
    scaled()
    assert DIVISIBLE in driver.launches[1].source.attrs[(0,)]


def test_an_empty_grid_launches_nothing(driver: Driver) -> None:
    for grid in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        scaled(grid=grid)
    assert not driver.launches
    assert not driver.compiled


def test_another_device_runs_its_own_handle_and_stream(driver: Driver) -> None:
    there = tuple(OnDevice(p.dtype, index=1) for p in (X, B, Y))
    for pointers in ((X, B, Y), there, (X, B, Y), there):
        scaled(pointers)
    assert [(launch.device, launch.stream) for launch in driver.launches] == [(0, 7), (1, 8)] * 2
    assert driver.dispatched == driver.compiled == 2
    assert driver.device == 0


def test_storage_past_two_gigabytes_is_compiled_apart_on_amd(make_driver: Any) -> None:
    driver = make_driver("hip")
    far = OnDevice(torch.bfloat16, size=2**31)
    for x in (X, far, X, far):
        scaled((x, B, Y))
    assert (driver.compiled, driver.dispatched) == (2, 2)
    for i, launch in enumerate(driver.launches):
        assert (["tt.pointer_range", 32] in launch.source.attrs[(0,)]) == (i % 2 == 0)
        assert ["tt.pointer_range", 32] in launch.source.attrs[(1,)]


def test_handles_do_not_pile_up(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(path, "_MANY", 4)
    for stride in range(3, 15):
        scaled(shape=(stride,))
        assert len(path._HANDLES) <= 4


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("default", ["0", "1"])
def test_fusion_is_the_configurations_not_the_environments(
    fusion: bool, default: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    scaled(config=Config(4, 2, fusion))
    (handle,) = path._HANDLES.values()
    assert bool(re.search(r"\bfma\.rn\.f32\b", handle.asm["ptx"])) == fusion


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16-fp32"])
def test_variants_are_what_a_launcher_launches(
    driver: Driver, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same source, specialisation and options, by the key of Triton's own cache."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # of tensors on the CPU
    A, b = torch.zeros(16, 4096), torch.zeros(4096, 16)
    for n in (1, 65):
        x = torch.zeros(n, 4096, dtype=dtype)
        op.lora_delta(x, A, b, 2.0, torch.zeros_like(x), False)
    launched = {handle.hash for handle in path._HANDLES.values()}
    name = f"lora_delta-{path.FLOATS[dtype]}-fp32-"
    variants = [v for v in op.variants(DEVICES["sm_90"]) if v.name.startswith(name)]
    assert launched == {compile_variant(v, DEVICES["sm_90"]).hash for v in variants}
    assert len(launched) == len(driver.launches) == 4


def test_scratch_is_kept_and_grows(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    empty = torch.empty

    def on_cpu(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(count)
        return empty(count, dtype=dtype)

    monkeypatch.setattr(path, "_SCRATCH", path._Scratch())
    monkeypatch.setattr(torch, "empty", on_cpu)
    first = path.scratch("h", X, 10, torch.float32)
    assert path.scratch("h", X, first.numel(), torch.float32) is first
    grown = path.scratch("h", X, first.numel() + 1, torch.float32)
    assert grown.numel() > first.numel()
    assert path.scratch("h", X, 1, torch.float32) is grown
    held = [grown, path.scratch("g", X, 1, torch.float32), path.scratch("h", X, 1, torch.bfloat16)]
    held.append(path.scratch("h", OnDevice(torch.float32, index=1), 1, torch.float32))
    driver.stream = 70
    held.append(path.scratch("h", X, 1, torch.float32))
    thread = threading.Thread(target=lambda: held.append(path.scratch("h", X, 1, torch.float32)))
    thread.start()
    thread.join()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    held += [path.scratch("h", X, 1, torch.float32), path.scratch("h", X, 1, torch.float32)]
    assert len({t.data_ptr() for t in held}) == len(held) == len(made) - 1


@triton.jit(do_not_specialize=["n"])
def _product(p_x, p_y, n, stride, M: tl.constexpr, PRECISION: tl.constexpr):
    """x xᵀ in one block, as large as the caller likes."""
    i_m, i_k = tl.arange(0, M), tl.arange(0, 32)
    m_m = (i_m < n)[:, None]
    b_x = tl.load(p_x + i_m[:, None] * stride + i_k[None, :], m_m, 0.0)
    b_y = tl.dot(b_x, tl.trans(b_x), input_precision=PRECISION)
    tl.store(p_y + i_m[:, None] * stride + i_m[None, :], b_y, m_m)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_gate_sees_what_it_looks_for(name: str) -> None:
    device = DEVICES[name]

    def check(m: int, precision: str, spilled: int = 0) -> tuple[Resources, str]:
        given = (("fp32", "fp32"), ("i32",), (4096,), (m, precision))
        variant = Variant("v", _product, *given, Config(1, 1), True)
        kernel = compile_variant(variant, device)
        if spilled:
            count = re.compile(r"(\.vgpr_spill_count:\s+)0")
            kernel.asm["amdgcn"] = count.sub(rf"\g<1>{spilled}", kernel.asm["amdgcn"])
        used = resources(kernel)
        over = problems(variant, device, used._replace(shared=device.shared + 1))
        assert f"{device.shared + 1} bytes of shared memory, there are {device.shared}" in over
        return used, ", ".join(problems(variant, device, used))

    used, wrong = check(16, "tf32")
    assert not wrong
    assert 0 < used.shared <= 8192
    # How large a product AMD's registers hold depends on the version: its word is written in.
    used, wrong = check(128, "tf32") if device.backend == "cuda" else check(16, "tf32", 30)
    assert wrong == f"{used.spills} bytes spilled at {used.registers} registers a thread"
    assert used.spills > 100
    if device.backend == "cuda":  # AMD's matrix instructions multiply float32 too
        assert check(16, "ieee")[1] == "no matrix instructions"


def test_arguments_must_be_as_the_kernel_declares_them() -> None:
    def variant(sizes: tuple[str, ...], shape: tuple[int, ...]) -> Variant:
        given = ("bf16", "fp32", "fp32")
        return Variant("v", _scaled, given, sizes, shape, (128, 2), Config(), False)

    with pytest.raises(ValueError, match="stride, a size, is not in do_not_specialize"):
        compile_variant(variant(("i32", "fp32", "i32"), ()), DEVICES["sm_90"])
    with pytest.raises(ValueError, match="scale, of the shape, is not specialised"):
        compile_variant(variant(("i32",), (4096, 64)), DEVICES["sm_90"])
