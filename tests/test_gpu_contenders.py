"""Every contender of the GPU suite does its work and passes its own check: small, interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers_triton import DEVICE, triton_backend  # noqa: F401  the fixture

from bench import gpu_adapters, gpu_case, gpu_cases, gpu_fisher, gpu_nf4

pytestmark = pytest.mark.usefixtures("triton_backend")
MODULES = {"gpu_adapters": gpu_adapters, "gpu_fisher": gpu_fisher, "gpu_nf4": gpu_nf4}
SIZE = 64


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in MODULES.values():
        monkeypatch.setattr(module, "DEVICE", DEVICE)
        if hasattr(module, "FEATURES"):
            monkeypatch.setattr(module, "FEATURES", SIZE)
    with torch.no_grad():
        yield


INPUTS = {
    "single": lambda: gpu_adapters.rows(3, 1, 4, torch.float32),
    "batched": lambda: gpu_adapters.rows(4, 4, 2, torch.float32),
    "adapt": lambda: gpu_adapters.rows(4, 4, 2, torch.float32),
    "runs": lambda: gpu_adapters.rows(4, 2, 2, torch.float32),
    "accumulate": lambda: gpu_fisher.flat(300, torch.float32, 2),
    "step": lambda: gpu_fisher.ewc_inputs(300, torch.float32),
    "fisher": lambda: gpu_adapters.rows(5, 1, 2, torch.float32),
    "factors": lambda: gpu_adapters.rows(5, 1, 1, torch.float32),
    "linear": lambda: gpu_nf4.matrices(3, torch.float32),
    "linear_with": lambda: gpu_nf4.matrices(8, torch.float32),
    "backward": lambda: gpu_nf4.matrices(3, torch.float32),
    "dequantize": lambda: gpu_nf4.matrices(1, torch.float32),
    "quantize": lambda: gpu_nf4.matrices(1, torch.float32),
}  # fmt: skip
RUNS = {"batched_sorted", "adapt_sorted"}


def contenders():
    """As the cases name them: module:function and its arguments."""
    called = []

    def call(path, *arguments):
        called.append((path, arguments))
        return lambda data: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_cases, "call", call)
        for case in gpu_cases.CASES:
            for build in case.contenders.values():
                if getattr(build, "args", ()):
                    called.append((build.args[0], ()))
                else:
                    build(None)
    return sorted(set(called))


@pytest.mark.parametrize(
    ("path", "arguments"), contenders(), ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_a_contender_is_right_and_its_check_can_fail(path, arguments):
    module, name = path.split(":")
    kind = name.rsplit("_", 1)[0]
    data = INPUTS["runs" if name in RUNS else kind]()(2)
    build = getattr(MODULES[module], name)
    build = build(*arguments) if name == "adapt_ours" else build
    try:
        timed = build(data)
    except gpu_case.Absent as why:
        pytest.skip(str(why))
    assert len(timed.calls) == 2
    timed.check(lambda: [call() for call in timed.calls])
    if kind != "adapt" or name == "adapt_ours":  # a peer's adapt is checked by a step of its own
        with pytest.raises(AssertionError):
            timed.check(lambda: None)
