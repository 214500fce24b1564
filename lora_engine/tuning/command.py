"""``lora-engine tune``: what is quickest on this machine, measured once and kept.

The choices go to $LORA_ENGINE_TUNED, else ~/.cache/lora_engine/tuned, one file a device; the
engine reads them at first use. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_engine.errors import FormatError
from lora_engine.tuning.shapes import Shape, from_config, parse

DTYPES = ("bfloat16", "float16", "float32")
ROWS = (1, 16, 64, 256, 1024, 4096)
MOST_RANK, MOST_ROWS = 1024, 1 << 16


def _number(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:10]) <= most:
            raise argparse.ArgumentTypeError(f"expected a number from 1 to {most}, got {text!r}")
        return int(text)

    return number


def _shape(text: str) -> Shape:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's."""
    parser.add_argument("--shape", type=_shape, action="append", default=[], metavar="IN,OUT",
                        help="a projection's sizes; repeatable")  # fmt: skip
    parser.add_argument("--model", type=Path, help="a model's folder or config.json")
    parser.add_argument("--rank", type=_number(MOST_RANK), action="append",
                        help="of the adapters; repeatable (16)")  # fmt: skip
    parser.add_argument("--rows", type=_number(MOST_ROWS), action="append",
                        help=f"of a batch, on a GPU; repeatable {ROWS}")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, action="append",
                        help="of rows and adapters, on a GPU; repeatable (bfloat16)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Tunes; returns the exit status."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print("tuning needs rich: pip install 'lora-engine[tune]'", file=sys.stderr)
        return 1
    try:
        shapes = list(dict.fromkeys(args.shape + (from_config(args.model) if args.model else [])))
    except (FormatError, OSError) as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    if not shapes:
        print("tune: expected --shape IN,OUT or --model FOLDER", file=sys.stderr)
        return 2
    console = Console()
    ranks = tuple(dict.fromkeys(args.rank or (16,)))
    status = _tune_cpu(shapes, ranks, console)
    why_not = _no_gpu()
    if why_not:
        console.print(why_not, highlight=False)
        return status
    rows, dtypes = (tuple(dict.fromkeys(v)) for v in (args.rows or ROWS, args.dtype or DTYPES[:1]))
    return status or _tune_gpu(shapes, ranks, rows, dtypes, console)


def _no_gpu() -> str:
    """Why no GPU is tuned, in a line; "" where one is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "No GPU tuned: TRITON_INTERPRET is set, and an interpreter's times mean nothing."
    try:
        from lora_engine.backends import find

        find("triton")
    except RuntimeError as why:
        return f"No GPU tuned: {why}."
    return ""


def _tune_cpu(shapes: Sequence[Shape], ranks: Sequence[int], console: Any) -> int:
    from lora_engine.backends import cpu_tuned, find
    from lora_engine.tuning import cpu

    try:
        find("cpu")
    except RuntimeError as why:
        print(f"tune: {why}", file=sys.stderr)
        return 1
    return tune([cpu.job(shapes, ranks)], cpu_tuned.identity(), cpu_tuned.versions(), console)


def _tune_gpu(
    shapes: Sequence[Shape],
    ranks: Sequence[int],
    rows: Sequence[int],
    dtypes: Sequence[str],
    console: Any,
) -> int:
    from lora_engine.kernels import tunable
    from lora_engine.tuning import gpu

    jobs = list(gpu.jobs(shapes, ranks, rows, dtypes))
    return tune(jobs, tunable.identity(None), tunable.versions(), console)


def tune(
    jobs: Sequence[Any], device: dict[str, Any], versions: dict[str, str], console: Any
) -> int:
    """Runs the jobs of a device with a progress bar, into its file; returns the exit status."""
    from lora_engine.kernels import tuned
    from lora_engine.tuning import search

    folder = tuned.folder()
    if folder is None:
        print("tune: this user has no home: name a folder in LORA_ENGINE_TUNED", file=sys.stderr)
        return 2
    path = folder / tuned.file_name(device)
    try:
        with search.alone(path):
            record = search.Record(path, device, versions)
            if record.refused:
                text = f"{path}: begun anew: {record.refused}"
                console.print(text, highlight=False, markup=False)
            record.save()  # what cannot be written is told before anything is measured
            return _run(jobs, record, console)
    except search.NoFile as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2


def _run(jobs: Sequence[Any], record: Any, console: Any) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from lora_engine.tuning import search

    new = 0
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task(
            record.content["device"]["name"], total=sum(len(job.candidates) + 1 for job in jobs)
        )

        def progress(job: search.Job, measured: bool) -> None:
            nonlocal new
            new += measured
            bar.update(task, advance=1, description=job.key, refresh=True)

        try:
            outcomes = search.run(jobs, record, progress)
        except (KeyboardInterrupt, search.DeviceLost) as stopped:
            bar.stop()
            lost = f"{stopped}: " if isinstance(stopped, search.DeviceLost) else ""
            print(
                f"stopped: {lost}{new} new measurements are kept in {record.path};"
                " the same command goes on from there",
                file=sys.stderr,
            )
            return 1 if lost else 130
    _report(outcomes, record.path, console)
    return 0


def _report(outcomes: Sequence[Any], path: Path, console: Any) -> None:
    from rich.table import Table

    from lora_engine.tuning.search import label

    table = Table("case", "heuristic, us", "tuned, us", "faster, p10", "choice", title=str(path))
    for found in outcomes:
        times = (f"{t:.2f}" if t else "-" for t in (found.heuristic_us, found.best_us))
        ratio = f"{found.ratio:.2f}x" if found.ratio else "-"
        table.add_row(found.key, *times, ratio, label(found.choice) if found.choice else "none")
    console.print(table)
    for found in outcomes:
        for candidate, problem in found.wrong.items():
            text = f"dropped: {found.key}: {candidate}: {problem}"
            console.print(text, highlight=False, markup=False)
