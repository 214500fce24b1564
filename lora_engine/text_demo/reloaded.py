"""What the text demo leaves on disk, and a fresh process that ranks with nothing else:
``python -m lora_engine.text_demo.reloaded FOLDER``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import lora_engine as le
from lora_engine.text_demo import users
from lora_engine.text_demo.users import World

STORE, _ADAPTERS, _EMBEDDINGS = "store", "adapters", "embeddings.npz"


def open_store(out: Path, width: int) -> le.AdapterStore:
    """The users' adapters of a demo's folder."""
    return le.AdapterStore(
        out / STORE, in_features=width, out_features=width, rank=users.RANK, alpha=users.ALPHA
    )


def folder_of(out: Path, encoder: str, taste: str) -> Path:
    """A user's PEFT folder."""
    return out / _ADAPTERS / f"{taste}_{encoder}"


def save_embeddings(out: Path, worlds: Mapping[str, World]) -> None:
    """For the fresh process, which so needs no encoder."""
    arrays = {
        f"{name}/{part}": rows
        for name, world in worlds.items()
        for part, rows in (("index", world.embeddings), ("queries", world.embedded))
    }
    np.savez(out / _EMBEDDINGS, **arrays)  # type: ignore[arg-type]


def ranks(out: Path) -> dict[str, list[int]]:
    """Of each user the ranks of the held-out queries, from the folder alone.

    Raises FormatError, OSError, and ValueError where the store and the PEFT folders differ."""
    found = {}
    with np.load(out / _EMBEDDINGS, allow_pickle=False) as arrays:
        kept = dict(arrays)
    names = dict.fromkeys(key.partition("/")[0] for key in kept)
    width = next(iter(kept.values())).shape[1]
    with open_store(out, width) as store:
        for name in names:
            index, embedded = kept[f"{name}/index"], kept[f"{name}/queries"]
            passages, queries = users.text(len(index))
            world = users.world(passages, queries, index, embedded)
            for taste in world.wanted:
                user = f"{taste}, {name}"
                weights = le.Adapter.load(folder_of(out, name, taste)).modules[users.MODULE]
                in_store = store.pool.get(store.slot(user, create=False))
                for exported, stored in zip(weights[:2], in_store[:2], strict=True):
                    np.testing.assert_array_equal(exported, stored, f"{user}: folder and store")
                pool = le.AdapterPool(width, width)
                slot = pool.add(weights.A, weights.B, weights.scaling)
                found[user] = world.ranks(taste, "held out", pool, slot).tolist()
    return found


def ranks_in_fresh_process(out: Path) -> dict[str, list[int]]:
    """``ranks`` in a new interpreter; empty, with its error printed, where that fails."""
    command = [sys.executable, "-m", "lora_engine.text_demo.reloaded", os.fspath(out)]
    child = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if child.returncode != 0:
        print(child.stderr, file=sys.stderr)
        return {}
    found: dict[str, list[int]] = json.loads(child.stdout)
    return found


if __name__ == "__main__":
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, "blas"):
        print(json.dumps(ranks(Path(sys.argv[1]))))
