"""What the tests of AdapterStore share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import lora_engine as le
from lora_engine.adapters import store_file

SIZES = {"in_features": 12, "out_features": 7}


def open_store(folder: Path, resident: int = 4, **options: Any) -> le.AdapterStore:
    return le.AdapterStore(folder / "store", resident, **{**SIZES, **options})


def drawn(draw: int, rank: int = 2, **sizes: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A, B and scaling of which every draw has others."""
    rng = np.random.default_rng([2, draw])
    width, out = {**SIZES, **sizes}.values()
    A, B = rng.standard_normal((rank, width)), rng.standard_normal((out, rank))
    return A.astype("f4"), B.astype("f4"), 0.5 + draw


def put(store: le.AdapterStore, user: str, draw: int, rank: int = 2) -> int:
    slot = store.slot(user)
    store.pool.set(slot, *drawn(draw, rank))
    return slot


def same(got: tuple[Any, Any, float], want: tuple[Any, Any, float]) -> bool:
    return (
        got[0].tobytes() == want[0].tobytes()
        and got[1].tobytes() == want[1].tobytes()
        and got[2] == want[2]
    )


def file_of(folder: Path, user: str) -> Path:
    return Path(store_file.path_of(f"{folder}/store/adapters", store_file.user_hash(user)))


def files(folder: Path) -> list[Path]:
    """Every file under the adapters' folder, whole or not."""
    return sorted(p for p in (folder / "store" / "adapters").rglob("*") if p.is_file())
