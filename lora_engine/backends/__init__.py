"""The registry of backends: what computes the ops.

A backend is a module with the functions ``lora_delta``, ``ewc_step``, ``nf4_*``,
``fisher_accumulate``, ``lora_fisher`` and ``lora_fisher_factors`` and the classes ``Pool``,
``Step``, ``Ewc`` and ``Nf4``, all with the signatures of ``lora_engine._C``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple


class Backend(NamedTuple):
    """One entry: its name, where it lives, what it is, and why it cannot be had (None: it can)."""

    name: str
    module: str
    about: Callable[[], str]
    missing: Callable[[], str | None]


def _cpu_missing() -> str | None:
    from lora_engine import _C

    return None if _C.isa() else _C.last_error()


def _cpu_about() -> str:
    from lora_engine import _C

    built = ", ".join(
        name if supported else f"{name} (not on this CPU)"
        for name, supported in _C.isas_built().items()
    )
    return f"C++, {_C.get_num_threads()} threads; using {_C.isa()} of {built}"


def _triton_missing() -> str | None:
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed (pip install lora-engine[torch])"
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no GPU (on a CPU the kernels run with TRITON_INTERPRET=1, slowly)"
    from lora_engine.kernels.launch import device_of

    try:
        device_of(None)
    except RuntimeError as unsupported:
        return str(unsupported)
    return None


def _triton_about() -> str:
    import torch
    import triton

    from lora_engine.kernels.launch import INTERPRETED, device_of

    if INTERPRETED:
        return f"Triton {triton.__version__}, interpreted on the CPU, slowly"
    name = torch.cuda.get_device_name()
    return f"Triton {triton.__version__}, {name}; using {device_of(None).name}"


_REGISTRY = (
    Backend("cpu", "lora_engine._C", _cpu_about, _cpu_missing),
    Backend("triton", "lora_engine.backends.triton", _triton_about, _triton_missing),
    Backend(
        "reference",
        "lora_engine.backends.reference",
        lambda: "float64 NumPy, slow",
        lambda: None,
    ),
)


def find(name: str) -> Any:
    """The backend's module; raises RuntimeError where it cannot be had."""
    for entry in _REGISTRY:
        if entry.name == name:
            why = entry.missing()
            if why:
                raise RuntimeError(f"backend {name}: {why}")
            return importlib.import_module(entry.module)
    known = ", ".join(entry.name for entry in _REGISTRY)
    raise RuntimeError(f"LORA_ENGINE_BACKEND={name}: expected one of {known}")


@cache
def chosen(gpu: bool = False) -> Any:
    """What LORA_ENGINE_BACKEND names; else Triton for arrays on a GPU and C++ for others."""
    name = os.environ.get("LORA_ENGINE_BACKEND") or ("triton" if gpu else "cpu")
    backend = find(name)
    if name == "cpu":
        from lora_engine.backends import cpu_tuned

        cpu_tuned.apply()
    if not gpu:
        from lora_engine import _C

        _C.core_is_chosen(backend is _C)
    return backend


def backend_of(array: Any) -> Any:
    """What computes on an array, by where it is."""
    return chosen(getattr(array, "is_cuda", False))


def backends() -> dict[str, str]:
    """What is there and, for what is not, why not: ``{name: text}``.

    The text of a backend that can be had says which instruction set or device runs;
    else it begins with "unavailable:".
    """
    report = {}
    for entry in _REGISTRY:
        why = entry.missing()
        report[entry.name] = f"unavailable: {why}" if why else entry.about()
    return report
