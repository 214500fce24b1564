"""``lora-engine bench`` (``python -m bench.command``): measures, and writes a report to look at."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench import compare, environment, formats, suite
from lora_engine import atomic

OUT = Path("bench_report")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", default=[], help="only ops whose name holds this")
    parser.add_argument("--shape", action="append", default=[], help="only shapes that hold this")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="few rounds: a first look")
    how.add_argument("--full", action="store_true", help="many rounds and rare latencies: an hour")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the report ({OUT})")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.json",
        help="exit 1 where a case became over 10 %% slower than in this report of this machine",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measures and writes; 1 where an output was wrong or a case has lost, 2 for bad arguments."""
    out = Console(highlight=False)
    try:
        chosen = suite.select(args.op, args.shape)
        old = _comparable(args.compare, args.out) if args.compare else None
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # now, not after all is measured
        print(error, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what there is is kept
    effort = suite.QUICK if args.quick else suite.FULL if args.full else suite.NORMAL
    report = _measure(chosen, effort)
    for file in write(report, args.out):
        out.print(f"written: {file}", soft_wrap=True)
    measured = report["rows"] + report["growth"] + report["variants"]
    wrong = [r for r in measured if "wrong" in r]
    for row in wrong:
        out.print(f"FAILED: {row['wrong']}", soft_wrap=True)
    status = _compared(old, report, chosen.whole, out) if old is not None else 0
    if report["stopped"]:
        print("stopped: the report holds what was measured", file=sys.stderr)
        return 130
    return 1 if wrong else status


def _measure(chosen: suite.Selection, effort: suite.Effort) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}", table_column=None), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("bandwidths", total=suite.steps(chosen, effort))

        def step(done: str) -> None:
            progress.update(bar, advance=1, description=done[:48])
            if not progress.console.is_terminal:  # where there is no bar: a line
                task = progress.tasks[bar]
                progress.console.print(f"{task.completed:.0f}/{task.total:.0f} {done}")

        return suite.measure(chosen, effort, step)


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """The files of a report, each replaced whole: JSON, pytest-benchmark's JSON, CSV, HTML."""
    from bench import page

    folder.mkdir(parents=True, exist_ok=True)
    benchmarks = formats.as_pytest_benchmark(report)
    texts = {
        "report.json": json.dumps(report, indent=1) + "\n",
        "pytest-benchmark.json": json.dumps(benchmarks, indent=1) + "\n",
        "report.csv": formats.as_csv(report),
        "report.html": page.render(report),
    }
    for name, text in texts.items():
        _replace(folder / name, text)
    return [folder / name for name in texts]


def _replace(file: Path, text: str) -> None:
    def write_text(to: BinaryIO) -> None:
        to.write(text.encode())

    atomic.replace_file(file, write_text)


def _comparable(file: Path, out: Path) -> dict[str, Any]:
    """The report to compare with; raises ValueError where that cannot be, before it is tried."""
    if file.resolve() == (out / "report.json").resolve():
        raise ValueError(f"--compare: expected another file than --out writes, got {file}")
    old = compare.load(file)
    environment.one_thread_count()
    compare.check_machine(old, environment.describe() | {"peers": suite.peers()})
    return old


def _compared(old: dict[str, Any], report: dict[str, Any], whole: bool, out: Console) -> int:
    found, left = compare.changes(old, report, whole)
    for line in compare.lines(found, left):
        out.print(line, soft_wrap=True)
    return 1 if any(change.lost for change in found) else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lora-engine bench", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
