"""A report as pytest-benchmark's JSON, which its ``compare`` reads, and as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from bench.case import OURS

COLUMNS = (
    "op", "shape", "contender", "status", "median_us", "p10_us", "p90_us", "ratio", "ratio_p10",
    "ratio_p90", "wanted", "met", "bytes", "floor_us", "achieved_over_floor",
)  # fmt: skip


def as_csv(report: dict[str, Any]) -> str:
    """A line for each contender of each row."""
    text = io.StringIO()
    out = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    out.writeheader()
    for row in report["rows"]:
        head = {"op": row["op"], "shape": row["shape"]}
        why = next((f"{key}: {row[key]}" for key in ("wrong", "absent") if key in row), "")
        if why:
            out.writerow(head | {"contender": OURS, "status": why})
            continue
        floor = row["floor"]
        ours = head | {"contender": OURS, "status": "noisy" if row["noisy"] else "measured"}
        ours |= _times(row["ours"])
        if floor:
            ours |= {"bytes": floor["bytes"], "floor_us": floor["floor_us"]}
            ours |= {"achieved_over_floor": round(floor["achieved_over_floor"]["median"], 3)}
            ours |= {"wanted": floor["within"], "met": floor["met"]}
        out.writerow(ours)
        for peer in row["peers"]:
            line = head | {"contender": peer["name"]}
            if "absent" in peer:
                out.writerow(line | {"status": f"absent: {peer['absent']}"})
                continue
            line |= {"status": "measured"} | _times(peer)
            if "ratio" in peer:
                ratio = peer["ratio"]
                line |= {"ratio": round(ratio["median"], 3), "ratio_p10": round(ratio["p10"], 3)}
                line |= {"ratio_p90": round(ratio["p90"], 3), "wanted": peer["wanted"]}
            out.writerow(line | {"met": peer["met"]})
    return text.getvalue()


def _times(times: dict[str, Any]) -> dict[str, Any]:
    return {key: times[key] for key in ("median_us", "p10_us", "p90_us")}


def as_pytest_benchmark(report: dict[str, Any]) -> dict[str, Any]:
    """The report's timed contenders in the schema of pytest-benchmark's storage.

    Its rounds are the paired blocks that were kept; q1 and q3 are the 10th and 90th percentile.
    """
    return {
        "machine_info": {
            "node": report["machine"]["cpu"],
            "machine": report["machine"]["architecture"],
            "system": report["machine"]["system"],
            "python_version": report["versions"]["python"],
            "cpu": {"brand_raw": report["machine"]["cpu"], "count": report["machine"]["cpus"]},
        },
        "commit_info": {"id": report["git_revision"], "dirty": report["git_dirty"]},
        "benchmarks": [
            _benchmark(row, name, times)
            for row in report["rows"]
            if "ours" in row
            for name, times in [
                (OURS, row["ours"]),
                *((p["name"], p) for p in row["peers"] if "absent" not in p),
            ]
        ],
        "datetime": report["date"],
        "version": report["versions"]["pytest-benchmark"],
        "lora_engine": {key: report[key] for key in ("isa", "threads", "versions", "peers")},
    }


def _benchmark(row: dict[str, Any], name: str, times: dict[str, Any]) -> dict[str, Any]:
    case = f"{row['op']}, {row['shape']}"
    of = {key[:-3]: value / 1e6 for key, value in times.items() if key.endswith("_us")}
    rounds = row["rounds"]["kept"]
    stats = {
        "min": of["best"], "max": of["worst"], "mean": of["mean"], "median": of["median"],
        "stddev": of["stddev"], "q1": of["p10"], "q3": of["p90"], "iqr": of["p90"] - of["p10"],
        "iqr_outliers": 0, "stddev_outliers": 0, "outliers": "0;0", "ld15iqr": of["p10"],
        "hd15iqr": of["p90"], "ops": 1 / of["mean"], "rounds": rounds, "iterations": 1,
        "total": of["mean"] * rounds,
    }  # fmt: skip
    return {
        "group": case,
        "name": name,
        "fullname": f"{case}: {name}",
        "params": None,
        "param": None,
        "extra_info": {"achieved_over_floor": row["floor"].get("achieved_over_floor")}
        if name == OURS
        else {"spelling": times["spelling"]},
        "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": 1},
        "stats": stats,
    }
