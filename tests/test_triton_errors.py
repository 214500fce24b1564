"""What the Triton backend refuses: each message names op, argument, expected and got, and
nothing was written before it."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_triton import DEVICE, indices, interpreted, on_device, triton_backend  # noqa: F401

import lora_engine as le
from lora_engine.backends import triton_arrays
from lora_engine.kernels import launch

pytestmark = pytest.mark.usefixtures("triton_backend")

N, IN, OUT, RANK = 3, 16, 8, 2
SHAPES = {
    "x": (N, IN),
    "grad": (N, OUT),
    "A": (RANK, IN),
    "B": (OUT, RANK),
    "out": (N, OUT),
    "weights": (N,),
    "F": (OUT, IN),
    "g": (OUT, IN),
    "F_A": (RANK, IN),
    "F_B": (OUT, RANK),
    "u": (OUT,),
    "v": (IN,),
}
ARRAYS = {  # of each op; the outputs
    "lora_delta": (("x", "A", "B", "out"), ("out",)),
    "batched_lora_delta": (("x", "ids", "weights", "out"), ("out",)),
    "fisher_accumulate": (("F", "g"), ("F",)),
    "lora_fisher": (("x", "grad", "A", "B", "segments", "F_A", "F_B"), ("F_A", "F_B")),
    "lora_fisher_factors": (("x", "grad", "u", "v"), ("u", "v")),
}
NUMBERS = {
    "lora_delta": ("scaling",),
    "fisher_accumulate": ("gamma", "scale"),
    "lora_fisher": ("scaling",),
}
OPTIONAL = ("out", "weights", "segments")
DTYPES = {"ids": "int32", "segments": "int32", "weights": "float32"}
DTYPES |= dict.fromkeys(("F_A", "F_B", "u", "v"), "float64 or float32")
EACH = [(op, name) for op, (arrays, _) in ARRAYS.items() for name in arrays]
OUTPUTS = [(op, name) for op, (_, outputs) in ARRAYS.items() for name in outputs]


def good(op):
    """Arguments that the op takes."""
    rng = np.random.default_rng(0)
    args = {}
    for name in ARRAYS[op][0]:
        if name in ("ids", "segments"):
            args[name] = indices([0, 1, -1] if name == "ids" else [0, 1, 3])
        else:
            args[name] = on_device(rng.standard_normal(SHAPES[name]))
    return args | dict.fromkeys(NUMBERS.get(op, ()), 0.5)


def a_pool():
    pool = le.AdapterPool(IN, OUT)
    rng = np.random.default_rng(1)
    for _ in range(2):
        pool.add(*(rng.standard_normal(SHAPES[name]).astype("f4") for name in "AB"), 1.0)
    return pool


def call(op, args):
    args = dict(args)
    if op == "batched_lora_delta":
        return le.batched_lora_delta(args.pop("x"), a_pool(), **args)
    outputs = ARRAYS[op][1]
    if len(outputs) == 2 and "out" not in args:
        args["out"] = tuple(args.pop(name) for name in outputs)
    return getattr(le, op)(**args)


def memory(array):
    """The bytes of what can be read."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    if not isinstance(array, torch.Tensor) or array.device.type != DEVICE:
        return None
    if array.layout != torch.strided or not array.untyped_storage().nbytes():
        return None
    return array.detach().resolve_neg().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def refused(op, args, error, message):
    """The op refuses with this message, and has written to none of its arrays."""
    before = {name: memory(a) for name, a in args.items()}
    with pytest.raises(error, match=f"^{op}: {message}"):
        call(op, args)
    assert {name: memory(a) for name, a in args.items()} == before


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def negated(shape):
    return torch.ones(shape, dtype=torch.complex64, device=DEVICE).conj().imag


@pytest.mark.parametrize("op", ARRAYS)
def test_the_good_arguments_are_good(op):
    call(op, good(op))


@pytest.mark.parametrize(("op", "name"), EACH)
def test_dtypes(op, name):
    wanted = DTYPES.get(name, "(float32, bfloat16 or float16|.*float32, the dtype of)")
    wrong = [torch.int64, torch.uint16, torch.float64, torch.bool]
    wrong += [torch.int32] if "int" not in wanted else [torch.float32]
    for dtype in wrong:
        if "64" in wanted and dtype == torch.float64:
            continue
        args = good(op)
        args[name] = torch.ones(args[name].shape, dtype=dtype, device=DEVICE)
        got = str(dtype).removeprefix("torch.")
        refused(op, args, TypeError, f"{name}: expected {wanted}.*got {got}")


