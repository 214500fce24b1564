"""``lora-engine bench --compare OLD.json``: what changed since a report, beyond the noise.

A time of another day says nothing on a shared machine, so a case is compared through its peers,
which were timed in turns with ours both times: change = ratio then / ratio now, above 1 where ours
became slower. Its noise is what the spreads of both ratios allow. A case without a peer is compared
through the byte floor, likewise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from bench.suite import SCHEMA, SCHEMA_VERSION

LOSS = 1.10
_MACHINE = ("cpu", "architecture", "cpus", "cache_bytes")


class Unusable(ValueError):
    """A file that nothing can be compared with; says why."""


class Change(NamedTuple):
    """factor: our time now over then, through peers. noise: factors within 1/noise..noise are
    none. lost: a loss of over 10 % that the noise does not explain."""

    case: str
    against: str
    factor: float
    noise: float

    @property
    def beyond_noise(self) -> bool:
        return not 1 / self.noise <= self.factor <= self.noise

    @property
    def lost(self) -> bool:
        return self.beyond_noise and self.factor > LOSS


def load(path: Path) -> dict[str, Any]:
    """A report's JSON; Unusable where it is none, or of another schema."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as why:
        raise Unusable(f"{path}: expected a report of lora-engine bench, got: {why}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise Unusable(f"{path}: expected the schema {SCHEMA!r}, got another file")
    if found.get("schema_version") != SCHEMA_VERSION:
        version = found.get("schema_version")
        raise Unusable(f"{path}: expected version {SCHEMA_VERSION} of the schema, got {version!r}")
    if not isinstance(found.get("rows"), list) or not isinstance(found.get("machine"), dict):
        raise Unusable(f"{path}: expected rows and a machine, got neither or one")
    for row in found["rows"]:
        if not isinstance(row, dict) or not _readable(row):
            raise Unusable(f"{path}: rows: expected those of a report, got {str(row)[:80]!r}")
    return found


def _readable(row: dict[str, Any]) -> bool:
    """Whether a row has what is compared."""
    if not isinstance(row.get("op"), str) or not isinstance(row.get("shape"), str):
        return False
    if "ours" not in row:
        return True
    try:
        clocks = [*_ratios(row).values()]
    except (KeyError, TypeError, ZeroDivisionError):
        return False
    numbers = [clock.get(key) for clock in clocks for key in ("median", "p10", "p90")]
    return all(isinstance(n, (int, float)) and n > 0 for n in numbers) and "noisy" in row


def check_machine(old: dict[str, Any], now: dict[str, Any]) -> None:
    """Unusable where the two were measured on other machines, or against other peers."""
    for key in _MACHINE:
        was, is_now = old["machine"].get(key), now["machine"].get(key)
        if was != is_now:
            raise Unusable(f"{key}: expected {is_now!r}, that of this machine, got {was!r}")
    for key in ("isa", "threads"):
        if old.get(key) != now.get(key):
            raise Unusable(f"{key}: expected {now.get(key)!r}, as now, got {old.get(key)!r}")
    for name, version in now["peers"].items():  # they are the clocks
        was = old.get("peers", {}).get(name, version)
        if was != version and not any(v.startswith("absent") for v in (was, version)):
            raise Unusable(f"{name}: expected {version}, as now, got {was}")


def _ratios(row: dict[str, Any]) -> dict[str, Any]:
    """What each clock says of a row: how many times our time it takes."""
    found = {p["name"]: p["ratio"] for p in row["peers"] if "ratio" in p}
    if not found:  # where the aim is milliseconds more than a peer
        found = {
            p["name"]: {
                "median": p["median_us"] / row["ours"]["median_us"],
                "p10": p["p10_us"] / row["ours"]["p90_us"],
                "p90": p["p90_us"] / row["ours"]["p10_us"],
            }
            for p in row["peers"] if "extra_ms" in p
        }  # fmt: skip
    if not found and row["floor"]:
        a = row["floor"]["achieved_over_floor"]
        found["bytes over bandwidth"] = {
            "median": 1 / a["median"], "p10": 1 / a["p90"], "p90": 1 / a["p10"],
        }  # fmt: skip
    return found


def changes(
    old: dict[str, Any], now: dict[str, Any], whole: bool = True
) -> tuple[list[Change], list[str]]:
    """(one change a case, by the clock with the least noise; what could not be compared).

    whole: nothing was left out now, so that a case of the file that is not there is missing."""
    before = {(row["op"], row["shape"]): row for row in old["rows"]}
    found, left = [], []
    for row in now["rows"]:
        case, was = f"{row['op']}, {row['shape']}", before.pop((row["op"], row["shape"]), None)
        if "ours" not in row or was is None or "ours" not in was:
            left.append(f"{case}: {'not measured now' if 'ours' not in row else 'not in the file'}")
            continue
        if row["noisy"] or was["noisy"]:
            when = "now" if row["noisy"] else "in the file"
            left.append(f"{case}: noisy {when}")
            continue
        clocks = []
        then = _ratios(was)
        for name, ratio in _ratios(row).items():
            if name in then:
                spread = [r["p90"] / r["p10"] for r in (ratio, then[name])]
                noise = max(spread[0], spread[1]) ** 0.5
                clocks.append(Change(case, name, then[name]["median"] / ratio["median"], noise))
        if clocks:
            found.append(min(clocks, key=lambda change: change.noise))
        else:
            left.append(f"{case}: no peer was measured both times")
    left += [f"{op}, {shape}: not measured now" for op, shape in before if whole]
    return found, left


def lines(found: list[Change], left: list[str]) -> list[str]:
    """The comparison in words, worst first."""
    text = []
    beyond = sorted((c for c in found if c.beyond_noise), key=lambda c: -c.factor)
    for c in beyond:
        what = "LOST" if c.lost else "slower" if c.factor > 1 else "faster"
        text.append(
            f"{what}: {c.case}: takes {c.factor:.2f} times what it took, against {c.against}"
            f" (noise: {1 / c.noise:.2f} to {c.noise:.2f})"
        )
    text.append(f"{len(found) - len(beyond)} of {len(found)} cases changed less than the noise")
    return text + [f"not compared: {why}" for why in left]
