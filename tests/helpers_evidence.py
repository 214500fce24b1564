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

FULL = os.environ.get("LORA_ENGINE_TEST_PROFILE") == "full"


@contextmanager
def quiet() -> Iterator[Progress]:
    """A progress bar that is not drawn, and BLAS on one thread, as the command has it."""
    with threadpool_limits(1, "blas"):
        yield Progress(disable=True)