PAIRS = [
    ("lora_delta", "B", "A"),
    ("lora_delta", "out", "x"),
    ("batched_lora_delta", "out", "x"),
    ("lora_fisher", "grad", "x"),
    ("lora_fisher", "B", "A"),
    ("lora_fisher_factors", "grad", "x"),
]


@pytest.mark.parametrize(("op", "name", "like"), PAIRS)
def test_dtypes_that_go_together(op, name, like):
    args = good(op)
    args[name] = args[name].bfloat16()
    refused(op, args, TypeError, f"{name}: expected float32, the dtype of {like}, got bfloat16")


@pytest.mark.parametrize(("op", "name"), EACH)
def test_what_is_no_array_in_memory(op, name):
    shape = good(op)[name].shape
    changes = [
        ([[1.0]], TypeError, "a NumPy array or a torch tensor, got list"),
        (np.float32(1.0), TypeError, "a NumPy array or a torch tensor, got float32"),
        (torch.ones(shape, device="meta"), ValueError, f"a tensor on {DEVICE}.*got one on meta"),
        (torch.ones(shape, device=DEVICE).to_sparse(), TypeError, "a dense tensor, got torch.spa"),
        (freed(torch.ones(shape, device=DEVICE)), ValueError, "an array with memory, got one with"),
        (negated(shape), ValueError, "plain memory, got a tensor with the negative bit set"),
        (
            torch.ones(shape, device=DEVICE, requires_grad=True),
            ValueError,
            "a tensor outside autograd, got one that requires grad",
        ),
    ]
    if name not in OPTIONAL:
        changes.append((None, TypeError, "a NumPy array or a torch tensor, got NoneType"))
    for value, error, message in changes:
        refused(op, good(op) | {name: value}, error, f"{name}: expected {message}")


@pytest.mark.parametrize(("op", "name"), EACH)
def test_dimensions(op, name):
    args = good(op)
    args[name] = args[name].unsqueeze(0).unsqueeze(0)
    refused(op, args, ValueError, rf"{name}: expected .*, got .*\[1, 1, ")


@pytest.mark.parametrize(
    ("op", "name", "shape", "message"),
    [
        ("lora_delta", "A", (RANK, IN + 1), r"A: expected shape \[n, 16\], got \[2, 17\]"),
        ("lora_delta", "B", (OUT, 3), r"B: expected shape \[n, 2\], got \[8, 3\]"),
        ("lora_delta", "x", (N, 15), r"A: expected shape \[n, 15\], got \[2, 16\]"),
        ("lora_delta", "out", (2, OUT), r"out: expected shape \[3, 8\], got \[2, 8\]"),
        ("lora_delta", "out", (N, 9), r"out: expected shape \[3, 8\], got \[3, 9\]"),
        ("batched_lora_delta", "x", (N, 15), r"x: expected shape \[n, 16\], got \[3, 15\]"),
        ("batched_lora_delta", "ids", (4,), r"ids: expected one a row of x, \[3\].*\[4\]"),
        ("batched_lora_delta", "weights", (3, 2), r"weights: expected the shape of ids, \[3\]"),
        ("batched_lora_delta", "out", (N, 9), r"out: expected shape \[3, 8\], got \[3, 9\]"),
        ("fisher_accumulate", "g", (OUT, 15), r"g: expected shape \[8, 16\], got \[8, 15\]"),
        ("lora_fisher", "x", (N, 15), r"x: expected shape \[n, 16\], got \[3, 15\]"),
        ("lora_fisher", "grad", (2, OUT), r"grad: expected shape \[3, 8\], got \[2, 8\]"),
        ("lora_fisher", "grad", (N, 9), r"grad: expected shape \[3, 8\], got \[3, 9\]"),
        ("lora_fisher", "A", (RANK, 15), r"x: expected shape \[n, 15\], got \[3, 16\]"),
        ("lora_fisher", "B", (OUT, 3), r"B: expected shape \[n, 2\], got \[8, 3\]"),
        ("lora_fisher", "F_A", (RANK, 15), r"F_A: expected shape \[2, 16\], got \[2, 15\]"),
        ("lora_fisher", "F_B", (RANK, OUT), r"F_B: expected shape \[8, 2\], got \[2, 8\]"),
        ("lora_fisher_factors", "grad", (2, OUT), r"grad: expected shape \[3, any\], got \[2, 8\]"),
        ("lora_fisher_factors", "u", (IN,), r"u: expected shape \[8\], got \[16\]"),
    ],
)
def test_shapes_are_named(op, name, shape, message):
    args = good(op)
    args[name] = args[name].new_ones(shape)
    refused(op, args, ValueError, message)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], r"expected offsets \[S\+1\], at least one, got shape \[0\]"),
        ([[0, 3]], r"expected offsets \[S\+1\], at least one, got shape \[1, 2\]"),
        pytest.param([1, 3], "expected 0 first, got 1", marks=interpreted),
        pytest.param([0, 2], "expected the number of rows last, 3, got 2", marks=interpreted),
        pytest.param([0, 4], "expected the number of rows last, 3, got 4", marks=interpreted),
        pytest.param([0, 2, 1, 3], "expected ascending offsets, got 1 after 2", marks=interpreted),
        pytest.param([0, -1, 3], "expected ascending offsets, got -1 after 0", marks=interpreted),
    ],
)
def test_segments(segments, message):
    args = good("lora_fisher") | {"segments": indices(segments)}
    refused("lora_fisher", args, ValueError, f"segments: {message}")


