"""The search: every candidate is checked, then timed, and kept on disk before the next.

The quickest of many is quickest by luck, too, so it must then beat the heuristic turn by turn.
What is tried and how it is timed is given: nothing here knows a device.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any, BinaryIO, NamedTuple, Protocol

from lora_engine import atomic
from lora_engine.kernels import tuned

MARGIN = 1.02  # how many times a choice's time the heuristic must take
PAIRS = 21  # of a comparison: were it a coin's throw, one in 9000 would be kept


class DeviceLost(RuntimeError):
    """The device takes no more work from this process; the same command goes on in another."""


class NoFile(RuntimeError):
    """The file cannot be had: another tune has it, or it cannot be written."""


class Unmade(RuntimeError):
    """A case's data could not be had; another run may have the memory for them."""


class Trial(Protocol):
    """One case with its data, ready to run."""

    def problem(self, choice: dict[str, int]) -> str:
        """What is wrong with a candidate; "" if nothing is."""

    def seconds(self, choice: dict[str, int]) -> float:
        """How long a call takes."""


class Job(NamedTuple):
    """A case. key: its entry in the file. case: what was measured, for resuming: the key, and
    what else the data depended on. candidates: the heuristic's choice first."""

    key: str
    case: str
    candidates: tuple[dict[str, int], ...]
    make: Callable[[], Trial]


class Outcome(NamedTuple):
    """What came of a case: microseconds of the heuristic and of the choice, None where wrong.

    ratio: how many times the choice's time the heuristic took, in nine of ten pairs or more;
    None where the choice is the heuristic's or that is wrong. wrong: by candidate, or for the
    case's data, why.
    """

    key: str
    choice: dict[str, int] | None
    heuristic_us: float | None
    best_us: float | None
    ratio: float | None
    wrong: dict[str, str]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the lock beside a file: two that each rewrite it whole would lose one's work. A
    kill releases it; the empty lock file stays. Raises NoFile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise NoFile(f"{path}: cannot be written: {error}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NoFile(f"{path}: another tune is running on this file") from None
        yield
    finally:
        os.close(lock)


class Record:
    """The file of one device: choices, and all that was measured. Each change is on disk, whole,
    when the call that made it returns."""

    def __init__(self, path: Path, device: dict[str, Any], versions: dict[str, str]) -> None:
        self.path, self.refused = path, ""
        self.content: dict[str, Any] = {
            "format": tuned.FORMAT, "device": device, "versions": versions,
            "choices": {}, "measured": {},
        }  # fmt: skip
        try:
            content = tuned.read(path)
            tuned.check(content, device, versions)
            measured = content.get("measured")
            if not isinstance(measured, dict) or not all(map(_is_case, measured.values())):
                raise tuned.Refused("measured: expected what was measured, case by case")
            self.content = content
        except FileNotFoundError:
            pass
        except tuned.Refused as why:
            self.refused = str(why)

    def measured(self, case: str) -> dict[str, dict[str, Any]]:
        """By candidate: {"us": microseconds} or {"problem": words}; "ratio": Outcome's."""
        found: dict[str, dict[str, Any]] = self.content["measured"].setdefault(case, {})
        return found

    def save(self) -> None:
        """Raises NoFile."""
        data = (json.dumps(self.content, indent=1) + "\n").encode()

        def write(file: BinaryIO) -> None:
            file.write(data)

        try:
            atomic.replace_file(self.path, write)
        except OSError as error:
            raise NoFile(f"{self.path}: cannot be written: {error}") from None


def _is_result(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("ratio", 0.0), float):
        return False
    return isinstance(value.get("us"), float) or isinstance(value.get("problem"), str)


def _is_case(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_result, value.values()))


def label(choice: dict[str, int]) -> str:
    """A candidate as the file names it."""
    return " ".join(f"{name}={value}" for name, value in choice.items())


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:400]


def _tried(trial: Trial, choice: dict[str, int]) -> dict[str, Any]:
    """Checked, and timed where it is right."""
    try:
        problem = trial.problem(choice)
        return {"problem": problem} if problem else {"us": trial.seconds(choice) * 1e6}
    except DeviceLost:
        raise
    except Exception as error:  # a compiler's, a driver's: of any class
        return {"problem": _words(error)}


