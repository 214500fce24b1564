"""CUDA graphs for tests: real ones on a GPU; on the interpreter, their launches recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers_kernels import MODULES
from helpers_triton import DEVICE

from lora_engine.backends import triton_pool


class Recorded:
    """What a graph keeps: kernels with the grid, addresses and numbers of their capture."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []

    def replay(self) -> None:
        for step in self.steps:
            step()

    def _launch(self, launch: Any) -> Any:
        return lambda *arguments: self.steps.append(lambda: launch(*arguments))

    def _sort(self, sort: Any) -> Any:
        def recorded(keys: torch.Tensor, stable: bool) -> tuple[torch.Tensor, torch.Tensor]:
            to = torch.empty_like(keys), torch.empty_like(keys, dtype=torch.int64)
            self.steps.append(lambda: sort(keys, stable=stable, out=to))
            return to

        return recorded

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_pool, "capturing", lambda device: True)
            patch.setattr(torch, "sort", self._sort(torch.sort))
            for name, module in MODULES.items():
                if name != "launch" and hasattr(module, "launch"):
                    patch.setattr(module, "launch", self._launch(module.launch))
            yield


@contextlib.contextmanager
def capturing() -> Iterator[Any]:
    """Gives a graph with ``replay()``; nothing runs while it is captured."""
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            yield graph
    else:
        recorded = Recorded()
        with recorded.capture():
            yield recorded
