"""What the tests of the tuner share: trials whose times are made up, and the search over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_engine.tuning import search

DEVICE, VERSIONS = {"name": "one"}, {"lora_engine": "1"}


class Made:
    """A trial whose times and faults are given."""

    def __init__(self, times: dict[int, Any]) -> None:
        self.times, self.tried, self.timed = times, [], []

    def problem(self, choice: dict[str, int]) -> str:
        self.tried.append(choice["warps"])
        found = self.times[choice["warps"]]
        if isinstance(found, BaseException):
            raise found
        return found if isinstance(found, str) else ""

    def seconds(self, choice: dict[str, int]) -> float:
        self.timed.append(choice["warps"])
        return float(self.times[choice["warps"]])


def job(trial: Any, key: str = "k", case: str = "c") -> search.Job:
    return search.Job(key, case, tuple({"warps": w} for w in trial.times), lambda: trial)


def record(path: Path, device: Any = DEVICE, versions: Any = VERSIONS) -> search.Record:
    return search.Record(path / "t.json", device, versions)


def run(path: Path, *jobs: search.Job, **about: Any) -> list[search.Outcome]:
    return search.run(jobs, record(path, **about), lambda job, new: None)
