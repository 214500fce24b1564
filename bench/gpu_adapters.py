"""Contenders of the ops on adapters: lora_delta, batched_lora_delta, batched_adapt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import lora_engine as le
from bench import gpu_check as check
from bench.gpu_baseline import zero_shrink_expand
from bench.gpu_case import DEVICE, FEATURES, Timed, peer

SCALING = 2.0
PADDED = 16  # the rank that zeroing + shrink + expand pads to, at least


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


class Rows(NamedTuple):
    """Sets of rows with their adapters. x, y, grad [sets][n, 4096]; ids int32 [sets][n]; A
    [slots, r, in], B [slots, out, r]; runs: rows of each adapter are adjacent."""

    x: list[torch.Tensor]
    y: list[torch.Tensor]
    grad: list[torch.Tensor]
    ids: list[torch.Tensor]
    A: torch.Tensor
    B: torch.Tensor
    runs: bool

    @property
    def each(self) -> range:
        return range(len(self.x))

    @property
    def expected(self) -> torch.Tensor:
        return check.delta(self.x[0], self.A, self.B, self.ids[0], SCALING)


def rows(n: int, adapters: int, rank: int, dtype: torch.dtype) -> Callable[[int], Rows]:
    """n rows of so many adapters; every set has adapters of its own."""

    def make(sets: int) -> Rows:
        torch.manual_seed(0)
        slots, runs = sets * adapters, n > adapters

        def ids(i: int) -> torch.Tensor:
            own = torch.arange(adapters, dtype=torch.int32, device=DEVICE)
            order = own if runs else own[torch.randperm(adapters, device=DEVICE)]
            return (order + i * adapters).repeat_interleave(n // adapters).contiguous()

        def each(scale: float) -> list[torch.Tensor]:
            return [normal(n, FEATURES, dtype=dtype, scale=scale) for _ in range(sets)]

        return Rows(
            each(1.0), each(1.0), each(0.01), [ids(i) for i in range(sets)],
            normal(slots, rank, FEATURES, dtype=dtype, scale=0.01),
            normal(slots, FEATURES, rank, dtype=dtype, scale=0.02), runs,
        )  # fmt: skip

    return make


def pool_of(data: Rows) -> le.AdapterPool:
    slots, rank, _ = data.A.shape
    dtype = str(data.A.dtype).removeprefix("torch.")
    pool = le.AdapterPool(FEATURES, FEATURES, dtype, DEVICE, capacity=slots, max_rank=rank)
    for A, B in zip(data.A, data.B, strict=True):
        pool.add(A, B, SCALING)
    return pool


def _deltas(what: str, data: Rows, calls: list[Callable[[], Any]]) -> Timed:
    """Calls that add to ``data.y``."""

    def right(run: Callable[[], Any]) -> None:
        data.y[0].zero_()
        run()
        want = data.expected
        check.require(what, data.y[0], want, want, 4 * check.TOLERANCE[data.x[0].dtype])

    return Timed(calls, right)


# ---- batched_lora_delta ----


def batched_ours(data: Rows) -> Timed:
    pool = pool_of(data)
    calls = [lambda i=i: pool.forward(data.x[i], data.ids[i], out=data.y[i]) for i in data.each]
    return _deltas("lora_engine", data, calls)


def batched_baseline(data: Rows) -> Timed:
    n, rank = len(data.x[0]), max(PADDED, data.A.shape[1])
    pad = torch.nn.functional.pad
    A = pad(data.A, (0, 0, 0, rank - data.A.shape[1])).contiguous()
    B = pad(data.B, (0, rank - data.B.shape[2])).contiguous()
    h = torch.empty(n, rank, device=DEVICE)
    calls = [
        lambda i=i: zero_shrink_expand(data.x[i], A, B, data.ids[i], SCALING, h, data.y[i])
        for i in data.each
    ]
    return _deltas("zeroing + shrink + expand", data, calls)


def batched_gather(data: Rows) -> Timed:
    ids = [i.long() for i in data.ids]

    def call(i: int) -> None:
        h = torch.bmm(data.A[ids[i]], data.x[i].unsqueeze(2))
        y = data.y[i].unsqueeze(2)
        torch.baddbmm(y, data.B[ids[i]], h, alpha=SCALING, out=y)

    return _deltas("gather + bmm", data, [lambda i=i: call(i) for i in data.each])


def _runs(ids: torch.Tensor) -> list[tuple[int, slice]]:
    """(slot, its rows): known before the capture, which favours the peer."""
    slots, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = counts.cumsum(0).tolist()
    begins = [0, *ends[:-1]]
    return [(s, slice(b, e)) for s, b, e in zip(slots.tolist(), begins, ends, strict=True)]


def batched_sorted(data: Rows) -> Timed:
    runs = [_runs(ids) for ids in data.ids]

    def call(i: int) -> None:
        for slot, own in runs[i]:
            h = data.x[i][own] @ data.A[slot].T
            data.y[i][own].addmm_(h, data.B[slot].T, alpha=SCALING)

    return _deltas("sorted rows + addmm", data, [lambda i=i: call(i) for i in data.each])


# ---- lora_delta: one adapter ----


def single_ours(data: Rows) -> Timed:
    calls = [
        lambda i=i: le.lora_delta(
            data.x[i], data.A[i], data.B[i], SCALING, out=data.y[i], accumulate=True
        )
        for i in data.each
    ]
    return _deltas("lora_engine", data, calls)


def single_torch(data: Rows) -> Timed:
    def call(i: int) -> None:
        data.y[i].addmm_(data.x[i] @ data.A[i].T, data.B[i].T, alpha=SCALING)

    return _deltas("torch eager", data, [lambda i=i: call(i) for i in data.each])


def single_peft(data: Rows) -> Timed:
    """The part of PEFT's layer that is not the base layer."""
    peft = peer("peft")
    rank, dtype, name = data.A.shape[1], data.A.dtype, "default"
    config = peft.LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["q_proj"])

    base = torch.nn.utils.skip_init(torch.nn.Linear, FEATURES, FEATURES, bias=False)
    model = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"q_proj": base}))
    injected: Any = model.get_submodule("q_proj").requires_grad_(False).eval()
    injected.base_layer = None
    injected = injected.to(DEVICE, dtype)

    def layer(i: int) -> Any:
        made = copy.deepcopy(injected)  # PEFT takes a second for hundreds of them
        made.lora_A[name].weight.copy_(data.A[i])
        made.lora_B[name].weight.copy_(data.B[i])
        return made

    layers = [layer(i) for i in data.each]

    def call(i: int) -> None:
        own = layers[i]
        h = own.lora_A[name](own.lora_dropout[name](data.x[i]))
        data.y[i].add_(own.lora_B[name](h) * own.scaling[name])

    return _deltas("PEFT's layer", data, [lambda i=i: call(i) for i in data.each])


