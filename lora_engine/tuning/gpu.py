"""Tuning the Triton kernels: lora_delta, batched_lora_delta and nf4_linear.

A candidate must compile without spills, meet the float64 reference and, in the ops whose rows
do not depend on their batch, give the heuristic's bits. It is timed as a CUDA graph over copies
of the data that the L2 cache does not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import product
from math import ceil
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

import lora_engine as le
from lora_engine import reference
from lora_engine.kernels import batched_lora_delta, lora_delta, nf4_linear
from lora_engine.kernels.launch import FLOATS, INTERPRETED, device_of
from lora_engine.kernels.nf4_forms import TILING as NF4_TILING
from lora_engine.kernels.nf4_forms import Choice as Nf4Choice
from lora_engine.kernels.nf4_forms import how_of
from lora_engine.kernels.tunable import Tunable
from lora_engine.reference import Adapter
from lora_engine.tuning.search import DeviceLost, Job
from lora_engine.tuning.shapes import Shape

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
COLD = 100 << 20  # bytes that are gone through before any is read again
MOST_COPIES = 256
CHECKED_ROWS = 16  # against the reference; all of them against the heuristic's bits
ADAPTERS = 64  # of a batch
NESTED = 256  # blocks of a doubly quantised absmax, as bitsandbytes has it
Call = Callable[[int], torch.Tensor]  # of the i-th copy
Timer = Callable[[Call, int], float]


def graph_seconds(call: Call, copies: int) -> float:
    """A call's part of a graph that goes through all copies: the median of some replays."""
    for i in range(copies):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    samples = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e-3 / copies)
    return float(median(samples[2:]))


class Case(NamedTuple):
    """What is tuned."""

    shape: Shape
    dtype: torch.dtype
    rank: int
    rows: int
    double_quant: bool = False


def _tensor(rng: np.random.Generator, *shape: int, like: Case) -> torch.Tensor:
    values = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return values.to(like.dtype).to(_where())


def _where() -> str:
    return "cpu" if INTERPRETED else "cuda"


def _host(t: torch.Tensor) -> Any:
    return t.detach().double().cpu().numpy()


