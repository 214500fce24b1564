"""Settings of the test run."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined

# Of a run in a shell's background, which ignores it and whose children would.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test depends on what was tuned on this machine.
os.environ["LORA_ENGINE_TUNED"] = os.path.join(os.path.dirname(__file__), "no tuned files")

from helpers_kernels import check_launches

import lora_engine as le
from lora_engine.backends import chosen
from lora_engine.kernels import launch

hypothesis.settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", max_examples=1500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("LORA_ENGINE_TEST_PROFILE", "quick"))


def pytest_report_header() -> str:
    return f"lora_engine: {le.backends()['cpu']}"


@pytest.fixture
def threads():
    """Restores the thread count; use as ``threads(2)``."""
    before = le.get_num_threads()
    yield le.set_num_threads
    le.set_num_threads(before)


@pytest.fixture(scope="module")
def one_torch_thread():
    """For models whose layers are small: on a busy machine torch's threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request):
    """Runs a module's tests on both backends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_ENGINE_BACKEND", request.param)
        chosen.cache_clear()
        yield request.param
    chosen.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def gated_launches():
    """A launch of what no variants() yields, and so nobody compiled, fails; interpreted ones."""
    with pytest.MonkeyPatch.context() as patch:
        if launch.INTERPRETED:
            check_launches(patch)
        yield
