"""Merging ten adapters into one of the same rank, without the dense matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

import lora_engine as le
from bench import inputs
from bench.case import OURS, Case, Contender, peer
from lora_engine import reference_consolidation as reference

ADAPTERS, RANK = 10, 16
TORCH, NOTHING = "torch.linalg.qr of both factors, svd", "an empty call"


def _adapters() -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    n = inputs.FEATURES
    return [
        (
            rng.standard_normal((RANK, n), dtype=np.float32),
            rng.standard_normal((n, RANK), dtype=np.float32),
        )
        for _ in range(ADAPTERS)
    ]


def _check(A: Any, B: Any, adapters: list[tuple[Any, Any]]) -> None:
    """The singular values are those of the sum's best cut."""
    left = np.concatenate([B.astype("f8") / ADAPTERS for _, B in adapters], axis=1)
    right = np.concatenate([A.astype("f8") for A, _ in adapters])
    S = reference.truncate(left, right, RANK)[1]
    got = reference.truncate(B.astype("f8"), A.astype("f8"), RANK)[1]
    assert np.allclose(got, S, rtol=1e-5), "merge_adapters: not the best cut"


def _torch(adapters: list[tuple[Any, Any]]) -> Contender:
    import torch

    Bs = [torch.from_numpy(B) for _, B in adapters]
    As = [torch.from_numpy(A) for A, _ in adapters]

    def call() -> tuple[Any, Any]:
        Q, R = torch.linalg.qr(torch.cat(Bs, 1).double() / ADAPTERS)
        P, T = torch.linalg.qr(torch.cat(As).double().T)
        U, S, Vt = torch.linalg.svd(R @ T.T)
        root = S[:RANK].sqrt()
        A = (root[:, None] * Vt[:RANK]) @ P.T
        return A.float(), (Q @ (U[:, :RANK] * root)).float()

    def check() -> None:
        A, B = call()
        _check(A.numpy(), B.numpy(), adapters)

    return Contender(TORCH, call, check)


def build() -> list[Contender]:
    from lora_engine.adapters.adapter import LoraWeights

    adapters = _adapters()
    weighted = [(le.Adapter({"q": LoraWeights(A, B, 1.0)}), 1 / ADAPTERS) for A, B in adapters]

    def call() -> Any:
        return le.merge_adapters(weighted, rank=RANK).modules["q"]

    def check() -> None:
        merged = call()
        _check(merged.A, merged.B, adapters)

    return [
        Contender(OURS, call, check),
        peer(TORCH, "torch", lambda: _torch(adapters)),
        Contender(NOTHING),
    ]


CASES = (
    Case(
        "merge_adapters, svd",
        f"{ADAPTERS} adapters, 4096, r={RANK}",
        build,
        faster={TORCH: None},
        extra_ms={NOTHING: 100.0},
    ),
)