def _on_device(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RuntimeError as error:
        if "CUDA error" in str(error) or "an illegal" in str(error):
            raise DeviceLost(f"the device failed: {str(error).splitlines()[0]}") from None
        raise


class Trial:
    """A case with its data. What differs from op to op: ``_prepare``, ``call``, ``expected``,
    ``variants``, ``tunable`` and whether a row's bits are its own (``own_bits``)."""

    tunable: Tunable
    own_bits = True

    def __init__(self, case: Case, heuristic: Any, timer: Timer) -> None:
        self.case, self.heuristic, self.timer = case, heuristic, timer
        rng = np.random.default_rng(0)
        n, (wide, out) = case.rows, case.shape
        size = case.dtype.itemsize * n * (wide + out) + self.weight_bytes(case)
        self.copies = 2 if INTERPRETED else max(2, min(ceil(COLD / size), MOST_COPIES))
        self.x = [_tensor(rng, n, wide, like=case) for _ in range(self.copies)]
        self.y = [torch.empty(n, out, dtype=case.dtype, device=_where()) for _ in self.x]
        self._prepare(rng)
        self._bits: torch.Tensor | None = None

    @staticmethod
    def weight_bytes(case: Case) -> int:
        raise NotImplementedError

    def _prepare(self, rng: np.random.Generator) -> None:
        raise NotImplementedError

    def call(self, i: int) -> torch.Tensor:
        raise NotImplementedError

    def expected(self, rows: Any) -> tuple[Any, Any]:
        """Of those rows of the first copy: values and magnitudes, float64."""
        raise NotImplementedError

    def variants(self, choice: Any) -> Iterator[Any]:
        raise NotImplementedError

    def _run(self) -> torch.Tensor:
        self.y[0].fill_(float("nan"))
        return self.call(0).clone()

    def problem(self, given: dict[str, int]) -> str:
        choice = self._choice(given)
        found = _compile_problems(self.variants(choice))
        if found:
            return found
        if self.own_bits and self._bits is None:
            with self.tunable.forced(self.heuristic):
                self._bits = _on_device(self._run)
        with self.tunable.forced(choice):
            y = _on_device(self._run)
        rows, values, size = self._truth
        error = np.linalg.norm(_host(y[rows]) - values) / np.linalg.norm(size)
        allowed = TOLERANCE[self.case.dtype]
        if not error <= allowed or not bool(torch.isfinite(y).all()):
            return f"error {error:.2g}, allowed {allowed:g}"
        if self._bits is not None and not torch.equal(y, self._bits):
            return "other bits than the heuristic's: it changes the order of a row's sum"
        return ""

    def seconds(self, given: dict[str, int]) -> float:
        with self.tunable.forced(self._choice(given)):
            return float(_on_device(lambda: self.timer(self.call, self.copies)))

    @cached_property
    def _truth(self) -> tuple[Any, Any, Any]:
        """Some rows, their values and their magnitudes."""
        rows = np.unique(np.linspace(0, self.case.rows - 1, CHECKED_ROWS).astype(int))
        return rows, *self.expected(rows)

    def _choice(self, given: dict[str, int]) -> Any:
        raise NotImplementedError


def _compile_problems(variants: Iterator[Any]) -> str:
    """Of what a candidate launches, for the device that is there; none in the interpreter."""
    if INTERPRETED:
        return ""
    from lora_engine.kernels.compiled import compile_variant, problems, resources

    device = device_of(None)
    for variant in variants:
        found = problems(variant, device, resources(compile_variant(variant, device)))
        if found:
            return f"{variant.name}: {', '.join(found)}"
    return ""


class DeltaTrial(Trial):
    tunable = lora_delta.TILING

    @staticmethod
    def weight_bytes(case: Case) -> int:
        return case.dtype.itemsize * case.rank * sum(case.shape)

    def _prepare(self, rng: np.random.Generator) -> None:
        r, (wide, out) = self.case.rank, self.case.shape
        self.A = [_tensor(rng, r, wide, like=self.case) for _ in self.x]
        self.B = [_tensor(rng, r, out, like=self.case).T for _ in self.x]

    def call(self, i: int) -> torch.Tensor:
        made: torch.Tensor = le.lora_delta(self.x[i], self.A[i], self.B[i], 0.5, out=self.y[i])
        return made

    def expected(self, rows: Any) -> tuple[Any, Any]:
        x, A, B = _host(self.x[0])[rows], _host(self.A[0]), _host(self.B[0])
        size = reference.lora_delta(np.abs(x), np.abs(A), np.abs(B), 0.5)
        return reference.lora_delta(x, A, B, 0.5), size

    def variants(self, choice: Any) -> Iterator[Any]:
        dtype = self.case.dtype
        yield from lora_delta.variants_of(choice, dtype, dtype, device_of(None))

    def _choice(self, given: dict[str, int]) -> Any:
        return lora_delta.Tiling(**given)


class BatchedTrial(Trial):
    """Few rows: each of another adapter, as far as there are. Many: runs of rows of one."""

    tunable = batched_lora_delta.TILING

    @staticmethod
    def weight_bytes(case: Case) -> int:
        return case.dtype.itemsize * case.rank * sum(case.shape) * min(case.rows, ADAPTERS)

    def _prepare(self, rng: np.random.Generator) -> None:
        (n, r), (wide, out) = (self.case.rows, self.case.rank), self.case.shape
        each = self.case.dtype.itemsize * r * (wide + out)
        count = min(n, ADAPTERS, 4) if INTERPRETED else max(ADAPTERS, min(512, COLD // each))
        name = str(self.case.dtype).removeprefix("torch.")
        self.pool = le.AdapterPool(wide, out, dtype=name, device=_pool_device())
        self.adapters = {}
        for _ in range(count):
            A = rng.standard_normal((r, wide), dtype=np.float32)
            B = rng.standard_normal((out, r), dtype=np.float32)
            slot = self.pool.add(A, B, 0.5)
            if slot < ADAPTERS:  # those of the first copy
                A, B, scaling = self.pool.get(slot)
                self.adapters[slot] = Adapter([A], [B], scaling)
        few = n <= 256
        of_batch = min(n, ADAPTERS if few else 8, count)
        ids = rng.permutation(n) % of_batch if few else np.arange(n) * of_batch // n
        self.ids = [
            torch.from_numpy(((ids + i * of_batch) % count).astype(np.int32)).to(_where())
            for i in range(self.copies)
        ]

    def call(self, i: int) -> torch.Tensor:
        made: torch.Tensor = self.pool.forward(
            self.x[i], self.ids[i], out=self.y[i], accumulate=False
        )
        return made

    def expected(self, rows: Any) -> tuple[Any, Any]:
        x, ids, out = _host(self.x[0])[rows], self.ids[0].cpu().numpy()[rows], self.case.shape[1]
        size = {
            slot: Adapter([np.abs(a.A[0])], [np.abs(a.B[0])], a.scaling)
            for slot, a in self.adapters.items()
        }
        return (
            reference.batched_lora_delta(x, self.adapters, [out], ids),
            reference.batched_lora_delta(np.abs(x), size, [out], ids),
        )

    def variants(self, choice: Any) -> Iterator[Any]:
        dtype = self.case.dtype
        yield from batched_lora_delta.variants_of(choice, dtype, dtype, device_of(None))

    def _choice(self, given: dict[str, int]) -> Any:
        return batched_lora_delta.Choice(**given)


def _pool_device() -> str | None:
    return None if INTERPRETED else "cuda"


class Nf4Trial(Trial):
    tunable = NF4_TILING
    own_bits = False

    @staticmethod
    def weight_bytes(case: Case) -> int:
        return case.shape[0] * case.shape[1] * 9 // 16

    def _prepare(self, rng: np.random.Generator) -> None:
        wide, out = self.case.shape
        values = _tensor(rng, out, wide, like=self.case._replace(dtype=torch.float32))
        self.w = [le.nf4_quantize(values, double_quant=self.case.double_quant) for _ in self.x]
        self.how = how_of(self.case.dtype, None, wide % 32 == 0)

    def call(self, i: int) -> torch.Tensor:
        made: torch.Tensor = le.nf4_linear(self.x[i], self.w[i], out=self.y[i])
        return made

    def expected(self, rows: Any) -> tuple[Any, Any]:
        x, w = _host(self.x[0])[rows], self.w[0].to_float().astype(np.float64)
        return reference.nf4_linear(x, w), reference.nf4_linear(np.abs(x), np.abs(w))

    def variants(self, choice: Any) -> Iterator[Any]:
        aligned = self.case.shape.in_features % 32 == 0
        yield from nf4_linear.variants_of(
            choice, self.case.rows, self.case.dtype, self.how, aligned, device_of(None)
        )

    def _choice(self, given: dict[str, int]) -> Any:
        return Nf4Choice(**given)


def _job(kind: type[Trial], case: Case, of_key: tuple[Any, ...], timer: Timer) -> Job:
    index = None if INTERPRETED else torch.cuda.current_device()
    tunable, n = kind.tunable, case.rows
    first = tunable.heuristic(index, n, *of_key)
    rest = (c for c in tunable.space(index, n, *of_key) if c != first)
    candidates = tuple(c._asdict() for c in (first, *rest))
    key = tunable.key(n, *of_key)

    def make() -> Trial:
        made: Trial = _on_device(lambda: kind(case, first, timer))
        return made

    return Job(key, f"{key}; {n} rows, rank {case.rank}", candidates, make)


def jobs(
    shapes: Sequence[Shape],
    ranks: Sequence[int],
    rows: Sequence[int],
    dtypes: Sequence[str],
    timer: Timer = graph_seconds,
) -> Iterator[Job]:
    """All cases, op by op."""
    types = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
    for name, shape, n in product(dtypes, shapes, rows):
        dtype, (wide, out) = types[name], shape
        for rank in ranks:
            case = Case(shape, dtype, rank, n)
            yield _job(DeltaTrial, case, (dtype, dtype, wide, out, rank), timer)
            yield _job(BatchedTrial, case, (dtype, dtype, wide, (out,), rank, 1, False), timer)
        how = how_of(dtype, None, wide % 32 == 0)
        for nested in (False, True):
            case = Case(shape, dtype, 0, n, nested)
            of_key = dtype, how, wide, out, 64, NESTED.bit_length() - 1 if nested else -1
            yield _job(Nf4Trial, case, of_key, timer)
