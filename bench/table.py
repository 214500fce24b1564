"""python -m bench.table: the speed table, paired and interleaved, as markdown and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import environment, latency
from bench.case import OURS, Case, Contender
from bench.cases import CASES
from bench.machine import Kernel, Machine, Place, honest_floor, place_of
from bench.paired import BUDGET_SECONDS, Times, paired, ratio, spread

RESULTS = Path(__file__).parent / "results"
HEAD = (
    "op and shape", "ours (median us)", "bytes, floor us, achieved/floor",
    "peer (median us)", "ratio median [p10-p90]", "wanted",
)  # fmt: skip


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _times(times: Times, name: str) -> dict[str, Any]:
    rounds = times[name]
    s = spread(rounds)
    return {
        "median_us": _us(s.median),
        "p10_us": _us(s.p10),
        "p90_us": _us(s.p90),
        "best_us": _us(float(rounds.min())),
        "worst_us": _us(float(rounds.max())),
        "mean_us": _us(float(rounds.mean())),
        "stddev_us": _us(float(rounds.std())),
    }


def _floor(
    case: Case, machine: Machine, place: Place, probes: Sequence[Kernel], times: Times
) -> dict[str, Any]:
    """The byte floor and how far above it we are: within each round, with the rates of
    the round's probes; and our best block over the floor by the best rates of the run."""
    traffic = case.traffic
    assert traffic
    read, update = machine.rates(place, probes, times)
    floors = traffic.read / read + traffic.changed / update
    achieved = spread(times[OURS] / floors)
    quickest = float(times[OURS].min())
    floor, note = honest_floor(machine.seen[place].floor_s(traffic), quickest)
    return {
        "bytes": traffic.total,
        "place": place.label,
        "read_gb_s": round(float(np.median(read)) / 1e9, 1),
        "update_gb_s": round(float(np.median(update)) / 1e9, 1),
        "floor_us": _us(float(np.median(floors))),
        "achieved_over_floor": achieved._asdict(),
        "best_floor_us": _us(floor),
        "best_over_floor": round(quickest / floor, 3),
        "within": case.within,
        "met": None if case.within is None else achieved.median <= case.within,
        "note": note,
    }


def _peer(case: Case, contender: Contender, times: Times) -> dict[str, Any]:
    name = contender.name
    if contender.absent:
        wanted = case.faster.get(name)
        return {"name": name, "absent": contender.absent, "wanted": wanted}
    result = {"name": name, "spelling": contender.spelling, **_times(times, name)}
    if name in case.extra_ms:
        extra = spread(1e3 * (times[OURS] - times[name]))
        most = case.extra_ms[name]
        result |= {"extra_ms": extra._asdict(), "wanted_extra_ms": most}
        return result | {"met": extra.median <= most}
    faster = ratio(times, name, OURS)
    wanted = case.faster[name]
    met = None if wanted is None else faster.median >= wanted
    of_best = float(times[name].min() / times[OURS].min())
    ratios = faster._asdict() | {"of_best_blocks": of_best}
    return result | {"ratio": ratios, "wanted": wanted, "met": met}


def measure(
    case: Case,
    machine: Machine,
    threads: int,
    rounds: int,
    budget: float = BUDGET_SECONDS,
    single_calls: float = 0.0,
) -> dict[str, Any]:
    """One row: everything checked, then timed, and for so many seconds our single calls.

    Raises AssertionError where wrong.
    """
    row: dict[str, Any] = {"op": case.op, "shape": case.shape}
    try:
        contenders = case.build()
    except ModuleNotFoundError as missing:
        return row | {"absent": str(missing), "peers": []}
    present = [c for c in contenders if not c.absent]
    for c in present:
        c.verify()
    place = case.traffic and place_of(case.traffic.footprint, case.traffic.threads or threads)
    probes = machine.observe(place) if place else []
    timing = paired(present + [kernel.contender for kernel in probes], rounds, budget)
    times = timing.times
    if single_calls:
        row["latency"] = latency.describe(latency.sample(present[0], single_calls))
    return row | {
        "rounds": {"kept": len(times[OURS]), "taken": timing.taken},
        "waited_for_cpu": round(timing.waited, 3),
        "noisy": timing.noisy,
        "ours": _times(times, OURS),
        "floor": _floor(case, machine, place, probes, times) if place else {},
        "peers": [_peer(case, c, times) for c in contenders[1:]],
    }


