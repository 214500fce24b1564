"""``lora-engine demo``: 64 users, one adapter each, learning live from their own labels.

A frozen base reads handwritten digits; every user sees them differently. Every
round is one batched forward for all users and one batched adapt from the
labels. All numbers printed are measured in the run.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import lora_engine as le
from lora_engine.demo_data import (
    CLASSES,
    FEATURES,
    KINDS,
    TUNING_USERS,
    USERS,
    Digits,
    Ints,
    Users,
    World,
    loss_gradient,
    reported_users,
    tuning_users,
)

RANK, ALPHA = 4, 8.0  # set the rank to 2, and the tuning users learn clearly less
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
MAX_NORM = 1.0
WINDOW = 50  # rounds of the running accuracy
CHECKPOINTS = 12


class Round(NamedTuple):
    """One batch: who was right before learning from it, and the seconds it took."""

    base_right: NDArray[np.bool_]
    right: NDArray[np.bool_]
    forward: float
    adapt: float


class Outcome(NamedTuple):
    """What a run measured. right [1 + checkpoints, users]: base first, final adapters last."""

    users: Users
    learning_rate: float
    tuning: dict[float, float]
    checkpoints: list[int]
    right: Ints
    held_out: int
    rounds: list[Round]
    pool: le.AdapterPool

    def accuracy(self, row: int, kind: str | None = None) -> float:
        """On held-out images, over the users of a kind or over all."""
        chosen = [kind in (None, k) for k in self.users.kinds]
        return float(self.right[row, chosen].mean() / self.held_out)


# ---- learning ---------------------------------------------------------------


def new_pool(count: int) -> le.AdapterPool:
    """Fresh adapters, slot i for user i: A Kaiming-uniform (a = sqrt 5), B zero."""
    rng = np.random.default_rng(0)
    pool = le.AdapterPool(FEATURES, CLASSES, capacity=count, max_rank=RANK)
    bound = FEATURES**-0.5
    for _ in range(count):
        A = rng.uniform(-bound, bound, (RANK, FEATURES)).astype(np.float32)
        pool.add(A, np.zeros((CLASSES, RANK), np.float32), ALPHA / RANK)
    return pool


def copy_pool(pool: le.AdapterPool) -> le.AdapterPool:
    """The adapters as they are now."""
    copy = le.AdapterPool(FEATURES, CLASSES, capacity=len(pool), max_rank=RANK)
    for slot in range(len(pool)):
        copy.add(*pool.get(slot))
    return copy


def learn(
    world: World, users: Users, pool: le.AdapterPool, rounds: int, lr: float
) -> Iterator[Round]:
    """Serves every user one image a round, then learns from its label."""
    ids = np.arange(len(users.kinds), dtype=np.int32)
    for x, labels in world.batches(users, rounds):
        y = world.base(x)
        base_right = y.argmax(axis=1) == labels
        start = perf_counter()
        pool.forward(x, ids, out=y)
        forward = perf_counter() - start
        gradient = loss_gradient(y, labels)
        start = perf_counter()
        result = pool.adapt(x, gradient, ids, lr, max_norm=MAX_NORM)
        adapt = perf_counter() - start
        if not result.applied.all():
            raise RuntimeError(f"demo: lr {lr}: {result.note}")
        yield Round(base_right, y.argmax(axis=1) == labels, forward, adapt)


def count_right(
    world: World, user: int, users: Users, pools: Sequence[le.AdapterPool], digits: Digits
) -> list[int]:
    """Right answers of the frozen base, then of the user's adapter in each pool."""
    x = world.features(users.view(user, digits.images))
    base = world.base(x)
    ids = np.full(len(x), user, np.int32)
    logits = [base, *(pool.forward(x, ids, out=base.copy()) for pool in pools)]
    return [int((y.argmax(axis=1) == digits.labels).sum()) for y in logits]


def choose_learning_rate(world: World, rounds: int, progress: Progress) -> dict[float, float]:
    """Accuracy with each learning rate: of other users, on images kept for this."""
    users = tuning_users()
    task = progress.add_task("tuning users", total=len(LEARNING_RATES) * rounds, note="")
    accuracy = {}
    for lr in LEARNING_RATES:
        pool = new_pool(TUNING_USERS)
        for turn, _ in enumerate(learn(world, users, pool, rounds, lr)):
            progress.update(task, advance=1, refresh=turn % 20 == 0)
        counts = [count_right(world, u, users, [pool], world.tuning) for u in range(TUNING_USERS)]
        accuracy[lr] = float(np.mean(counts, axis=0)[1] / len(world.tuning.labels))
        progress.update(task, note=f"lr {lr:g}: {accuracy[lr]:.1%}", refresh=True)
    return accuracy


