"""What is benchmarked: a case is one op at one shape, its contenders and what is wanted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OURS = "lora_engine"


class Traffic(NamedTuple):
    """The bytes that one call must move, whoever makes it.

    read: of what is only read. changed: of what is written, reading included
    (an update in place counts twice). footprint: distinct bytes. threads: how
    many the engine uses at this size, 0 for all of them.
    """

    read: int
    changed: int
    footprint: int
    threads: int

    @property
    def total(self) -> int:
        return self.read + self.changed


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work: ours, or a peer's.

    call: the timed work. check: raises AssertionError where its output is not
    the reference's. spelling: which of several ways to write a peer was fastest.
    inference: run inside torch.inference_mode(). torch_threads: 0 leaves them as they
    are. absent: why it cannot run.
    """

    name: str
    call: Callable[[], Any] = lambda: None
    check: Callable[[], None] = lambda: None
    spelling: str = ""
    inference: bool = False
    torch_threads: int = 0
    absent: str = ""

    @contextmanager
    def mode(self) -> Iterator[None]:
        """The context its calls run in."""
        if not self.inference and not self.torch_threads:
            yield
            return
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.torch_threads or before)
        try:
            with torch.inference_mode() if self.inference else nullcontext():
                yield
        finally:
            torch.set_num_threads(before)

    def verify(self) -> None:
        """Raises AssertionError unless the output is right."""
        with self.mode():
            self.check()


@dataclass(frozen=True, eq=False)
class Case:
    """A row of the speed table. The first contender that ``build`` gives is ours.

    faster: for each peer, how many times its speed is wanted (None: for information).
    extra_ms: for each peer, how much longer than it ours may take. within:
    achieved/floor wanted.
    """

    op: str
    shape: str
    build: Callable[[], list[Contender]]
    faster: Mapping[str, float | None] = field(default_factory=dict)
    extra_ms: Mapping[str, float] = field(default_factory=dict)
    within: float | None = None
    traffic: Traffic | None = None
    flops: float = 0.0  # of the formula: a multiply-add counts 2; 0: not counted

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}"

    @property
    def names(self) -> tuple[str, ...]:
        """Ours, then the peers."""
        return (OURS, *self.faster, *self.extra_ms)


def absent(module: str) -> str:
    """Why a peer that needs a package cannot run, or "" where it can."""
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def peer(name: str, module: str, build: Callable[[], Contender]) -> Contender:
    """The peer that ``build`` gives, or a note that its package is missing."""
    why = absent(module)
    return Contender(name, absent=why) if why else build()
