"""How the evidence experiments are run in tests: small, or with all seeds by ``make full``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("threadpoolctl")

from rich.progress import Progress
from threadpoolctl import threadpool_limits

import lora_engine as le
from lora_engine.backends import chosen

FULL = os.environ.get("LORA_ENGINE_TEST_PROFILE") == "full"


@contextmanager
def quiet() -> Iterator[Progress]:
    """A progress bar that is not drawn, and BLAS on one thread, as the command has it."""
    with threadpool_limits(1, "blas"):
        yield Progress(disable=True)


@contextmanager
def delta_backend() -> Iterator[None]:
    """The backend tests run on where it has EWC's delta form, else the reference."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            le.EWC(le.AdapterPool(2, 2), 1.0, form="delta")
        except NotImplementedError:
            patch.setenv("LORA_ENGINE_BACKEND", "reference")
            chosen.cache_clear()
        yield
    chosen.cache_clear()
