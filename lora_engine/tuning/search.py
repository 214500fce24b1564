"""The search: every candidate is checked, then timed, and kept on disk before the next.

What is tried and how it is timed is given: nothing here knows a device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from lora_engine import atomic
from lora_engine.kernels import tuned

MARGIN = 0.98  # of the heuristic's time: what is not faster than by this is noise


class DeviceLost(RuntimeError):
    """The device takes no more work from this process; the same command goes on in another."""


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
    """What came of a case: microseconds of the heuristic and of the choice, None where wrong."""

    key: str
    choice: dict[str, int] | None
    heuristic_us: float | None
    best_us: float | None
    wrong: dict[str, str]  # candidate: what was wrong


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
        """By candidate: {"us": microseconds} or {"problem": words}."""
        found: dict[str, dict[str, Any]] = self.content["measured"].setdefault(case, {})
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(self.content, indent=1) + "\n").encode()

        def write(file: BinaryIO) -> None:
            file.write(data)

        atomic.replace_file(self.path, write)


def _is_result(value: Any) -> bool:
    return isinstance(value, dict) and (
        isinstance(value.get("us"), float) or isinstance(value.get("problem"), str)
    )


def _is_case(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_result, value.values()))


def label(choice: dict[str, int]) -> str:
    """A candidate as the file names it."""
    return " ".join(f"{name}={value}" for name, value in choice.items())


def _tried(trial: Trial, choice: dict[str, int]) -> dict[str, Any]:
    """Checked, and timed where it is right."""
    try:
        problem = trial.problem(choice)
        return {"problem": problem} if problem else {"us": trial.seconds(choice) * 1e6}
    except DeviceLost:
        raise
    except Exception as error:  # a compiler's, a driver's: of any class
        words = str(error).strip().splitlines() or [""]
        return {"problem": f"{type(error).__name__}: {words[-1]}"[:400]}


def _judged(job: Job, measured: dict[str, dict[str, Any]]) -> Outcome:
    found = [measured[label(c)] for c in job.candidates]
    times = [result.get("us", float("inf")) for result in found]
    tried = zip(job.candidates, found, strict=True)
    wrong = {label(c): result["problem"] for c, result in tried if "problem" in result}
    if len(wrong) == len(found):
        return Outcome(job.key, None, None, None, wrong)
    best = times.index(min(times))
    if times[best] > MARGIN * times[0]:
        best = 0
    return Outcome(job.key, job.candidates[best], found[0].get("us"), times[best], wrong)


def run(
    jobs: Iterable[Job], record: Record, progress: Callable[[Job, bool], None]
) -> list[Outcome]:
    """Goes through the jobs, past what is measured already.

    progress(job, new): called after each candidate; new: whether it was measured now. Raises
    DeviceLost; whatever is raised, what was measured is kept.
    """
    outcomes = []
    for job in jobs:
        measured = record.measured(job.case)
        trial = None
        for choice in job.candidates:
            new = label(choice) not in measured
            if new:
                trial = trial or job.make()
                try:
                    measured[label(choice)] = _tried(trial, choice)
                except DeviceLost as lost:
                    measured[label(choice)] = {"problem": str(lost)[:400]}
                    record.save()
                    raise
                record.save()
            progress(job, new)
        outcome = _judged(job, measured)
        if outcome.choice is not None:
            record.content["choices"][job.key] = outcome.choice
        else:
            record.content["choices"].pop(job.key, None)
        record.save()
        outcomes.append(outcome)
    return outcomes