@pytest.mark.parametrize("out", [None, "single", "three"])
@pytest.mark.parametrize("op", ["lora_fisher", "lora_fisher_factors"])
def test_a_pair_of_outputs(op, out):
    args = good(op)
    first, second = (args.pop(name) for name in ARRAYS[op][1])
    if out is None:
        assert len(call(op, args | {"out": None})) == 2
        return
    args["out"] = first if out == "single" else (first, second, first)
    refused(op, args, TypeError, r"out: expected a pair of arrays \((F_A, F_B|u, v)\), got")


@pytest.mark.parametrize(("op", "name"), [(op, n) for op, names in NUMBERS.items() for n in names])
def test_numbers(op, name):
    for value in (float("nan"), float("inf"), -float("inf"), 1e39):
        refused(op, good(op) | {name: value}, ValueError, f"{name}: expected a finite number, got")
    for value in (None, "1"):
        refused(op, good(op) | {name: value}, TypeError, f"{name}: expected a number, got")


def test_scaling_of_an_adapter():
    pool = a_pool()
    with pytest.raises(ValueError, match=r"AdapterPool\.add: scaling: expected a finite number"):
        pool.add(np.ones((RANK, IN), "f4"), np.ones((OUT, RANK), "f4"), float("nan"))
    assert len(pool) == 2


# ---- outputs --------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), OUTPUTS)
def test_outputs_that_hold_an_element_twice(op, name):
    shape = SHAPES[name]
    twice = [torch.ones((1,) * len(shape), device=DEVICE).expand(shape)]
    if len(shape) == 2:
        twice += [torch.ones(999, device=DEVICE).as_strided(shape, (shape[1] - 1, 1))]
    for value in twice:
        expected = f"{name}: expected each element at its own address, got"
        refused(op, good(op) | {name: value}, ValueError, expected)


@interpreted
@pytest.mark.parametrize(("op", "name"), OUTPUTS)
def test_arrays_that_cannot_be_written_in_place(op, name):
    shape = SHAPES[name]
    read_only = np.ones(shape, "f4")
    read_only.flags.writeable = False
    bytes_ = np.zeros(4 * np.prod(shape) + 1, "u1")
    for value, message in (
        (read_only, "a writable array, got a read-only one"),
        (np.ones(shape, "f4")[::-1], "whole elements, forward in memory, got strides"),
        (bytes_[1:].view("f4").reshape(shape), "whole elements, .*got strides .* 1 bytes past"),
    ):
        refused(op, good(op) | {name: value}, ValueError, f"{name}: expected {message}")


@interpreted
@pytest.mark.parametrize(("op", "name"), EACH)
def test_arrays_of_other_kinds(op, name):
    kind = "i4" if "int" in DTYPES.get(name, "") else "f4"
    ones = np.ones(good(op)[name].shape, kind)
    for value, error, message in (
        (ones.astype(">" + kind), ValueError, f"native byte order, got >{kind}"),
        (np.ma.masked_array(ones, mask=True), TypeError, "a plain array, got a masked one"),
        (ones.astype(object), TypeError, ".*got object"),
    ):
        refused(op, good(op) | {name: value}, error, f"{name}: expected {message}")


SHARED = [
    (op, out, name)
    for op, (arrays, outputs) in ARRAYS.items()
    for out in outputs
    for name in arrays
    if name != out and (name not in outputs or outputs.index(name) < outputs.index(out))
]