def serve_and_learn(
    world: World, users: Users, pool: le.AdapterPool, rounds: int, lr: float, progress: Progress
) -> tuple[list[Round], dict[int, le.AdapterPool]]:
    """The demo itself: every round's result, and copies of the adapters along the way.

    The bar is drawn between rounds and never by a thread of its own, so that
    drawing is in none of the times.
    """
    task = progress.add_task("64 users", total=rounds, note="")
    done: list[Round] = []
    recent: deque[Round] = deque(maxlen=WINDOW)
    keep = {round(rounds * (i / CHECKPOINTS) ** 2) for i in range(1, CHECKPOINTS + 1)}
    copies = {0: copy_pool(pool)}
    for result in learn(world, users, pool, rounds, lr):
        done.append(result)
        recent.append(result)
        if len(done) in keep:
            copies[len(done)] = copy_pool(pool)
        if len(done) % 10 == 0 or len(done) == rounds:
            base, right = (np.mean([r[i] for r in recent]) for i in (0, 1))
            progress.update(task, note=f"now: base {base:.0%}, adapters {right:.0%}")
        progress.update(task, advance=1, refresh=len(done) % 10 == 0)
    return done, copies


def run_rounds(world: World, rounds: int, console: Console) -> Outcome:
    """Chooses the learning rate, lets the users learn, and counts on held-out images."""
    text, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (text, BarColumn(bar_width=20), MofNCompleteColumn(), note)
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        tuning = choose_learning_rate(world, rounds, progress)
        lr = max(tuning, key=tuning.__getitem__)
        users, pool = reported_users(), new_pool(USERS)
        done, copies = serve_and_learn(world, users, pool, rounds, lr, progress)
        task = progress.add_task("held-out images", total=USERS, note="")
        right = []
        for user in range(USERS):
            right.append(count_right(world, user, users, list(copies.values()), world.held_out))
            progress.update(task, advance=1, refresh=True)
    held_out = len(world.held_out.labels)
    return Outcome(users, lr, tuning, list(copies), np.array(right).T, held_out, done, pool)


# ---- the adapters on disk ---------------------------------------------------


def _folder(out: Path, user: int) -> Path:
    return out / "adapters" / f"user_{user:02d}"


def save_adapters(pool: le.AdapterPool, out: Path) -> int:
    """One PEFT folder a user, each whole or absent at any moment. Returns their bytes."""
    config = le.MicroLoRAConfig(
        FEATURES, CLASSES, rank=RANK, alpha=ALPHA, target_modules=("classifier",)
    )
    lora = le.MicroLoRA(config)
    for slot in range(len(pool)):
        A, B, _ = pool.get(slot)
        lora.set_weights("classifier", A, B)
        lora.save(_folder(out, slot))
    files = (file for slot in range(len(pool)) for file in _folder(out, slot).iterdir())
    return sum(file.stat().st_size for file in files)


def load_adapters(out: Path) -> le.AdapterPool:
    """A new pool of what ``save_adapters`` wrote."""
    pool = le.AdapterPool(FEATURES, CLASSES, capacity=USERS, max_rank=RANK)
    for user in range(USERS):
        pool.add(*le.MicroLoRA.load(_folder(out, user)).weights("classifier"))
    return pool


def verify(out: Path) -> list[int]:
    """Held-out answers right for each user, with the adapters of ``out`` and nothing else."""
    with threadpool_limits(1, "blas"):
        world, users, pools = World(), reported_users(), [load_adapters(out)]
        return [count_right(world, u, users, pools, world.held_out)[1] for u in range(USERS)]


def verify_in_fresh_process(out: Path) -> list[int]:
    """``verify`` in a new interpreter; empty, with its error printed, where that fails.

    The child is out of reach of the terminal's Ctrl-C, which ends it through us.
    """
    command = [sys.executable, "-m", "lora_engine.demo", "--verify", os.fspath(out)]
    child = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if child.returncode != 0:
        print(child.stderr, file=sys.stderr)
        return []
    return [int(n) for n in json.loads(child.stdout)]


# ---- the report -------------------------------------------------------------


def accuracy_table(outcome: Outcome) -> Table:
    """Frozen base and adapters side by side, per kind of user."""
    title = f"Accuracy on {outcome.held_out} held-out images a user"
    table = Table("kind of user", title=title)
    for heading in ("users", "frozen base", "with adapters", "worst user", "best user"):
        table.add_column(heading, justify="right")
    for kind in (*KINDS, None):
        chosen = [kind in (None, k) for k in outcome.users.kinds]
        each = outcome.right[-1, chosen] / outcome.held_out
        shares = (outcome.accuracy(0, kind), outcome.accuracy(-1, kind), each.min(), each.max())
        if kind is None:
            table.add_section()
        table.add_row(kind or "all", str(sum(chosen)), *(f"{share:.1%}" for share in shares))
    return table


