"""nf4_linear against whoever multiplies with the same packed bytes, warm and cold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import lora_engine as le
from bench import check, peers_nf4
from bench.case import OURS, Case, Contender, Traffic, absent
from bench.machine import cache_bytes
from lora_engine import reference

DENSE_F32, DENSE_BF16 = "torch dense float32", "torch dense bfloat16"
ALONE = "nf4_linear without the pool"
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}


class Data:
    """One matrix, x [n, in] in the dtype computed in, and the right answer."""

    def __init__(self, rows: int, out: int, features: int, dtype: str) -> None:
        import torch

        rng = np.random.default_rng(0)
        self.w = le.nf4_quantize(rng.standard_normal((out, features), dtype=np.float32))
        self.W = self.w.to_float()
        self.x = torch.from_numpy(rng.standard_normal((rows, features), dtype=np.float32))
        self.x = self.x.to(getattr(torch, dtype))
        self.out = torch.empty(rows, out, dtype=self.x.dtype)
        x = self.x.double().numpy()
        values, magnitude = reference.nf4_linear(x, self.W), np.abs(x) @ np.abs(self.W).T
        self.expected = check.Expected(values, magnitude, TOLERANCE[dtype])

    def copies(self, count: int) -> list[le.NF4Tensor]:
        """The matrix at so many places in memory."""
        stored = [self.w.to_bitsandbytes("w") for _ in range(count - 1)]
        return [self.w, *(le.NF4Tensor.from_bitsandbytes(parts, "w") for parts in stored)]


def cold_copies(packed: int) -> int:
    """How many matrices in turn are twice the last-level cache, and never one of them is in it."""
    caches = cache_bytes()
    return max(2, -(-2 * caches.get("L3", caches["L2"]) // packed))


def contender(
    name: str, call: Callable[[], Any], expected: check.Expected, threads: int
) -> Contender:
    def verify() -> None:
        result = call()
        check.require(name, result.float() if hasattr(result, "float") else result, expected)

    return Contender(name, call, verify, inference=True, torch_threads=threads)


def build(rows: int, shape: tuple[int, int], dtype: str, threads: int, cold: bool,
          peers: tuple[str, ...]) -> list[Contender]:  # fmt: skip
    import torch

    data = Data(rows, *shape, dtype)
    count = cold_copies(data.w.nbytes) if cold else 1
    ours = [
        lambda w=w: le.nf4_linear(data.x, w, out=data.out)  # type: ignore[misc]
        for w in data.copies(count)
    ]
    found = [contender(OURS, peers_nf4.rotating(ours), data.expected, threads)]
    for name in peers:
        why = {
            peers_nf4.PACKED: peers_nf4.packed_missing,
            peers_nf4.BITSANDBYTES: lambda: absent("bitsandbytes"),
            peers_nf4.ONNXRUNTIME: lambda: absent("onnx") or absent("onnxruntime"),
        }.get(name, str)()
        if why:
            found.append(Contender(name, absent=why))
            continue
        expected = data.expected
        if name in (peers_nf4.PACKED, peers_nf4.BITSANDBYTES):
            call = peers_nf4.bitsandbytes(data.w, data.x, name == peers_nf4.PACKED)
        elif name == peers_nf4.ONNXRUNTIME:
            call = peers_nf4.onnxruntime(data.w, data.x.float(), threads)
        else:
            x = data.x.to(torch.float32 if name == DENSE_F32 else torch.bfloat16)
            call = peers_nf4.dense(torch.from_numpy(data.W), x, count)
            if name == DENSE_BF16:
                expected = expected._replace(tolerance=TOLERANCE["bfloat16"])
        found.append(contender(name, call, expected, threads))
    return found


def build_fused() -> list[Contender]:
    """8 rows, each with a bfloat16 adapter of rank 16 of its own."""
    data = Data(8, 4096, 4096, "bfloat16")
    pool = le.AdapterPool(4096, 4096, dtype="bfloat16")
    rng = np.random.default_rng(1)
    A = 0.01 * rng.standard_normal((8, 16, 4096), dtype=np.float32)
    B = 0.02 * rng.standard_normal((8, 4096, 16), dtype=np.float32)
    ids = np.array([pool.add(a, b, 2.0) for a, b in zip(A, B, strict=True)], np.int32)
    stored = {i: reference.Adapter(*([m] for m in pool.get(i)[:2]), 2.0) for i in range(8)}
    x = data.x.double().numpy()
    delta = reference.batched_lora_delta(x, stored, [4096], ids)
    expected = data.expected._replace(values=data.expected.values + delta)

    def fused() -> Any:
        return le.nf4_linear(data.x, data.w, pool=pool, ids=ids, out=data.out)

    def alone() -> Any:
        return le.nf4_linear(data.x, data.w, out=data.out)

    return [contender(OURS, fused, expected, 0), contender(ALONE, alone, data.expected, 0)]


def _case(rows: int, shape: tuple[int, int], dtype: str, threads: int = 0, cold: bool = False,
          within: float | None = None, **faster: float | None) -> Case:  # fmt: skip
    names = {
        "f32": DENSE_F32, "bf16": DENSE_BF16, "packed": peers_nf4.PACKED,
        "bnb": peers_nf4.BITSANDBYTES, "ort": peers_nf4.ONNXRUNTIME,
    }  # fmt: skip
    wanted = {names[key]: value for key, value in faster.items()}
    out, features = shape
    packed = out * features // 2 + out * features // 64 * 4
    size = 4 if dtype == "float32" else 2
    x, y = rows * features * size, rows * out * size
    copies = cold_copies(packed) if cold else 1
    where = f"{'cold' if cold else 'warm'}, {f'{threads} thread' if threads else 'all threads'}"
    return Case(
        "nf4_linear(x, w, out=y)",
        f"{out}x{features}, {rows} row{'s' if rows > 1 else ''}, {dtype}, {where}",
        lambda: build(rows, shape, dtype, threads, cold, tuple(wanted)),
        faster=wanted,
        within=within,
        traffic=Traffic(packed + x, y, copies * packed + x + y, threads),
        flops=2.0 * rows * out * features,
    )


SQUARE, UP, DOWN = (4096, 4096), (11008, 4096), (4096, 11008)
CASES = (
    _case(1, SQUARE, "bfloat16", threads=1, packed=1.6, bf16=7.0, bnb=30.0),
    _case(1, SQUARE, "bfloat16", packed=1.4, bf16=4.0, bnb=30.0),
    _case(1, SQUARE, "bfloat16", cold=True, within=1.15, bf16=None, bnb=None),
    _case(1, SQUARE, "float32", threads=1, ort=30.0, bnb=30.0, f32=None),
    _case(1, SQUARE, "float32", ort=30.0, bnb=30.0, f32=None),
    _case(1, SQUARE, "float32", cold=True, ort=None, f32=None),
    *(_case(1, shape, "bfloat16", bf16=None, bnb=None) for shape in (UP, DOWN)),
    *(_case(1, shape, "float32", f32=None, ort=None) for shape in (UP, DOWN)),
    *(_case(1, shape, "bfloat16", cold=True, bf16=None) for shape in (UP, DOWN)),
    _case(8, SQUARE, "bfloat16", threads=1, packed=1.3, bf16=None, bnb=None),
    _case(8, SQUARE, "bfloat16", packed=1.3, bf16=None, bnb=None),
    _case(8, SQUARE, "float32", f32=None, ort=None),
    *(_case(8, shape, "bfloat16", bf16=None, bnb=None) for shape in (UP, DOWN)),
    *(_case(rows, SQUARE, "bfloat16", bf16=None, f32=None) for rows in (2, 16)),
    _case(64, SQUARE, "bfloat16", threads=1, bf16=0.85, f32=None),
    *(_case(64, shape, "bfloat16", bf16=0.85, f32=None) for shape in (SQUARE, UP, DOWN)),
    *(_case(256, shape, "bfloat16", bf16=0.85, f32=None) for shape in (SQUARE, UP, DOWN)),
    Case(
        "nf4_linear(x, w, pool=pool, ids=ids, out=y)",
        "4096x4096, 8 rows on 8 adapters of r=16, bfloat16, warm, all threads",
        build_fused,
        faster={ALONE: 1 / 1.1},
    ),
)
