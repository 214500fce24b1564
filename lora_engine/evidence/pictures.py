"""The pictures of the evidence: accuracy over tasks, and the quality curve."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_engine.evidence import adapters, permuted_digits, quality
from lora_engine.evidence.measure import Doubles, final, so_far

# Okabe and Ito's colours: told apart by those who see fewer.
_COLOURS = {
    "none": "#D55E00", "best L2": "#E69F00", "online EWC": "#0072B2", "joint": "#999999",
    "EWC, factor form": "#0072B2", "EWC, delta form": "#009E73",
}  # fmt: skip


def _save(figure: Figure, path: Path) -> None:
    png = io.BytesIO()  # so that Ctrl-C while drawing leaves no half a file
    figure.savefig(png)
    path.write_bytes(png.getvalue())


def _curve(axis: Any, name: str, accuracy: Doubles) -> None:
    """Mean over seeds with a band of one standard deviation."""
    each = so_far(accuracy)
    tasks, mean, spread = np.arange(1, each.shape[1] + 1), each.mean(axis=0), each.std(axis=0)
    label = f"{name}: {final(accuracy).mean():.1%}"
    axis.plot(tasks, mean, "o-", color=_COLOURS[name], label=label)
    axis.fill_between(tasks, mean - spread, mean + spread, color=_COLOURS[name], alpha=0.15)
    axis.set_xticks(tasks)


def _finish(axis: Any, title: str, xlabel: str) -> None:
    axis.set(title=title, xlabel=xlabel)
    axis.yaxis.set_major_locator(MaxNLocator(steps=(1, 2, 5, 10)))
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", fontsize=9)


def draw_tasks(permuted: permuted_digits.Result, adapted: adapters.Result, path: Path) -> None:
    """Accuracy over the tasks learned so far, of the whole network and of adapters."""
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for name, accuracy in permuted.accuracy.items():
        if name == permuted_digits.JOINT:
            share = final(accuracy).mean()
            label = f"all tasks at once: {share:.1%}"
            left.axhline(share, color=_COLOURS[name], linestyle="--", label=label)
        else:
            _curve(left, name, accuracy)
    _finish(left, "Permuted digits, the whole network", "tasks learned")
    left.set_ylabel("accuracy on the test images of all tasks so far")
    outcomes = adapted.outcomes
    _curve(right, "none", next(iter(outcomes.values())).none)
    for form, outcome in outcomes.items():
        _curve(right, f"EWC, {form} form", outcome.ewc)
    _finish(right, "16 pixels shuffled a task, adapters of rank 4", "tasks learned")
    _save(figure, path)


def draw_quality(result: quality.Result, path: Path) -> None:
    """Mean quality over the requests, each seed and all, and the frozen base's."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained", dpi=120)
    axis = figure.subplots()
    ends = np.linspace(0, result.requests, result.held_out.shape[1])
    blue, green, orange = "#0072B2", "#009E73", "#D55E00"
    axis.plot(ends, result.held_out.T, color=blue, alpha=0.25, linewidth=0.8)
    axis.plot(ends, result.held_out.mean(axis=0), color=blue, linewidth=2, label="held-out images")
    served = result.served.mean(axis=0)
    axis.plot((ends[1:] + ends[:-1]) / 2, served, color=green, linewidth=2,
              label="answers served, noise included")  # fmt: skip
    base = result.held_out[:, 0].mean()
    axis.axhline(base, color=orange, linestyle="--", label=f"frozen base: {base:.1%}")
    seeds = len(result.served)
    _finish(axis, f"Learning from quality alone, {seeds} seeds (thin) and their mean", "requests")
    axis.set_ylabel("mean quality")
    axis.legend(loc="lower right", fontsize=9)
    _save(figure, path)