@pytest.mark.parametrize(("op", "out", "name"), SHARED)
def test_outputs_that_share_memory(op, out, name):
    """By all but one element, whatever the shapes."""
    args = good(op)
    buffer = torch.zeros(256, device=DEVICE)
    size = args[name].numel()
    first = buffer[:size].view(args[name].dtype).view(args[name].shape)
    first.copy_(args[name])
    last = buffer[size - 1 : size - 1 + args[out].numel()].view(args[out].shape)
    args |= {name: first, out: last}
    message = f"{out}: expected memory of its own, got memory shared with {name}"
    refused(op, args, ValueError, message)
    # With nothing shared, side by side in one buffer, both are taken.
    after = buffer[size : size + args[out].numel()].view(args[out].shape)
    call(op, args | {out: after})


def test_without_autograd_a_parameter_is_an_array():
    args = good("lora_delta")
    want = le.lora_delta(*(args[n] for n in ("x", "A", "B")), 0.5)
    with torch.no_grad():
        got = le.lora_delta(*(args[n].requires_grad_() for n in ("x", "A", "B")), 0.5)
    assert torch.equal(got, want)
    assert not got.requires_grad


# ---- slots ----------------------------------------------------------------------


def test_a_bad_id_counts_as_none_and_the_next_call_says_so():
    pool, x = a_pool(), torch.ones(N, IN, device=DEVICE)
    pool.remove(1)
    for bad in (1, 2, 99, -2):
        out = torch.full((N, OUT), 7.0, device=DEVICE)
        pool.forward(x, indices([0, bad, -1]), out=out)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert (out[1:] == 7).all()
        with pytest.raises(IndexError, match=rf"ids: expected -1 or slots in use .*got {bad}"):
            pool.forward(x, indices([0, 0, 0]))
        pool.forward(x, indices([0, 0, 0]))


@pytest.mark.parametrize("slot", [1, 2, -1])
def test_slots_that_are_not_there(slot):
    pool = a_pool()
    pool.remove(1)
    message = f"slot: expected (a slot in use|one of the pool's 2 slots), got {slot}"
    with pytest.raises(IndexError, match=rf"AdapterPool\.get: {message}"):
        pool.get(slot)
    with pytest.raises(IndexError, match=rf"AdapterPool\.remove: {message}"):
        pool.remove(slot)


# ---- devices --------------------------------------------------------------------


def test_two_devices(monkeypatch):
    """Each array must be where x is; a second device is played by "meta"."""
    like = torch.ones(2, 2, device=DEVICE)
    other = torch.ones(2, 2, device="meta")
    monkeypatch.setattr(triton_arrays, "tensor", lambda op, name, array: array)
    want = f"op: A: expected a tensor on {DEVICE}.*, where x is, got meta"
    with pytest.raises(ValueError, match=want):
        triton_arrays.matrix("op", "A", other, like=like)


def run(code, **changes):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LORA_ENGINE_ISA")}
    env |= changes
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_fails_loudly():
    use = (
        "import lora_engine as le, torch; x = torch.ones(1, 1); print(le.lora_delta(x, x, x, 1.0))"
    )
    failed = run(use, LORA_ENGINE_BACKEND="triton")
    assert failed.returncode
    assert "RuntimeError: backend triton: no GPU" in failed.stderr
    told = run("import lora_engine as le; print(le.backends()['triton'])")
    assert told.stdout.startswith("unavailable: no GPU (on a CPU the kernels run with TRITON_INT")


def test_the_report_names_what_runs():
    text = le.backends()["triton"]
    assert text.startswith("Triton 3.")
    assert ("interpreted on the CPU" in text) == launch.INTERPRETED


def a_gpu(monkeypatch, capability, arch="", hip=None):
    """Stands in for what torch says of a device."""
    found = SimpleNamespace(
        multi_processor_count=40, gcnArchName=arch, shared_memory_per_block_optin=65536
    )
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    return launch.device_of.__wrapped__


def test_devices_that_the_kernels_are_not_made_for(monkeypatch):
    device_of = a_gpu(monkeypatch, (7, 5))
    with pytest.raises(RuntimeError, match=r"triton: device: expected .*8\.0 or newer, got 7\.5"):
        device_of(0)
    device_of = a_gpu(monkeypatch, (9, 0), "gfx1100:sramecc+", "6.4")
    with pytest.raises(RuntimeError, match="triton: device: expected gfx942, got gfx1100"):
        device_of(0)
    device_of = a_gpu(monkeypatch, (9, 4), "gfx942:sramecc+:xnack-", "6.4")
    assert (device_of(0).name, device_of(0).processors) == ("gfx942", 40)
    device_of = a_gpu(monkeypatch, (8, 9))
    assert device_of(0) == launch.Device("cuda", 89, 40, 65536)
    monkeypatch.setattr(launch, "device_of", a_gpu(monkeypatch, (7, 0)))
    assert le.backends()["triton"].startswith("unavailable: triton: device: expected compute")
