"""The kernels as tests find them: every file of kernels/, without a list."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch

import lora_engine.kernels
from lora_engine.kernels.launch import device_of

FILES = sorted({m.name for m in pkgutil.iter_modules(lora_engine.kernels.__path__)})
MODULES = {name: import_module(f"lora_engine.kernels.{name}") for name in FILES}
GATED = [name for name, module in MODULES.items() if hasattr(module, "variants")]
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float64: "fp64", torch.bool: "i1",
}  # fmt: skip


def variants_of(name: str, device: Any, tuned: bool) -> list[Any]:
    """What a file's launcher can launch, each once; tuned: what a tuned file can choose, too."""
    module = MODULES[name]
    every = list(module.variants(device))
    if tuned and hasattr(module, "tuned_variants"):
        names = {v.name for v in every}
        more = {v.name: v for v in module.tuned_variants(device)}
        every += [v for name, v in more.items() if name not in names]
    return every


@cache
def gated() -> frozenset[tuple[Any, ...]]:
    """What the launchers say they can launch on this device."""
    device = device_of(None)
    every = (v for name in GATED for v in variants_of(name, device, tuned=True))
    return frozenset((v.fn, v.pointers, v.constants, v.config) for v in every)


def check_launches(patch: pytest.MonkeyPatch) -> None:
    """Makes every launch of what is not in ``gated()`` an error."""

    def wrap(launch: Any) -> Any:
        def checked(fn, grid, pointers, sizes, shape, constants, config):
            types = tuple(None if p is None else TYPES[p.dtype] for p in pointers)
            if (fn, types, constants, config) not in gated():
                raise AssertionError(f"no variant: {fn.__name__} {types} {constants} {config}")
            return launch(fn, grid, pointers, sizes, shape, constants, config)

        return checked

    for name, module in MODULES.items():
        if name != "launch" and callable(getattr(module, "launch", None)):
            patch.setattr(module, "launch", wrap(module.launch))
