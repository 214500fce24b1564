"""A captured graph replays any batch: other ids, ranks and adapters than it was captured with."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from helpers import bits
from helpers_graph import capturing
from helpers_triton import DEVICE, indices, on_device, triton_backend  # noqa: F401  the fixture
from test_pool import adapter

import lora_engine as le

pytestmark = pytest.mark.usefixtures("triton_backend")
IN, OUT, CAPACITY, WIDEST = 16, 8, 5, 18


def stated(**limits):
    return le.AdapterPool(
        IN, OUT, capacity=CAPACITY, max_rank=WIDEST, history=1, device=DEVICE, **limits
    )


def zeros(*shape):
    return torch.zeros(*shape, device=DEVICE)


class Forward:
    """An op with its inputs and outputs, which keep their addresses. call: on one pool."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = on_device(rng.standard_normal((4, IN)))
        self.ids = indices([[0, -1]] * 4)
        self.weights = on_device(rng.standard_normal((4, 2)))
        self.y = zeros(4, OUT)

    def __call__(self, pool):
        pool.forward(self.x, self.ids, self.weights, out=self.y, accumulate=False)

    def result(self, pool):
        return bits(self.y)

    def prepare(self, pool):
        """What the op needs of a pool, before the capture."""

    def update(self, pool):
        """A change to what was prepared, between replays."""


class Nf4(Forward):
    def __init__(self):
        super().__init__()
        self.w = base()

    def __call__(self, pool):
        le.nf4_linear(self.x, self.w, pool=pool, ids=self.ids, weights=self.weights, out=self.y)


@cache
def base():
    W = np.random.default_rng(1).standard_normal((OUT, IN)).astype("f4")
    return le.nf4_quantize(W)


class Adapt(Forward):
    """With EWC, whose records come after the capture."""

    form = "factor"

    def __init__(self):
        super().__init__()
        self.grad = on_device(np.random.default_rng(2).standard_normal((4, OUT)))
        self.ewc = {}

    def prepare(self, pool):
        self.ewc[pool] = le.EWC(pool, ewc_lambda=3.0, form=self.form)

    def update(self, pool):
        if self.form == "factor":
            self.ewc[pool].set(1, zeros(pool.ranks(1)[0], IN) + 2, zeros(OUT, pool.ranks(1)[0]) + 3)
        else:
            self.ewc[pool].set(1, zeros(OUT) + 2, zeros(IN) + 3)

    def __call__(self, pool):
        pool.adapt(
            self.x, self.grad, self.ids, lr=0.01, weights=self.weights, max_norm=5.0,
            ewc=self.ewc[pool],
        )  # fmt: skip

    def result(self, pool):
        slots = range(CAPACITY)
        return [(bits(A), bits(B), pool.version(s)) for s in slots for A, B, _ in [pool.get(s)]]


class AdaptDelta(Adapt):
    form = "delta"


@pytest.mark.parametrize("make", [Forward, Nf4, Adapt, AdaptDelta])
def test_a_graph_of_one_adapter_replays_many(make):
    """Against a second pool that is changed and called alike, without a graph."""
    op, pool, eager = make(), stated(), stated()
    pools = pool, eager

    def change(act):
        for p in pools:
            act(p)

    def same():
        graph.replay()
        got = op.result(pool)
        op.y.fill_(float("nan"))
        op(eager)
        assert op.result(eager) == got
        op.y.fill_(float("nan"))

    change(lambda p: p.add(*adapter(rank=1)))
    change(op.prepare)
    change(op)  # compiles, as every capture needs
    with capturing() as graph:
        op(pool)
    ranks = (WIDEST, 3, 17, 16)
    for seed, rank in enumerate(ranks, start=1):
        change(lambda p, r=rank, s=seed: p.add(*adapter(rank=r, seed=s)))
    op.ids.copy_(indices([[0, 4], [1, -1], [2, 3], [1, 2]]))
    same()
    change(lambda p: p.set(0, *adapter(rank=WIDEST, seed=9)))
    change(lambda p: p.set(1, *adapter(rank=5, seed=11)))
    change(lambda p: p.rollback(1))
    change(op.update)
    change(lambda p: p.remove(3))
    change(lambda p: p.add(*adapter(rank=2, seed=10)))
    same()


def test_a_replay_flags_an_id_that_was_removed():
    op, pool = Forward(), stated()
    for seed in range(2):
        pool.add(*adapter(seed=seed))
    op(pool)
    with capturing() as graph:
        op(pool)
    pool.remove(1)
    op.ids.copy_(indices([[1, -1]] * 4))
    graph.replay()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert not op.y.any()
    with pytest.raises(IndexError, match="got 1, which was taken for -1"):
        pool.version(0)


