"""How nf4_linear is cut into blocks: the heuristic, what of it may be tuned, its splits."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .launch import Config, Device, cdiv, device_of
from .tunable import Tunable


class Form(NamedTuple):
    """The tile of a product; blocks: as many a processor before its sum is split no more."""

    block_c: int
    block_m: int
    block_r: int
    blocks: int
    config: Config


ROW = Form(16, 1, 1024, 2, Config(4, 1))
FEW, SOME = Form(64, 16, 128, 4, Config(4, 1)), Form(64, 64, 64, 2, Config(4, 1))
MANY, WIDE = Form(64, 128, 64, 1, Config(8, 2)), Form(64, 256, 64, 1, Config(8, 2))
FEW_IEEE, IEEE = Form(64, 16, 64, 2, Config(4, 1)), Form(64, 64, 32, 1, Config(4, 1))
UNALIGNED = Form(32, 32, 32, 2, Config(4, 1, registers=128))


def how_of(x: torch.dtype, compute: str | None, aligned: bool) -> str:
    """How tiles are multiplied; the sums are float32.

    "ieee": float32. "native": bfloat16. "tf32" for a float16 x, whatever is asked for below
    float32: as float16 a weight could be out of range. What is decoded element by element
    is slow anyway, and float32.
    """
    if not aligned or compute == "float32" or (compute is None and x == torch.float32):
        return "ieee"
    return "tf32" if x == torch.float16 else "native"


def form_of(
    n: int, x: torch.dtype, how: str, aligned: bool, transposed: bool, device: Device
) -> Form:
    if not aligned:
        return UNALIGNED
    few = n <= 16 and not transposed
    if how == "ieee":
        return FEW_IEEE if few and x == torch.float32 else IEEE
    if n <= 64:
        return FEW if few else SOME
    registers = device.arch in (90, 100, "gfx942") and not transposed  # enough for its sums
    return WIDE if registers and x == torch.bfloat16 else MANY


class Choice(NamedTuple):
    """Of a product without W's transpose: its tile but for block_r, which is part of the order
    of summation, as are the splits: those stay the heuristic's. A base product need only be
    deterministic for given rows."""

    block_c: int
    block_m: int
    warps: int
    stages: int

    @lru_cache(maxsize=256)  # noqa: B019  of numbers, which go into few forms
    def form(self, like: Form) -> Form:
        config = like.config._replace(num_warps=self.warps, num_stages=self.stages)
        return like._replace(block_c=self.block_c, block_m=self.block_m, config=config)


def _choice(form: Form) -> Choice:
    return Choice(form.block_c, form.block_m, form.config.num_warps, form.config.num_stages)


def product_form(
    index: int | None, n: int, x: torch.dtype, how: str, aligned: bool, device: Device | None = None
) -> Form:
    """The heuristic's, of a product without W's transpose."""
    if n == 1 and aligned:
        return ROW
    return form_of(n, x, how, aligned, False, device or device_of(index))


def _heuristic(index: int | None, n: int, x: torch.dtype, how: str, *case: Any) -> Choice:
    return _choice(product_form(index, n, x, how, case[0] % 32 == 0))


# By the heuristic's form; itself first.
_SPACES: dict[Form, tuple[Choice, ...]] = {
    ROW: tuple(Choice(c, 1, w, 1) for c, w in ((16, 4), (8, 4), (8, 2), (32, 8))),
    FEW: tuple(Choice(c, 16, w, 1) for c, w in ((64, 4), (32, 4), (128, 8))),
    SOME: tuple(Choice(c, m, w, 1) for c, m, w in ((64, 64, 4), (64, 32, 4), (128, 64, 8))),
    MANY: tuple(Choice(64, m, w, s) for m, w, s in ((128, 8, 2), (128, 4, 2), (64, 4, 2))),
    WIDE: tuple(Choice(64, m, 8, s) for m, s in ((256, 2), (256, 1), (128, 2), (128, 1))),
}


def space(form: Form) -> tuple[Choice, ...]:
    """All that may be chosen where the heuristic has that form."""
    return _SPACES.get(form, (_choice(form),))


TILING = Tunable(
    "nf4_linear",
    ("x", "how", "in", "out", "block", "nested"),
    _heuristic,
    lambda index, n, x, how, *case: space(product_form(index, n, x, how, case[0] % 32 == 0)),
)


@lru_cache(maxsize=4096)
def splits_of(form: Form, n: int, features: int, length: int, processors: int) -> tuple[int, int]:
    """(splits, length of each) of a sum over that length."""
    tiles = cdiv(features, form.block_c) * cdiv(n, form.block_m)
    splits = max(min(form.blocks * processors // tiles, length // 512, 16), 1)
    span = cdiv(cdiv(length, splits), form.block_r) * form.block_r
    return cdiv(length, span), span
