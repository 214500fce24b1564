"""Which rows name which adapter: pairs (row, its j-th id) in the order of slots.

The sort is stable, so that the pairs of a slot, a run, stay in the order of rows. What a
position's run is is found on the device, and nothing is read back: kernels are launched for
every position, and all but the first of each run leave at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .batched_lora_delta import slots_of
from .launch import Config, Device, Variant, Variants, cdiv, launch, scratch
from .storage import Adapters


@triton.jit(do_not_specialize=["pairs", "k", "slots", "stride_n", "stride_k"])
def _keys(
    p_ids, p_ranks, p_flag, p_keys, pairs, k, slots, stride_n, stride_k, slices, BLOCK: tl.constexpr
):
    """The slot of each pair, ``slots`` for none: -1, and what is no slot in use."""
    i_pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_pair = i_pair < pairs
    i_row, j = i_pair // k, i_pair % k
    slot, m_bad = slots_of(p_ids, p_ranks, i_row, m_pair, j, stride_n, stride_k, slots, slices)
    tl.store(p_keys + i_pair, tl.where(slot >= 0, slot, slots), m_pair)
    at = p_ids + i_row.to(tl.int64) * stride_n + j.to(tl.int64) * stride_k
    found = tl.load(at, m_bad, 0).to(tl.int64)
    tl.store(p_flag + tl.zeros((BLOCK,), tl.int32), 2 * found + 1, m_bad)


@triton.jit(do_not_specialize=["pairs", "k", "slots"])
def _runs(p_keys, p_order, p_runs, p_leaders, pairs, k, slots, BLOCK: tl.constexpr):
    """Each position's (first, last, distinct rows, row) and each pair's first; grid (pairs, 1, 1).

    The first position of a run does it for the whole run; first is -1 for no adapter.
    """
    first = tl.program_id(0)
    slot = tl.load(p_keys + first)
    if slot == slots:
        tl.store(p_runs + 4 * first.to(tl.int64), -1)
        tl.store(p_leaders + tl.load(p_order + first), -1)
    elif tl.load(p_keys + first - 1, first > 0, -1) != slot:
        last, rows, found = first, 0, BLOCK
        while found == BLOCK:
            i_p = last + tl.arange(0, BLOCK)
            m_p = i_p < pairs
            m_p &= tl.load(p_keys + i_p, m_p, -1) == slot
            row = tl.load(p_order + i_p, m_p, 0) // k
            row_before = tl.load(p_order + i_p - 1, m_p & (i_p > first), -k) // k
            rows += tl.sum((m_p & (row != row_before)).to(tl.int32), 0)
            found = tl.sum(m_p.to(tl.int32), 0)
            last += found
        for start in range(first, last, BLOCK):
            i_p = start + tl.arange(0, BLOCK)
            m_p = i_p < last
            to = p_runs + 4 * i_p.to(tl.int64)
            tl.store(to, first, m_p)
            tl.store(to + 1, last, m_p)
            tl.store(to + 2, rows, m_p)
            pair = tl.load(p_order + i_p, m_p, 0)
            tl.store(to + 3, (pair // k).to(tl.int32), m_p)
            tl.store(p_leaders + pair, first, m_p)


@triton.jit(do_not_specialize=["n", "k", "history"])
def _finish(
    p_leaders, p_order, p_keys, p_outcomes, p_versions, p_kept, p_rows, n, k, history,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The worst outcome among each row's adapters; a new version for those that learned."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_row = i_row < n
    worst = tl.zeros((BLOCK,), tl.int32)
    for j in range(k):
        i_pair = i_row.to(tl.int64) * k + j
        leader = tl.load(p_leaders + i_pair, m_row, -1)
        outcome = tl.load(p_outcomes + leader, leader >= 0, 0)
        worst = tl.maximum(worst, outcome)
        m_led = (leader >= 0) & (outcome == 1)
        m_led &= tl.load(p_order + leader, m_led, -1) == i_pair
        slot = tl.load(p_keys + leader, m_led, 0)
        tl.store(p_versions + slot, tl.load(p_versions + slot, m_led, 0) + 1, m_led)
        if history:
            tl.store(p_kept + slot, 1, m_led)
    tl.store(p_rows + i_row, worst.to(tl.uint8), m_row)


BLOCK = 256
CONFIG = Config(4, 1)


class Runs(NamedTuple):
    """Pairs in the order of slots.

    keys int32 [pairs]: the slot at each position. order int64 [pairs]: the pair there.
    table int32 [pairs, 4]: (first, last, distinct rows) of its run, and the row there.
    leaders int32 [pairs]: the first position of each pair's run.
    """

    keys: torch.Tensor
    order: torch.Tensor
    table: torch.Tensor
    leaders: torch.Tensor
    rows: int
    k: int

    @property
    def pairs(self) -> int:
        return self.rows * self.k


def find_runs(adapters: Adapters, ids: torch.Tensor) -> Runs:
    """Of ids int32 [n, k]."""
    n, k = ids.shape
    keys = torch.empty(n * k, dtype=torch.int32, device=ids.device)
    slots, slices = adapters.ranks.shape
    launch(
        _keys, (cdiv(n * k, BLOCK), 1, 1), (ids, adapters.ranks, adapters.flag, keys),
        (n * k, k, slots, *ids.stride()), (slices,), (BLOCK,), CONFIG,
    )  # fmt: skip
    ordered, order = torch.sort(keys, stable=True)
    return _table(ordered, order, n, k, slots)


def one_run(adapters: Adapters, slot: int, n: int, like: torch.Tensor) -> Runs:
    """Of n rows that all name one slot."""
    keys = torch.full((n,), slot, dtype=torch.int32, device=like.device)
    order = torch.arange(n, dtype=torch.int64, device=like.device)
    return _table(keys, order, n, 1, adapters.ranks.shape[0])


def _table(keys: torch.Tensor, order: torch.Tensor, n: int, k: int, slots: int) -> Runs:
    table = scratch("runs", keys, 4 * n * k, torch.int32)
    leaders = scratch("leaders", keys, n * k, torch.int32)
    launch(
        _runs, (n * k, 1, 1), (keys, order, table, leaders), (n * k, k, slots), (),
        (BLOCK,), CONFIG,
    )  # fmt: skip
    return Runs(keys, order, table, leaders, n, k)


def finish(adapters: Adapters, runs: Runs, outcomes: torch.Tensor) -> torch.Tensor:
    """uint8 [n] from the outcomes of the first positions; versions are counted up."""
    by_row = torch.empty(runs.rows, dtype=torch.uint8, device=outcomes.device)
    history = int(adapters.previous.numel() > 0)
    launch(
        _finish, (cdiv(runs.rows, BLOCK), 1, 1),
        (runs.leaders, runs.order, runs.keys, outcomes, adapters.versions, adapters.kept, by_row),
        (runs.rows, runs.k, history), (), (BLOCK,), CONFIG,
    )  # fmt: skip
    return by_row


def variants(device: Device) -> Variants:
    """The three, which depend on no dtype."""
    yield Variant(
        "adapt-keys", _keys, ("i32", "i32", "i64", "i32"), ("i32",) * 5, (1,), (BLOCK,), CONFIG,
        False,
    )  # fmt: skip
    yield Variant(
        "adapt-runs", _runs, ("i32", "i64", "i32", "i32"), ("i32",) * 3, (), (BLOCK,), CONFIG, False
    )
    yield Variant(
        "adapt-finish", _finish, ("i32", "i64", "i32", "i32", "i64", "i32", "u8"), ("i32",) * 3, (),
        (BLOCK,), CONFIG, False,
    )  # fmt: skip