def test_a_pool_that_a_graph_holds_does_not_grow():
    op, pool = Forward(), le.AdapterPool(IN, OUT, device=DEVICE, history=1)
    A, B, s = adapter(rank=2)
    pool.add(A, B, s)
    pool.set(0, A, B, s)
    op(pool)
    pool.set(0, *adapter(rank=4))  # before the capture it may
    pool.set(0, A, B, s)
    with capturing():
        op(pool)
    held = [t.data_ptr() for t in pool._storage.adapters if isinstance(t, torch.Tensor)]
    pool.add(*adapter(rank=4, seed=1))  # in the blocks of the rank 4 before
    before = bits(pool.get(0)[0]), len(pool), pool.version(0)
    large = adapter(rank=5)
    message = (
        r"pool: expected room, for a CUDA graph .* state capacity and max_rank .*"
        r"AdapterPool\(16, 8\), which needs .*rank: 5 \(has 4\)"
    )
    for change in (lambda: pool.add(*large), lambda: pool.set(0, *large)):
        with pytest.raises(RuntimeError, match=message):
            change()
    with pytest.raises(RuntimeError, match="elements of memory"):
        [pool.add(*adapter(rank=4, seed=seed)) for seed in range(99)]
    assert bits(pool.get(0)[0]) == before[0]
    assert pool.version(0) == before[2]
    assert [t.data_ptr() for t in pool._storage.adapters if isinstance(t, torch.Tensor)] == held


def test_slots_do_not_grow_under_a_graph():
    pool = le.AdapterPool(IN, OUT, max_rank=4, device=DEVICE)
    none = np.zeros((0, IN), "f4"), np.zeros((OUT, 0), "f4"), 1.0
    slots = [pool.add(*none) for _ in range(16)]
    op = Forward()
    op(pool)
    with capturing():
        op(pool)
    with pytest.raises(RuntimeError, match=r"slots: 17 \(has 16\)"):
        pool.add(*none)
    pool.remove(slots[3])
    assert pool.add(*none) == slots[3]


def test_changes_are_no_part_of_a_graph():
    op, pool = Forward(), stated()
    pool.add(*adapter())
    op(pool)
    grad = zeros(4, OUT) + 1
    pool.accumulate_gradient(0, op.x, grad)
    before, waits = bits(pool.get(0)[0]), bits(pool.gradient(0)[0])
    with capturing():
        for change in (
            lambda: pool.add(*adapter()),
            lambda: pool.set(0, *adapter(seed=1)),
            lambda: pool.rollback(0),
            lambda: pool.remove(0),
            lambda: pool.accumulate_gradient(0, op.x, grad),
            lambda: pool._storage.gradient(op.x, grad, 0, None, zeros(3 * (IN + OUT))),
            lambda: pool.apply_updates(lr=0.1),
            lambda: pool._storage.adapt_slot(op.x, grad, 0, None),
            lambda: pool.get(0),
        ):
            with pytest.raises(RuntimeError, match="stream: expected none that is being captured"):
                change()
        op(pool)
    assert bits(pool.get(0)[0]) == before
    assert bits(pool.gradient(0)[0]) == waits
    assert pool.version(0) == 1


def test_a_slot_called_by_name_is_known_before_the_capture():
    op, pool = Forward(), stated()
    pool.add(*adapter())
    with (
        capturing(),
        pytest.raises(RuntimeError, match=r"^MicroLoRA.forward: stream: .*a call with"),
    ):
        pool._storage.forward_slot(op.x, 0, None, False, False, OUT)
    pool._storage.forward_slot(op.x, 0, None, False, False, OUT)
    with capturing():
        pool._storage.forward_slot(op.x, 0, op.y, False, False, OUT)


@pytest.mark.skipif(DEVICE != "cuda", reason="streams are a GPU's")
def test_two_streams_do_not_share_working_memory():
    rng = np.random.default_rng(3)
    pool = le.AdapterPool(4096, 4096, device=DEVICE, capacity=8, max_rank=16)
    for seed in range(8):
        pool.add(*adapter(d_in=4096, d_out=4096, rank=2 * seed + 1, seed=seed))
    ids = [indices(rng.integers(0, 8, 64)) for _ in range(2)]
    x = [on_device(rng.standard_normal((64, 4096))) for _ in range(2)]
    want = [bits(pool.forward(x[i], ids[i])) for i in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(pool.forward(x[i], ids[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert {bits(y) for y in got[i]} == {want[i]}