def _verdict(wanted: str, met: bool, noisy: bool) -> str:
    return f"{wanted}: {'not judged' if noisy else 'met' if met else 'MISSED'}"


def _floor_cells(row: dict[str, Any]) -> tuple[str, str]:
    f = row["floor"]
    if not f:
        return "", ""
    text = f"{f['bytes'] / 1e6:.3g} MB ({f['place']}), {f['floor_us']:.3g} us,"
    a = f["achieved_over_floor"]
    text += f" {a['median']:.2f} [{a['p10']:.2f}-{a['p90']:.2f}] (best {f['best_over_floor']:.2f})"
    text += " *" if f["note"] else ""
    return text, _verdict(f"floor x {f['within']}", f["met"], row["noisy"]) if f["within"] else ""


def _peer_cells(peer: dict[str, Any], noisy: bool) -> tuple[str, str, str]:
    if "absent" in peer:
        return f"{peer['name']}: absent, {peer['absent']}", "", ""
    name = f"{peer['name']}: {peer['median_us']:.4g}"
    if "extra_ms" in peer:
        e = peer["extra_ms"]
        text = f"{e['median']:+.1f} ms [{e['p10']:+.1f} to {e['p90']:+.1f}]"
        return name, text, _verdict(f"+{peer['wanted_extra_ms']:g} ms", peer["met"], noisy)
    r = peer["ratio"]
    text = f"{r['median']:.2f}x [{r['p10']:.2f}-{r['p90']:.2f}]"
    if not peer["wanted"]:
        return name, text, "-"
    return name, text, _verdict(f"{peer['wanted']:g}x", peer["met"], noisy)


def lines(row: dict[str, Any]) -> Iterable[str]:
    """A row of the table: a line for each peer."""
    title = f"{row['op']}, {row['shape']}" + (" (noisy)" if row.get("noisy") else "")
    for failed in ("wrong", "absent"):
        if failed in row:
            yield f"| {title} | {failed}: {row[failed]} | | | | |"
            return
    floor, of_floor = _floor_cells(row)
    ours = f"{row['ours']['median_us']:.4g}"
    peers = [_peer_cells(p, row["noisy"]) for p in row["peers"]] or [("", "", "")]
    for name, text, wanted in peers:
        both = "; ".join(filter(None, (wanted, of_floor)))
        yield f"| {title} | {ours} | {floor} | {name} | {text} | {both} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file (default: in bench/results)")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=61, help="rounds of paired blocks")
    return parser.parse_args()


def main() -> int:
    args = _arguments()
    threads = environment.one_thread_count()
    result = environment.describe()
    machine = Machine()
    machine.levels(threads)
    head = (f"{result['machine']['cpu']}", result["isa"], f"{threads} threads", result["date"])
    if result["extension"]["stale"]:
        print(f"csrc is newer than {result['extension']['file']}: rebuild it", file=sys.stderr)
    print(", ".join(head), "", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}", sep="\n")
    rows = []
    for case in CASES:
        if args.only not in case.name:
            continue
        try:
            row = measure(case, machine, threads, args.rounds)
        except AssertionError as wrong:
            row = {"op": case.op, "shape": case.shape, "wrong": str(wrong)}
        rows.append(row)
        print(*lines(row), sep="\n", flush=True)
    print()
    for row in rows:
        if note := row.get("floor", {}).get("note"):
            print(f"\\* {row['op']}, {row['shape']}: {note}.")
    for b in machine.report():
        line = f"{b['level']}, {b['threads']} thr: read {b['read_gb_s']} GB/s ({b['read_kernel']})"
        if b["update_gb_s"]:
            line += f", update {b['update_gb_s']} GB/s ({b['update_kernel']})"
        print(line)
    result |= {"bandwidth": machine.report(), "rows": rows}
    out = args.out or RESULTS / f"table-{result['isa']}-{result['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten to {out}")
    return 1 if any("wrong" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