# ---- batched_adapt ----

CHECKED_LR, TIMED_LR = 1.0, 1e-9  # the latter leaves weights finite after any number of replays


def _stepped(what: str, data: Rows, A: torch.Tensor, B: torch.Tensor, lr: float) -> None:
    """Of the first adapter of the first set."""
    slot = int(data.ids[0][0])
    own = data.ids[0] == slot
    want = check.step(data.x[0][own], data.grad[0][own], data.A[slot], data.B[slot], SCALING, lr)
    for name, got, expected in (("A", A, want[0]), ("B", B, want[1])):
        got = got.to(DEVICE)
        check.require(f"{what}: {name}", got, expected, expected, check.STORED[data.A.dtype])


def adapt_ours(form: str = "") -> Callable[[Rows], Timed]:
    """form: of EWC, "" for none. Its records hold no Fisher information that would move a
    weight, so that the step is the plain one; their bytes are read all the same."""

    def build(data: Rows) -> Timed:
        pool, ewc = pool_of(data), None
        if form:
            ewc = le.EWC(pool, ewc_lambda=1.0, form=form)
            for slot in range(len(pool)):
                shapes = ((FEATURES,),) * 2
                if form == "factor":
                    shapes = data.A[slot].shape, data.B[slot].shape
                ewc.set(slot, *(torch.zeros(shape, device=DEVICE) for shape in shapes))

        def call(i: int, lr: float) -> Any:
            return pool.adapt(data.x[i], data.grad[i], data.ids[i], lr, ewc=ewc)

        def right(run: Callable[[], Any]) -> None:
            slot = int(data.ids[0][0])
            pool.set(slot, data.A[slot], data.B[slot], SCALING)
            result = call(0, CHECKED_LR)
            if not bool(result.applied.all()):
                raise AssertionError(f"lora_engine: not applied: {result.note}")
            A, B, _ = pool.get(slot)
            _stepped("lora_engine", data, torch.from_numpy(A), torch.from_numpy(B), CHECKED_LR)
            before = pool.version(slot)
            run()
            if pool.version(slot) != before + 1:
                raise AssertionError("lora_engine: a run changed no version")

        return Timed([lambda i=i: call(i, TIMED_LR) for i in data.each], right)

    return build


def adapt_gather(data: Rows) -> Timed:
    """One row an adapter: gather, two products, two outer products, scatter."""
    A, B, ids = data.A.clone(), data.B.clone(), [i.long() for i in data.ids]

    def call(i: int, lr: float) -> None:
        x, grad, of = data.x[i], data.grad[i], ids[i]
        a, b = A[of], B[of]
        h, g = torch.bmm(a, x.unsqueeze(2)), torch.bmm(grad.unsqueeze(1), b)
        A[of] = torch.baddbmm(a, g.transpose(1, 2), x.unsqueeze(1), alpha=-lr * SCALING)
        B[of] = torch.baddbmm(b, grad.unsqueeze(2), h.transpose(1, 2), alpha=-lr * SCALING)

    return _by_hand("torch, gather + bmm", data, A, B, call)


def adapt_sorted(data: Rows) -> Timed:
    """Adapter by adapter, of rows in runs."""
    A, B, runs = data.A.clone(), data.B.clone(), [_runs(ids) for ids in data.ids]

    def call(i: int, lr: float) -> None:
        for slot, own in runs[i]:
            x, grad = data.x[i][own], data.grad[i][own]
            share = -lr * SCALING / len(x)
            h, g = x @ A[slot].T, grad @ B[slot]
            A[slot].addmm_(g.T, x, alpha=share)
            B[slot].addmm_(grad.T, h, alpha=share)

    return _by_hand("torch, adapter by adapter", data, A, B, call)


def _by_hand(
    what: str, data: Rows, A: torch.Tensor, B: torch.Tensor, call: Callable[[int, float], None]
) -> Timed:
    def right(run: Callable[[], Any]) -> None:
        slot = int(data.ids[0][0])
        A.copy_(data.A)
        B.copy_(data.B)
        call(0, CHECKED_LR)
        _stepped(what, data, A[slot], B[slot], CHECKED_LR)
        run()

    return Timed([lambda i=i: call(i, TIMED_LR) for i in data.each], right)