def latency_table(outcome: Outcome) -> Table:
    """p50 and p99 of a round, and a user's share of it."""
    table = Table("one call for all", title=f"Latency over {len(outcome.rounds)} rounds, us")
    for heading in ("round p50", "round p99", f"per user p50 (/{USERS})", "per user p99"):
        table.add_column(heading, justify="right")
    for what in ("forward", "adapt"):
        seconds = [getattr(done, what) for done in outcome.rounds]
        p50, p99 = np.percentile(seconds, (50, 99)) * 1e6
        shares = (f"{p50 / USERS:.2f}", f"{p99 / USERS:.2f}")
        table.add_row(what, f"{p50:.0f}", f"{p99:.0f}", *shares)
    return table


def draw(outcome: Outcome, world: World, path: Path) -> None:
    """A column for each kind: a digit as three of its users see it, and how they learned."""
    figure = Figure(figsize=(13, 5.4), layout="constrained", dpi=120)
    axes = figure.subplots(2, len(KINDS), height_ratios=(1, 3))
    for (seen, curves), kind in zip(axes.T, KINDS, strict=True):
        members = [i for i, k in enumerate(outcome.users.kinds) if k == kind]
        views = [outcome.users.view(u, world.held_out.images[:1]) for u in members[:3]]
        gap = np.full((8, 1), 0.5)
        tiles = [tile for view in views for tile in (gap, view.reshape(8, 8))][1:]
        seen.imshow(np.hstack(tiles), cmap="gray", vmin=0.0, vmax=1.0)
        seen.set(title=f"{kind} users see", xticks=[], yticks=[])
        _draw_curves(curves, outcome, kind, members)
        curves.tick_params(labelleft=curves is axes[1, 0])
    axes[1, 0].set_ylabel("accuracy on held-out images")
    axes[1, 0].legend(loc="center", fontsize=9)
    figure.suptitle(
        "One digit as three users of each kind see it; accuracy of frozen base → with adapters"
    )
    figure.supxlabel("rounds: labels each user has given", fontsize=11)
    png = io.BytesIO()  # so that Ctrl-C while drawing leaves no half a file
    figure.savefig(png)
    path.write_bytes(png.getvalue())


def _draw_curves(axis: Any, outcome: Outcome, kind: str, members: list[int]) -> None:
    each = outcome.right[1:, members] / outcome.held_out
    base, blue = outcome.accuracy(0, kind), "#0072B2"
    thin, *_ = axis.plot(outcome.checkpoints, each, color=blue, alpha=0.25, linewidth=0.8)
    thin.set_label("with adapter, each user")
    axis.plot(outcome.checkpoints, each.mean(axis=1), "o-", color=blue, markersize=4, linewidth=2,
              label="with adapters, mean")  # fmt: skip
    axis.axhline(base, color="#D55E00", linestyle="--", linewidth=2, label="frozen base, mean")
    axis.set_title(f"{base:.1%} → {outcome.accuracy(-1, kind):.1%}", fontsize=12)
    axis.set_ylim(0.0, 1.02)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.grid(alpha=0.3)


# ---- the command ------------------------------------------------------------


def report(outcome: Outcome, disk_bytes: int, console: Console) -> None:
    """The tables, and in a line each what else was measured."""
    tried = ", ".join(f"{lr:g}: {share:.1%}" for lr, share in outcome.tuning.items())
    lines = (
        f"learning rate {outcome.learning_rate:g}, chosen on {TUNING_USERS} other users ({tried})",
        f"bytes per user: {outcome.pool.nbytes / USERS:,.0f} in memory with all bookkeeping,"
        f" {disk_bytes / USERS:,.0f} on disk (rank {RANK})",
    )
    console.print(accuracy_table(outcome), latency_table(outcome))
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True)


def run(rounds: int = 600, out: str | os.PathLike[str] = "demo_output") -> int:
    """Runs the demo and writes adapters and picture into ``out``; the exit status.

    NumPy's BLAS gets one thread: two pools that wait for work on the same cores
    slow each other down.
    """
    if rounds < 1:
        print(f"demo: rounds: expected at least 1, got {rounds}", file=sys.stderr)
        return 2
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: out: {error}", file=sys.stderr)
        return 2
    with threadpool_limits(1, "blas"):
        return _run(rounds, Path(out))


def _run(rounds: int, out: Path) -> int:
    start, console, world = perf_counter(), Console(), World()
    outcome = run_rounds(world, rounds, console)
    disk_bytes = save_adapters(outcome.pool, out)
    draw(outcome, world, out / "accuracy.png")
    report(outcome, disk_bytes, console)
    loaded, served = verify_in_fresh_process(out), outcome.right[-1].tolist()
    lines = (
        f"a fresh process loaded the adapters from disk: {sum(loaded)} of"
        f" {USERS * outcome.held_out} right, here {sum(served)}:"
        f" {'the same for every user' if loaded == served else 'NOT THE SAME'}",
        f"written to {out}: adapters/ (PEFT folders), accuracy.png",
        f"{perf_counter() - start:.1f} s in all",
    )
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True, markup=False)
    return 0 if loaded == served else 1


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--verify":
        sys.exit("usage: python -m lora_engine.demo --verify FOLDER (or: lora-engine demo)")
    print(json.dumps(verify(Path(sys.argv[2]))))
