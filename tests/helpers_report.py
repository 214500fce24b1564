"""A report of bench.suite's schema with made-up times: tests time nothing."""

from __future__ import annotations

from typing import Any


def times(us: float) -> dict[str, Any]:
    """Blocks of about so many microseconds."""
    return {
        "median_us": us, "p10_us": 0.9 * us, "p90_us": 1.2 * us, "best_us": 0.85 * us,
        "worst_us": 1.5 * us, "mean_us": 1.02 * us, "stddev_us": 0.1 * us,
    }  # fmt: skip


def peer(name: str, us: float, ratio: float, wanted: float | None = None) -> dict[str, Any]:
    spread = {"median": ratio, "p10": 0.95 * ratio, "p90": 1.05 * ratio, "of_best_blocks": ratio}
    met = None if wanted is None else ratio >= wanted
    line = {"name": name, "spelling": "as written", "ratio": spread, "wanted": wanted, "met": met}
    return line | times(us)


def row(op: str, us: float, *peers: dict[str, Any], within: float | None = None) -> dict[str, Any]:
    over = {"median": 1.4, "p10": 1.3, "p90": 1.6}
    return {
        "op": op, "shape": "4096, r=2", "flops": 32768.0, "rounds": {"kept": 31, "taken": 33},
        "waited_for_cpu": 0.01, "noisy": False, "ours": times(us), "peers": list(peers),
        "floor": {
            "bytes": 98304, "place": "L2, 1 thread", "read_gb_s": 80.0, "update_gb_s": 90.0,
            "floor_us": us / 1.4, "achieved_over_floor": over, "best_floor_us": us / 1.5,
            "best_over_floor": 1.3, "within": within, "met": within and within >= 1.4, "note": "",
        },
        "latency": {
            "calls": 5000, "max_us": 40 * us, "p50_us": us, "p90_us": 1.2 * us, "p99_us": 3 * us,
            "p99.9_us": None,
            "histogram": {"edges_us": [us, 2 * us, 4 * us, 40 * us], "counts": [4900, 90, 10]},
        },
    }  # fmt: skip


def report() -> dict[str, Any]:
    """Rows of every kind: met, missed, for information, absent, wrong, by milliseconds."""
    from bench import suite

    late = {"name": "import numpy", "spelling": "", "wanted_extra_ms": 50.0, "met": True}
    late |= {"extra_ms": {"median": 30.0, "p10": 25.0, "p90": 35.0}} | times(9e4)
    none: dict[str, Any] = {"flops": 0.0, "peers": []}
    points = [
        {"op": op, "axis": axis, "value": value, "median_us": 10.0 * value, "p10_us": 9.0 * value,
         "p90_us": 12.0 * value, "floor_us": 8.0 * value}
        for op in ("pool.forward", "pool.adapt")
        for axis in ("rows", "rank") for value in (1, 4, 16)
    ]  # fmt: skip
    return {
        "schema": suite.SCHEMA, "schema_version": suite.SCHEMA_VERSION, "effort": "normal",
        "date": "2026-01-02T03:04:05+00:00", "git_revision": "0" * 40, "git_dirty": False,
        "machine": {
            "cpu": "A <CPU> & more", "architecture": "x86_64", "cpus": 2, "flags": ["avx2", "fma"],
            "cache_bytes": {"L1": 32768, "L2": 524288}, "load_average": 0.1, "system": "Linux",
        },
        "backends": {"cpu": "C++"}, "isa": "avx2", "threads": 2, "stopped": False,
        "extension": {"file": "_C.so", "built": "2026-01-01", "stale": False},
        "versions": {"python": "3.11.7", "numpy": "2.2.6", "pytest-benchmark": "5.3.1"},
        "peers": {"numpy": "2.2.6", "peft": "absent: not installed"},
        "rows": [
            row("lora.forward", 2.4, peer("NumPy", 11.4, 4.7, 2.5), peer("Bᵀ", 9.5, 3.9)),
            row("lora.adapt", 7.0, peer("by hand", 6.0, 0.8, 8.0), within=1.5),
            row("pool.adapt", 900.0, {"name": "PEFT", "absent": "peft is not installed"}),
            row("import", 1e5, late) | {"floor": {}},
            {"op": "broken", "shape": "64", "wrong": "error 0.5 <script>"} | none,
            {"op": "of torch", "shape": "1", "absent": "No module"} | none,
        ],
        "growth": [
            *points, {"op": "nf4_linear", "axis": "hidden", "value": 256, "wrong": "error 1"},
        ],
        "variants": [{
            "variant": "LoRA r=2, float32", "parameters": 16384, "bytes": 65536,
            "bits_per_parameter": 32.0, "forward_us": 2.0,
        }, {"variant": "NF4", "wrong": "error 2"}, {"variant": "dense", "absent": "No torch"}],
        "bandwidth": [
            {"level": level, "threads": 2, "probe_bytes": 1, "read_gb_s": rate,
             "read_kernel": "torch sum", "update_gb_s": rate, "update_kernel": "torch mul_"}
            for level, rate in (("L2", 150.0), ("memory", 25.0))
        ],
        "flop_rates": [{"dtype": "float32", "threads": 2, "gflop_s": 150.0, "kernel": "torch mm"}],
        "noise": {"p90_over_p10": 1.33, "waited_for_cpu": 0.02, "noisy_rows": 0},
    }  # fmt: skip
