"""pool.forward of 64 rows on 64 adapters, against the CPU paths of the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import check, deltas, inputs
from bench.case import OURS, Case, Contender, Traffic, peer

ROWS = 64
GATHER = "gather + einsum"
SORT = "sort by adapter + addmm"


def gather_einsum(data: inputs.Inputs, y: Any) -> dict[str, Callable[[], Any]]:
    """vLLM's CPU path (vllm/lora/ops/torch_ops): a copy of the adapter for every row."""
    import torch

    x, A, B = inputs.tensor(data.x), inputs.tensor(data.A), inputs.tensor(data.B)
    ids, s = inputs.tensor(data.ids).long(), data.scaling
    row_A, row_B = torch.empty_like(A), torch.empty_like(B)

    def indexing() -> Any:
        h = torch.einsum("bi,boi->bo", x, A[ids]) * s
        return y.add_(torch.einsum("bi,boi->bo", h, B[ids]))

    def index_select() -> Any:
        h = torch.einsum("bi,boi->bo", x, A.index_select(0, ids)) * s
        return y.add_(torch.einsum("bi,boi->bo", h, B.index_select(0, ids)))

    def preallocated() -> Any:
        torch.index_select(A, 0, ids, out=row_A)
        torch.index_select(B, 0, ids, out=row_B)
        h = torch.einsum("bi,boi->bo", x, row_A) * s
        return y.add_(torch.einsum("bi,boi->bo", h, row_B))

    return {
        "A[ids]": indexing,
        "index_select": index_select,
        "index_select(out=)": preallocated,
    }


def sort_addmm(data: inputs.Inputs, y: Any) -> dict[str, Callable[[], Any]]:
    """Rows sorted by adapter, then for each adapter in turn x Aᵀ and addmm of Bᵀ."""
    import torch

    x, ids, s = inputs.tensor(data.x), inputs.tensor(data.ids), data.scaling
    At = [a.t() for a in inputs.tensor(data.A)]
    Bt = [b.t() for b in inputs.tensor(data.B)]
    h = torch.empty(ROWS, data.A.shape[1])

    def segments() -> tuple[Any, list[tuple[int, int]]]:
        ordered, order = torch.sort(ids)
        slots, counts = torch.unique_consecutive(ordered, return_counts=True)
        return order, list(zip(slots.tolist(), counts.tolist(), strict=True))

    def run(xs: Any, ys: Any, runs: list[tuple[int, int]]) -> None:
        first = 0
        for slot, count in runs:
            last = first + count
            hs, rows = h[first:last], ys[first:last]
            torch.mm(xs[first:last], At[slot], out=hs)
            torch.addmm(rows, hs, Bt[slot], alpha=s, out=rows)
            first = last

    def copies() -> Any:
        order, runs = segments()
        ys = y.index_select(0, order)
        run(x.index_select(0, order), ys, runs)
        return y.index_copy_(0, order, ys)

    def deltas_copied() -> Any:
        order, runs = segments()
        ys = torch.zeros_like(y)
        run(x.index_select(0, order), ys, runs)
        return y.index_add_(0, order, ys)

    return {"rows of y copied": copies, "deltas added": deltas_copied}


def build(rank: int) -> list[Contender]:
    data = inputs.make(ROWS, rank)
    expected = check.delta(data, accumulate=True)
    pool = inputs.make_pool(data)
    y = data.y.copy()

    def reset() -> None:
        y[...] = data.y

    def ours() -> Any:
        return pool.forward(data.x, data.ids, out=y)

    def with_torch(name: str, spellings: Any) -> Contender:
        import torch

        shared = torch.from_numpy(y)
        return deltas.contender(name, spellings(data, shared), expected, reset, inference=True)

    return [
        deltas.contender(OURS, {"forward(out=)": ours}, expected, reset),
        peer(GATHER, "torch", lambda: with_torch(GATHER, gather_einsum)),
        peer(SORT, "torch", lambda: with_torch(SORT, sort_addmm)),
    ]


def _case(rank: int, gather: float, sort: float) -> Case:
    weights, rows = inputs.weight_bytes(ROWS, rank), inputs.row_bytes(ROWS)
    return Case(
        "pool.forward(x, ids, out=y)",
        f"4096, r={rank}, 64 rows on 64 adapters",
        lambda: build(rank),
        faster={GATHER: gather, SORT: sort},
        traffic=Traffic(weights + rows, 2 * rows, weights + 2 * rows, threads=0),
        flops=4 * rank * inputs.FEATURES * ROWS,
    )


CASES = (_case(16, 5.0, 1.5), _case(2, 10.0, 5.0))
