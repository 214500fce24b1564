"""``lora-engine demo --text``: search in Python's documentation that learns from clicks.

A frozen MiniLM finds passages for a sentence; each user, by a taste of their own, clicks some and
not others, and has an adapter that learns from each click at once. The same in NF4. All numbers
printed are measured in the run.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import lora_engine as le
from lora_engine.adapters.store_lock import FolderLock
from lora_engine.errors import StoreLocked
from lora_engine.text_demo import corpus, reloaded, users
from lora_engine.text_demo.encoder import Encoder
from lora_engine.text_demo.users import Learned, World

ENCODERS = {"float32": False, "NF4": True}
CONTROL = corpus.TASTES[-1].name
# What a run has to reach, as differences to the frozen model: about half of what was measured.
RECALL, MRR = 0.04, 0.06  # mean over the tastes
HARM = 0.03  # of MRR that any user may lose, and the one without a taste


class Outcome(NamedTuple):
    """What a run measured with one encoder."""

    name: str
    world: World
    tuning: dict[float, float]
    learning_rate: float
    learned: list[Learned]

    def gains(self) -> tuple[float, float]:
        """Mean over the tastes, without the control, of what recall@1 and MRR have gained."""
        found = [
            np.subtract(one.curve[-1], one.curve[0]) for one in self.learned if one.taste != CONTROL
        ]
        recall, mrr = np.mean(found, axis=0)
        return float(recall), float(mrr)

    def check(self) -> list[str]:
        """What falls short of its margin; empty: nothing."""
        (recall, mrr), missed = self.gains(), []
        if recall < RECALL:
            missed.append(f"recall@1: expected {100 * RECALL:+.1f} points, got {100 * recall:+.1f}")
        if mrr < MRR:
            missed.append(f"MRR: expected {MRR:+.3f}, got {mrr:+.3f}")
        for one in self.learned:
            before, after = one.curve[0], one.curve[-1]
            if after.mrr < before.mrr - HARM:
                missed.append(f"{one.taste}: MRR: expected at least {before.mrr - HARM:.3f},"
                              f" got {after.mrr:.3f}")  # fmt: skip
        return [f"{self.name}: {line}" for line in missed]


def user_id(encoder: str, taste: str) -> str:
    return f"{taste}, {encoder}"


def learn(
    name: str, world: World, store: le.AdapterStore, done: Callable[[int], object]
) -> Outcome:
    """Chooses the learning rate, then every user learns, by an adapter of the store."""
    tuning = users.choose_learning_rate(world, done)
    lr = max(tuning, key=tuning.__getitem__)
    learned = []
    for taste in world.wanted:
        slot = store.slot(user_id(name, taste))
        learned.append(users.learn(world, taste, store.pool, slot, lr))
        done(1)
    return Outcome(name, world, tuning, lr, learned)


def run_encoders(out: Path, most: int | None, console: Console) -> list[Outcome]:
    """Every encoder in turn; leaves the store and the PEFT folders in ``out``."""
    text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (text, BarColumn(bar_width=20), MofNCompleteColumn(), note)
    _remove_store(out / reloaded.STORE)
    passages, queries = users.text(most)
    turns = (len(users.LEARNING_RATES) + 1) * len(corpus.TASTES)
    outcomes: list[Outcome] = []
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        worlds = {}
        for name, nf4 in ENCODERS.items():
            task = progress.add_task(f"encode, {name}", total=len(passages) + len(queries), note="")

            def done(more: int, task: object = task) -> None:
                progress.update(task, advance=more, refresh=True)  # type: ignore[arg-type]

            worlds[name] = users.encoded(Encoder(nf4), most, done)
        width = next(iter(worlds.values())).embeddings.shape[1]
        with (
            threadpool_limits(1, "blas"),
            reloaded.open_store(out, width) as store,
        ):
            for name, world in worlds.items():
                task = progress.add_task(f"learn, {name}", total=turns, note="")
                outcomes.append(
                    learn(name, world, store,
                          lambda more, task=task: progress.update(  # type: ignore[misc]
                              task, advance=more, refresh=True))
                )  # fmt: skip
                for taste in world.wanted:
                    folder = reloaded.folder_of(out, name, taste)
                    store.export(user_id(name, taste), folder, users.MODULE)
    return outcomes


def _remove_store(folder: Path) -> None:
    """That of an earlier run. Raises StoreLocked where another is at work in it."""
    if folder.is_dir():
        lock = FolderLock(folder)
        try:
            shutil.rmtree(folder)
        finally:
            lock.release()


# ---- the report -------------------------------------------------------------


def quality_table(outcome: Outcome) -> Table:
    """Each user against the frozen model, on the sections held out."""
    title = f"{outcome.name}: held-out queries, frozen model → with adapter"
    table = Table("user", "wants", title=title)
    for heading in ("clicks", "queries", "recall@1", "MRR"):
        table.add_column(heading, justify="right")
    for one, taste in zip(outcome.learned, corpus.TASTES, strict=True):
        before, after = one.curve[0], one.curve[-1]
        table.add_row(
            one.taste, taste.wants, str(one.clicks[-1]), str(len(one.ranks)),
            f"{before.recall:.1%} → {after.recall:.1%}", f"{before.mrr:.3f} → {after.mrr:.3f}",
        )  # fmt: skip
    return table


def latency_table(outcomes: list[Outcome]) -> Table:
    """p50 and p99 of a click and of a search."""
    table = Table("us", title="Latency, one user at a time")
    for heading in ("a click: adapt p50", "p99", "search p50", "p99"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        adapt = np.concatenate([one.adapt for one in outcome.learned])
        searching = np.concatenate([one.searching for one in outcome.learned])
        found = [*np.percentile(adapt, (50, 99)), *np.percentile(searching, (50, 99))]
        table.add_row(outcome.name, *(f"{seconds * 1e6:.0f}" for seconds in found))
    return table


def draw(outcomes: list[Outcome], path: Path) -> None:
    """MRR over clicks, a panel for each user, a line for each encoder."""
    figure = Figure(figsize=(14, 4), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(corpus.TASTES), sharey=True)
    for at, (axis, taste) in enumerate(zip(axes, corpus.TASTES, strict=True)):
        for outcome, colour in zip(outcomes, ("#0072B2", "#009E73"), strict=False):
            one = outcome.learned[at]
            mrr = [quality.mrr for quality in one.curve]
            axis.plot(one.clicks, mrr, "o-", color=colour, markersize=4, label=outcome.name)
            axis.axhline(mrr[0], color=colour, linestyle="--", linewidth=1)
        axis.set_title(f"{taste.name}: {taste.wants}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MRR on held-out queries")
    axes[0].set_ylim(bottom=0.0)
    axes[0].legend(title="dashed: frozen model", fontsize=9)
    figure.supxlabel("clicks of the user", fontsize=11)
    png = io.BytesIO()  # so that Ctrl-C while drawing leaves no half a file
    figure.savefig(png)
    path.write_bytes(png.getvalue())


def _same(out: Path, outcomes: list[Outcome]) -> bool:
    here = {
        user_id(outcome.name, one.taste): one.ranks.tolist()
        for outcome in outcomes
        for one in outcome.learned
    }
    reloaded.save_embeddings(out, {o.name: o.world for o in outcomes})
    return reloaded.ranks_in_fresh_process(out) == here


def run(out: str | os.PathLike[str] = "demo_output", most: int | None = None) -> int:
    """Runs the demo on the first ``most`` passages and writes store, PEFT folders and picture
    into ``out``; the exit status, 1 where a margin is missed."""
    start, console, folder = perf_counter(), Console(), Path(out) / "text"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: out: {error}", file=sys.stderr)
        return 2
    try:
        outcomes = run_encoders(folder, most, console)
    except StoreLocked as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    draw(outcomes, folder / "learning.png")
    console.print(*map(quality_table, outcomes), latency_table(outcomes))
    for outcome in outcomes:
        tried = ", ".join(f"{lr:g}: {mrr:.3f}" for lr, mrr in outcome.tuning.items())
        console.print(
            f"{outcome.name}: learning rate {outcome.learning_rate:g}, by the MRR on sections kept"
            f" for it ({tried})", highlight=False, soft_wrap=True,
        )  # fmt: skip
    same = _same(folder, outcomes)
    missed = [line for outcome in outcomes for line in outcome.check()]
    if not same:
        missed.append("a fresh process: expected the same ranks, got OTHERS")
    lines = [f"FALLS SHORT: {line}" for line in missed] or [
        "every margin is held; a fresh process has the same ranks from the PEFT folders"
    ]
    lines.append(f"written to {folder}: store/ (AdapterStore), adapters/ (PEFT), learning.png")
    lines.append(f"{perf_counter() - start:.0f} s in all")
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True, markup=False)
    return 1 if missed else 0
