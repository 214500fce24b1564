"""All experiments in turn, their tables, pictures, and whether each holds what is promised."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from lora_engine.evidence import (
    adapters,
    many_users,
    permuted_digits,
    pictures,
    quality,
    transfer,
)
from lora_engine.evidence.measure import Doubles, final, forgetting, points


class Evidence(NamedTuple):
    """The result of each experiment."""

    permuted: permuted_digits.Result
    adapted: adapters.Result
    learned: quality.Result
    transferred: transfer.Result
    users: many_users.Result

    def check(self) -> list[str]:
        """What falls short of its margin; empty: nothing."""
        return [
            *(f"permuted digits: {line}" for line in permuted_digits.check(self.permuted)),
            *(f"adapters: {line}" for line in adapters.check(self.adapted)),
            *(f"quality alone: {line}" for line in quality.check(self.learned)),
            *(f"one lambda: {line}" for line in transfer.check(self.transferred)),
            *(f"many users: {line}" for line in many_users.check(self.users)),
        ]


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(first, title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _tasks_row(table: Table, name: str, accuracy: Doubles, setting: str) -> None:
    lost = forgetting(accuracy)
    table.add_row(
        name, points(final(accuracy)), "" if np.isnan(lost).any() else points(lost), setting
    )


def tasks_tables(permuted: permuted_digits.Result, adapted: adapters.Result) -> list[Table]:
    """Tasks learned one after another, by a network and by adapters."""
    network = _table("Permuted digits, five tasks", "method", "accuracy", "forgotten", "lambda")
    settings = {
        permuted_digits.L2: f"{permuted.l2_lambda:g}",
        permuted_digits.EWC: f"{permuted.ewc_lambda:g}, gamma {permuted.gamma:g}",
    }
    for name, accuracy in permuted.accuracy.items():
        _tasks_row(network, name, accuracy, settings.get(name, ""))
    title = f"Adapters of rank 4, five tasks, learning rate {adapted.learning_rate:g}"
    table = _table(title, "method", "accuracy", "forgotten", "lambda")
    outcomes = adapted.outcomes
    _tasks_row(table, "none", next(iter(outcomes.values())).none, "")
    for form, outcome in outcomes.items():
        _tasks_row(table, f"EWC, {form} form", outcome.ewc, f"{outcome.ewc_lambda:g}")
    return [network, table]


def quality_table(result: quality.Result) -> Table:
    """The frozen base, and the last quarter of the requests."""
    setting = f"sigma {result.sigma:g}, learning rate {result.learning_rate:g}"
    table = _table(f"Quality alone, {setting}", "mean quality", "at first", "in the end")
    part = quality.QUARTER
    held_out = result.held_out[:, 0], result.held_out[:, -part:].mean(axis=1)
    served = result.served[:, :part].mean(axis=1), result.served[:, -part:].mean(axis=1)
    table.add_row("held-out images", *map(points, held_out))
    table.add_row("answers served", *map(points, served))
    return table


def transfer_table(result: transfer.Result) -> Table:
    """Of each setting: with lambda from rank 2 and single samples, and with its own best."""
    title = f"lambda {result.ewc_lambda:g}, chosen at rank 2, a sample a step"
    table = _table(title, "setting", "none", "with it", "with its own best", "own best")
    for name, accuracy in result.accuracy.items():
        best = max(accuracy, key=accuracy.__getitem__)
        shares = (accuracy[0.0], accuracy[result.ewc_lambda], accuracy[best])
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares), f"{best:g}")
    return table


def users_tables(result: many_users.Result) -> list[Table]:
    """What each user forgets, and a round of all."""
    users = len(result.ewc.accuracy)
    heading = f"{users} users, two tasks each, lambda {result.ewc_lambda:g}"
    table = _table(
        heading, "method", "forgotten, over users", "worst twentieth", "accuracy, both tasks"
    )
    times = _table(
        f"A round of {users} users, {many_users.IMAGES} images each, ms, p50 / p99", "method"
    )
    for column in ("forward", "adapt", "observe", "in all"):
        times.add_column(column, justify="right")
    for name, run in (("none", result.none), ("EWC", result.ewc)):
        worst = f"{100 * np.percentile(run.forgetting, 95):.1f}"
        table.add_row(name, points(run.forgetting), worst, f"{100 * run.mean:.1f}")
        seconds = np.column_stack([run.seconds, run.seconds.sum(axis=1)])
        p50, p99 = 1e3 * np.percentile(seconds, (50, 99), axis=0)
        times.add_row(name, *(f"{a:.2f} / {b:.2f}" for a, b in zip(p50, p99, strict=True)))
    return [table, times]


def measure(console: Console) -> Evidence:
    """Runs every experiment; BLAS gets one thread, so that two pools do not slow each other."""
    text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (text, BarColumn(bar_width=20), note)
    with (
        threadpool_limits(1, "blas"),
        Progress(*columns, console=console, auto_refresh=False) as progress,
    ):
        return Evidence(
            permuted_digits.run(progress),
            adapters.run(progress),
            quality.run(progress),
            transfer.run(progress),
            many_users.run(progress),
        )


def show(evidence: Evidence, out: Path, console: Console) -> int:
    """Prints the tables, writes the pictures, and says what falls short; the exit status."""
    console.print(*tasks_tables(evidence.permuted, evidence.adapted))
    console.print(quality_table(evidence.learned), transfer_table(evidence.transferred))
    console.print(*users_tables(evidence.users))
    pictures.draw_tasks(evidence.permuted, evidence.adapted, out / "tasks.png")
    pictures.draw_quality(evidence.learned, out / "quality.png")
    missed = evidence.check()
    lines = [f"FALLS SHORT: {line}" for line in missed] or ["every margin is held"]
    lines.append(f"written to {out}: tasks.png, quality.png")
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True, markup=False)
    return 1 if missed else 0


def run(out: str | os.PathLike[str] = "demo_output") -> int:
    """Measures, prints and draws into ``out``; the exit status, 1 where a margin is missed."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: out: {error}", file=sys.stderr)
        return 2
    start, console = perf_counter(), Console()
    status = show(measure(console), Path(out), console)
    console.print(f"{perf_counter() - start:.0f} s in all", highlight=False)
    return status
