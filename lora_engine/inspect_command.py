"""``lora-engine inspect``: what adapter folders adapt, how strongly, and in how many directions.

All from the factors; a dense delta is never formed. For adapters only: not for checkpoints of
base weights, NF4 or other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_engine.adapters import micro_folder, peft_format
from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.low_rank import orthonormal
from lora_engine.adapters.peft_tensors import keys_of
from lora_engine.errors import FormatError

_TOP = 3  # singular values in a table
_PAGE = 140  # columns, where there is no terminal
_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
_HIGHLIGHTS = (
    "base_model_name_or_path", "task_type", "peft_version", "r", "lora_alpha", "use_rslora",
    "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "bias", "lora_bias",
    "fan_in_fan_out", "lora_dropout",
)  # fmt: skip


class Measured(NamedTuple):
    """One module's adapter. norm: ‖ΔW‖, Frobenius; singular_values: of ΔW, the largest first."""

    module: str
    kind: str  # "linear" or "embedding"
    in_features: int  # an embedding's rows
    out_features: int
    rank: int
    scaling: float
    norm: float
    singular_values: list[float]
    effective_rank: float
    bytes: int  # in the file


class Report(NamedTuple):
    """One folder. bytes: of its weights file, which may hold more than the modules' adapters."""

    folder: str
    dtype: str
    modules: list[Measured]
    parameters: int  # of A and B
    bytes: int
    norm: float  # of all deltas together
    biases: list[str]
    modules_to_save: list[str]
    engine_state: str  # "none", "present", or why it is not used
    peft_config: dict[str, Any]


# ---- measuring --------------------------------------------------------------


def norm(weights: LoraWeights) -> float:
    """‖s B A‖, Frobenius: s² tr(BᵀB A Aᵀ), of r x r products."""
    A, B = (np.asarray(w, np.float64) for w in weights[:2])
    return abs(weights.scaling) * float(np.sqrt(max(np.sum((B.T @ B) * (A @ A.T)), 0.0)))


def singular_values(weights: LoraWeights) -> NDArray[np.float64]:
    """Those of s B A, descending, as many as the least of r, in and out.

    Of the product of the factors' coordinates in orthonormal bases.
    """
    A, B = (np.asarray(w, np.float64) for w in weights[:2])
    core = orthonormal(B).coordinates @ orthonormal(A.T).coordinates.T
    values = np.linalg.svd(core, compute_uv=False)
    return abs(weights.scaling) * np.pad(values, (0, min(*A.shape, len(B)) - len(values)))


def effective_rank(values: NDArray[np.float64]) -> float:
    """exp of the entropy of the singular values over their sum (Roy and Vetterli 2007, eq. 3)."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _measured(adapter: Adapter, module: str, kind: str, weights: LoraWeights) -> Measured:
    values = singular_values(weights)
    sizes = zip(keys_of(module, kind == "embedding"), weights[:2], strict=True)
    return Measured(
        module,
        kind,
        weights.A.shape[1],
        weights.B.shape[0],
        weights.A.shape[0],
        weights.scaling,
        norm(weights),
        values.tolist(),
        effective_rank(values),
        sum(w.size * _WIDTH[adapter.dtypes.get(key, adapter.dtype)] for key, w in sizes),
    )


def inspect(folder: Path) -> Report:
    """What a folder holds. Raises FormatError naming file and key, FileNotFoundError, OSError."""
    files = peft_format.read_folder(folder)
    adapter = peft_format.adapter_of(files)
    kinds = {"linear": adapter.modules, "embedding": adapter.embeddings}
    modules = [
        _measured(adapter, name, kind, weights)
        for kind, found in kinds.items()
        for name, weights in found.items()
    ]
    state = "none" if files.state is None else "present"
    try:
        micro_folder.read_own(files)
    except FormatError as error:
        state = str(error)
    return Report(
        str(folder),
        adapter.dtype,
        modules,
        sum(m.rank * (m.in_features + m.out_features) for m in modules),
        len(files.weights),
        float(np.sqrt(sum(m.norm**2 for m in modules))),
        list(adapter.biases),
        list(adapter.modules_to_save),
        state,
        {key: files.config.raw[key] for key in _HIGHLIGHTS if files.config.raw.get(key)},
    )


# ---- the command ------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's."""
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of an adapter")
    parser.add_argument("--json", action="store_true", help="for machines: a list, one a folder")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="the modules' spectra")


def run(args: argparse.Namespace) -> int:
    """Prints what the folders hold; returns the exit status, 1 where one could not be read."""
    reports = []
    for folder in args.folders:
        try:
            reports.append(inspect(folder))
        except (FormatError, OSError) as error:
            print(f"inspect: {error}", file=sys.stderr)
    try:
        if args.json:
            print(json.dumps([_as_dict(report) for report in reports], indent=2))
        else:
            _print(reports)
        if args.plot and reports:
            _plot(reports, args.plot)
    except ModuleNotFoundError as missing:
        print(f"inspect needs {missing.name}: pip install 'lora-engine[demo]'", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:  # of the picture's file
        print(f"inspect: --plot: {error}", file=sys.stderr)
        return 1
    return 0 if len(reports) == len(args.folders) else 1


def _as_dict(report: Report) -> dict[str, Any]:
    return {**report._asdict(), "modules": [m._asdict() for m in report.modules]}


def _print(reports: list[Report]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PAGE
    for report in reports:
        table = Table(title=Text(report.folder))
        table.add_column("module", overflow="fold")
        for name in ("in x out", "rank", "scaling", "‖ΔW‖", "singular values", "effective rank",
                     "bytes"):  # fmt: skip
            table.add_column(name, justify="right")
        for m in report.modules:
            top = " ".join(f"{value:.3g}" for value in m.singular_values[:_TOP])
            more = " ..." if m.rank > _TOP else ""
            table.add_row(
                Text(m.module), f"{m.in_features} x {m.out_features}", str(m.rank),
                f"{m.scaling:.4g}", f"{m.norm:.4g}", top + more, f"{m.effective_rank:.2f}",
                f"{m.bytes:,}",
            )  # fmt: skip
        console.print(table)
        console.print(
            f"{len(report.modules)} modules, {report.parameters:,} parameters,"
            f" ‖ΔW‖ {report.norm:.4g} together, {report.bytes:,} bytes of {report.dtype}"
        )
        for key, value in {**report.peft_config, **_rest(report)}.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            console.print(f"{key}: {text}")
        console.print()


def _rest(report: Report) -> dict[str, str]:
    found = {"engine state": report.engine_state}
    if report.biases:
        found["whole biases"] = f"{len(report.biases)} modules"
    if report.modules_to_save:
        found["whole parameters"] = ", ".join(report.modules_to_save)
    return found


def _plot(reports: list[Report], file: Path) -> None:
    """A panel a folder, a line a module: its singular values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 * len(reports)), layout="constrained")
    axes = figure.subplots(len(reports), squeeze=False)[:, 0]
    for panel, report in zip(axes, reports, strict=True):
        for m in report.modules:
            values = [value for value in m.singular_values if value > 0]
            panel.plot(range(1, len(values) + 1), values, marker=".", label=m.module)
        panel.set(title=report.folder, xlabel="index", ylabel="singular value of ΔW")
        if any(any(m.singular_values) for m in report.modules):
            panel.set_yscale("log")
        if len(report.modules) <= 12:
            panel.legend(fontsize="small")
    figure.savefig(file)
