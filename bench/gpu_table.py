"""What the GPU suite's JSON says: targets judged, the printed table, the README's table.

``python -m bench.gpu_table FILE`` prints the README's from a result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.case import OURS
from bench.gpu_case import Case

GRAPHS = "a captured graph replays any batch, hot updates between replays, two streams"
GRAPH_TESTS = "test_triton_graph"


VERDICTS = {True: "met", False: "MISSED", None: "not judged"}


class Target(NamedTuple):
    """One promise of the design. met: None where it could not be judged, and why in got."""

    case: str
    claim: str
    got: str
    met: bool | None


def judge(case: Case, row: Mapping[str, Any], copy_gb_s: float) -> list[Target]:
    """The targets of a case against its row."""
    measured, targets = row["status"] == "measured", []
    ratios = row.get("ratios", {})

    def target(claim: str, got: float | None, limit: float, unit: str, most: bool) -> None:
        if not measured or got is None:
            why = row.get("why") or "not measured"
            targets.append(Target(case.name, claim, why, None))
        else:
            met = got <= limit if most else got >= limit
            targets.append(Target(case.name, claim, f"{got:.3g}{unit}", met))

    if case.launches is not None:
        claim = f"at most {case.launches} launches"
        target(claim, row.get("launches"), case.launches, " launches", True)
    if case.within is not None:
        over = row.get("achieved_over_floor")
        target(f"within {case.within:g}x of the floor", over, case.within, "x", True)
    for peer, wanted in case.faster.items():
        got = ratios.get(peer, {}).get("median")
        if measured and got is None:
            state = row["contenders"].get(peer, {})
            why = f"{peer}: {state.get('why', 'not measured')}"
            targets.append(Target(case.name, f"{wanted:g}x of {peer}'s speed", why, None))
        else:
            target(f"{wanted:g}x of {peer}'s speed", got, wanted, "x", False)
    if case.of_copy is not None:
        part = row["gb_s"] / copy_gb_s if measured else None
        target(f"{case.of_copy:.0%} of the copy's bandwidth", part, case.of_copy, "", False)
    return targets


def graph_target(tests: Mapping[str, Mapping[str, Any]]) -> Target:
    """The claim about graphs, from its tests."""
    found = tests.get(GRAPH_TESTS, {})
    status = found.get("status", "not run")
    met = {"green": True, "red": False}.get(status)
    return Target("CUDA graphs", GRAPHS, f"{GRAPH_TESTS}: {status}", met)


HEAD = (
    "op and shape", "ours, us [p10-p90]", "MB", "floor, us", "achieved/floor", "expected, us",
    "peers: times ours [p10-p90]",
)  # fmt: skip


def _peer(name: str, row: Mapping[str, Any]) -> str:
    state = row["contenders"][name]
    if "median" not in state:
        return f"{name}: {state['status']}, {state['why']}"
    r = row["ratios"][name]
    return f"{name} {r['median']:.2f}x [{r['p10']:.2f}-{r['p90']:.2f}]"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    title = f"{row['op']}, {row['shape']}"
    if row["status"] != "measured":
        return (title, f"{row['status']}: {row['why']}", "", "", "", "", "")
    ours = row["contenders"][OURS]
    peers = "; ".join(_peer(name, row) for name in row["contenders"] if name != OURS)
    note = f" ({row['note']})" if row.get("note") else ""
    return (
        title + note,
        f"{ours['median']:.1f} [{ours['p10']:.1f}-{ours['p90']:.1f}]",
        f"{row['bytes'] / 1e6:.3g}",
        f"{row['floor_us']:.1f}",
        f"{row['achieved_over_floor']:.2f}",
        "" if row["expected_us"] is None else f"{row['expected_us']:g}",
        peers,
    )


def markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """The whole result: rows, then targets."""
    yield f"| {' | '.join(HEAD)} |"
    yield "|" + "---|" * len(HEAD)
    for row in result["rows"]:
        yield f"| {' | '.join(cells(row))} |"
    yield ""
    for target in result["targets"]:
        verdict = VERDICTS[target["met"]]
        yield f"- {verdict}: {target['case']}: {target['claim']} ({target['got']})"


def readme(result: Mapping[str, Any]) -> Iterator[str]:
    """The README's table: what was measured, and where; what was not is said."""
    gpu, probes, versions = result["gpu"], result["probes"], result["versions"]
    yield (
        f"Measured by `make gpu` on one {gpu['name']} (driver {gpu['driver']}), torch"
        f" {versions['torch']}, Triton {versions['triton']}, Python {versions['python']}, at"
        f" {result['git_revision'][:12] or 'an unnamed revision'}, {result['date'][:10]}: medians"
        f" of CUDA-graph replays over more than 100 MB of inputs. A copy moves"
        f" {probes['copy_gb_s']:.0f} GB/s and an empty kernel takes"
        f" {probes['empty_kernel_us']:.1f} us there. Bold: a target missed."
    )
    yield ""
    yield "| op and shape | ours, us | achieved/floor | times ours |"
    yield "|---|---|---|---|"
    missed = {t["case"] for t in result["targets"] if t["met"] is False}
    for row in result["rows"]:
        if row["status"] != "measured":
            continue
        title, ours, _, _, over, _, peers = cells(row)
        bold = "**" if f"{row['op']}, {row['shape']}" in missed else ""
        yield f"| {bold}{title}{bold} | {ours} | {over} | {peers} |"
    others = [row for row in result["rows"] if row["status"] != "measured"]
    if others:
        yield ""
        listed = "; ".join(f"{r['op']}, {r['shape']} ({r['status']})" for r in others)
        yield f"Not measured: {listed}."


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m bench.gpu_table RESULT.json", file=sys.stderr)
        return 2
    print(*readme(json.loads(Path(sys.argv[1]).read_text())), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