def _compared(trial: Trial, first: dict[str, int], choice: dict[str, int]) -> dict[str, Any]:
    """How many times the choice's time the first takes, in nine of ten pairs or more: in turns,
    A B B A, so that what others do on the machine meets both."""
    pair, ratios = [first, choice], []
    try:
        for _ in range(PAIRS):
            took = {label(c): trial.seconds(c) for c in pair}
            ratios.append(took[label(first)] / took[label(choice)])
            pair.reverse()
    except DeviceLost:
        raise
    except Exception as error:
        return {"problem": _words(error)}
    return {"ratio": quantiles(ratios, n=10, method="inclusive")[0]}


def _quickest(job: Job, measured: dict[str, dict[str, Any]]) -> dict[str, int] | None:
    """Of those that are right, by the time that each took by itself."""
    right = [c for c in job.candidates if "us" in measured[label(c)]]
    return min(right, key=lambda c: float(measured[label(c)]["us"]), default=None)


def _judged(job: Job, measured: dict[str, dict[str, Any]]) -> Outcome:
    found = {label(c): measured[label(c)] for c in job.candidates}
    wrong = {name: result["problem"] for name, result in found.items() if "problem" in result}
    first, choice = job.candidates[0], _quickest(job, measured)
    if choice is None:
        return Outcome(job.key, None, None, None, None, wrong)
    ratio = found[label(choice)].get("ratio")
    if ratio is not None and not ratio > MARGIN:
        choice, ratio = first, None
    times = found[label(first)].get("us"), found[label(choice)]["us"]
    return Outcome(job.key, choice, *times, ratio, wrong)


class _Search:
    """One case: what was measured of it, and a trial once one is needed."""

    def __init__(self, job: Job, record: Record) -> None:
        self.job, self.record = job, record
        self.measured = record.measured(job.case)
        self._trial: Trial | None = None

    def _measure(self, choice: dict[str, int], work: Callable[[Trial], dict[str, Any]]) -> None:
        """Keeps what comes of it, on disk. Raises Unmade, DeviceLost."""
        name = label(choice)
        try:
            self._trial = self._trial or self._made()
            result = work(self._trial)
        except DeviceLost as lost:
            self.measured[name] = {"problem": str(lost)[:400]}
            self.record.save()
            raise
        if "problem" in result:
            self.measured[name] = result
        else:
            self.measured.setdefault(name, {}).update(result)
        self.record.save()

    def _made(self) -> Trial:
        try:
            return self.job.make()
        except DeviceLost:
            raise
        except Exception as error:  # memory, above all
            raise Unmade(_words(error)) from None

    def candidate(self, choice: dict[str, int]) -> bool:
        """Whether it was measured now."""
        if label(choice) in self.measured:
            return False
        self._measure(choice, partial(_tried, choice=choice))
        return True

    def comparison(self) -> bool:
        """Of the quickest with the heuristic, where both are right; whether it was made now."""
        new, first = False, self.job.candidates[0]
        while "us" in self.measured[label(first)]:
            best = _quickest(self.job, self.measured)
            if best is None or best == first or "ratio" in self.measured[label(best)]:
                break
            self._measure(best, partial(_compared, first=first, choice=best))
            new = True
        return new


def run(
    jobs: Iterable[Job], record: Record, progress: Callable[[Job, bool], None]
) -> list[Outcome]:
    """Goes through the jobs, past what is measured already.

    progress(job, new): called after each candidate and after the comparison; new: whether it
    was measured now. Raises DeviceLost; whatever is raised, what was measured is kept.
    """
    outcomes = []
    for job in jobs:
        search = _Search(job, record)
        try:
            for choice in job.candidates:
                progress(job, search.candidate(choice))
            progress(job, search.comparison())
        except Unmade as why:
            outcomes.append(Outcome(job.key, None, None, None, None, {"data": str(why)}))
            continue
        outcome = _judged(job, search.measured)
        if outcome.choice is not None:
            record.content["choices"][job.key] = outcome.choice
        else:
            record.content["choices"].pop(job.key, None)
        record.save()
        outcomes.append(outcome)
    return outcomes
