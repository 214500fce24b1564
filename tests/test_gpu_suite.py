"""The GPU suite where there is no GPU: its cases, bytes, verdicts, table, budget and refusals."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_tests, gpu_warm, gpu_worker
from bench import gpu_case as sizes
from bench.case import OURS
from bench.gpu_cases import BASELINE, BITSANDBYTES, CASES, DENSE
from bench.gpu_table import graph_target, judge, markdown, readme
from bench.gpu_time import Budget

ROOT = Path(__file__).parents[1]
NAMED = {case.name: case for case in CASES}
BATCHED = NAMED["batched_lora_delta, 64 rows on 64 adapters, r=16, bfloat16"]
LINEAR = NAMED["nf4_linear, 4096 x 4096, 8 rows, bfloat16"]
COPY = {"copy_gb_s": 4000.0, "empty_kernel_us": 1.0}
GREEN = {name: {"status": "green"} for name in gpu_tests.files()}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def measured(case, ours=(10.0,) * 5, **peers):
    times = {OURS: list(ours)} | {name: [us] * len(ours) for name, us in peers.items()}
    states = {p: {"status": "absent", "why": "not installed"} for p in case.peers}
    row = gpu_worker.numbers(case, COPY, times, states, 2)
    fixed = {"op": case.op, "shape": case.shape, "bytes": case.nbytes, "status": "measured"}
    return {**row, **fixed, "expected_us": case.expected_us}


def result_of(*rows):
    return {
        "rows": list(rows), "tests": GREEN, "probes": COPY, "git_revision": "a" * 40,
        "date": "2026-01-02T03:04:05", "gpu": {"name": "NVIDIA X", "driver": "1.2"},
        "versions": {"torch": "2.11", "triton": "3.6", "python": "3.12"},
    }  # fmt: skip


# ---- the cases ----


def test_every_op_has_a_case():
    ops = {case.op.split(" ")[0] for case in CASES}
    assert ops == {
        "lora_delta", "batched_lora_delta", "batched_adapt", "nf4_quantize", "nf4_dequantize",
        "nf4_linear", "fisher_accumulate", "lora_fisher", "lora_fisher_factors", "ewc_step",
    }  # fmt: skip


def test_the_most_important_come_first():
    ops = dict.fromkeys(case.op.split(" ")[0] for case in CASES)
    first = ["batched_lora_delta", "lora_delta", "nf4_linear", "batched_adapt", "fisher_accumulate"]
    assert list(ops)[:5] == first


def test_cases_are_sound():
    assert len(NAMED) == len(CASES)
    for case in CASES:
        assert next(iter(case.contenders)) == OURS
        assert set(case.tests) <= set(gpu_tests.files())
        assert set(case.faster) <= set(case.peers)
        assert case.sets * case.nbytes > 100e6
        assert case.sets <= sizes.MOST_SETS


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        # A and B of 64 adapters: 64 * 16 * 8192 * 2; x, and y read and written: 3 * 64 * 4096 * 2
        ("batched_lora_delta, 64 rows on 64 adapters, r=16, bfloat16", 16_777_216 + 1_572_864),
        # weights read and written: 2 * 256 * 2 * 8192 * 4; x and grad: 2 * 256 * 4096 * 4
        ("batched_adapt, 256 rows of 256 users, r=2, float32", 33_554_432 + 8_388_608),
        # in bfloat16, and anchors, u and v: 256 * 3 * 8192 * 4
        (
            "batched_adapt with EWC, delta form, 256 rows of 256 users, r=2, bfloat16",
            16_777_216 + 4_194_304 + 25_165_824,
        ),
        # codes 8 MiB, absmax 262144 * 4, x and y 2 * 4096 * 2
        ("nf4_linear, 4096 x 4096, 1 rows, bfloat16", 8_388_608 + 1_048_576 + 16_384),
        ("fisher_accumulate, 16384 K elements, float32", 201_326_592),
        ("ewc_step, 32 K elements, float32", 655_360),
        ("nf4_dequantize, 4096 x 4096 to bfloat16", 9_437_184 + 33_554_432),
    ],
)
def test_bytes_by_hand(name, nbytes):
    assert NAMED[name].nbytes == nbytes


# ---- numbers, verdicts, tables ----


def test_a_row_is_computed_from_the_times():
    row = measured(BATCHED, ours=(8.0, 10.0, 10.0, 12.0, 40.0), **{BASELINE: 30.0})
    assert row["floor_us"] == pytest.approx(18_350_080 / 4000e3 + 1.0)
    assert row["achieved_over_floor"] == pytest.approx(10.0 / row["floor_us"])
    assert row["gb_s"] == pytest.approx(18_350_080 / 10e-6 / 1e9)
    assert row["ratios"][BASELINE]["median"] == 3.0
    assert row["contenders"]["gather + bmm"]["status"] == "absent"


@pytest.mark.parametrize(
    ("ours", "baseline", "launches", "met"),
    [(10.0, 15.1, 2, [True] * 3), (10.0, 14.9, 2, [True, True, False]),
     (11.3, 30.0, 3, [False, False, True])],
)  # fmt: skip
def test_targets_of_the_batched_delta(ours, baseline, launches, met):
    row = measured(BATCHED, (ours,) * 3, **{BASELINE: baseline}) | {"launches": launches}
    assert [t.met for t in judge(BATCHED, row, 4000.0)] == met


def test_targets_of_nf4_linear():
    row = measured(LINEAR, (10.0,), **{DENSE: 10.0, BITSANDBYTES: 14.0})
    assert [t.met for t in judge(LINEAR, row, 4000.0)] == [True, False]
    absent = judge(LINEAR, measured(LINEAR, (10.0,), **{DENSE: 9.0}), 4000.0)
    assert [t.met for t in absent] == [False, None]
    assert absent[1].got == "bitsandbytes: not installed"


def test_the_copy_is_what_fisher_accumulate_is_held_to():
    case = NAMED["fisher_accumulate, 16384 K elements, float32"]
    for us, met in ((55.0, True), (57.0, False)):  # 90% of 4 TB/s: 55.9 us
        assert [t.met for t in judge(case, measured(case, (us,)), 4000.0)] == [met]


def test_what_was_not_measured_is_not_judged():
    for status in ("failed", "refused", "left out"):
        targets = judge(BATCHED, {"status": status, "why": "so"}, 0.0)
        assert [(t.met, t.got) for t in targets] == [(None, "so")] * 3
    assert graph_target(GREEN).met is True
    assert graph_target({"test_triton_graph": {"status": "red"}}).met is False
    assert graph_target({"test_triton_graph": {"status": "unfinished"}}).met is None


def test_tables_from_a_result():
    failed = {"op": "ewc_step", "shape": "s", "status": "failed", "why": "CUDA error"}
    result = result_of(measured(BATCHED, (12.0,) * 3, **{BASELINE: 30.0}), failed)
    result["targets"] = gpu.judged(CASES, result)
    whole = "\n".join(markdown(json.loads(json.dumps(result))))
    assert "| 12.0 [12.0-12.0] | 18.4 | 5.6 | 2.15 | 8 | zeroing + shrink + expand 2.50x" in whole
    assert "gather + bmm: absent, not installed" in whole
    assert "| ewc_step, s | failed: CUDA error |" in whole
    assert "MISSED: batched_lora_delta, 64 rows on 64 adapters, r=16" in whole
    assert whole.count("not judged") == len(result["targets"]) - 4  # 3 of this case, the graphs
    short = "\n".join(readme(result))
    assert (
        "one NVIDIA X (driver 1.2), torch 2.11, Triton 3.6, Python 3.12, at aaaaaaaaaaaa" in short
    )
    assert "| **batched_lora_delta, 64 rows on 64 adapters, r=16, bfloat16** | 12.0" in short
    assert "Not measured: ewc_step, s (failed)." in short


# ---- the run ----


def test_no_case_begins_after_the_time_and_the_rest_is_named():
    clock = Clock()
    budget = Budget(480.0, clock)
    result = {"rows": [], "tests": GREEN}

    def measure(index, found, seconds):
        clock.now += 100.0
        return COPY if index == gpu_worker.PROBES else measured(CASES[index])

    gpu.time_cases(CASES, result, budget, measure, lambda text: None)
    statuses = [row["status"] for row in result["rows"]]
    assert statuses == ["measured"] * 4 + ["left out"] * (len(CASES) - 4)
    assert budget.left == 0


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on():
    def measure(index, found, seconds):
        if index == 1:
            raise RuntimeError("out of memory")
        return COPY if index == gpu_worker.PROBES else measured(CASES[index])

    result = {"rows": [], "tests": GREEN}
    gpu.time_cases(CASES[:3], result, Budget(1.0, Clock()), measure, lambda text: None)
    assert [row["status"] for row in result["rows"]] == ["measured", "failed", "measured"]
    assert result["rows"][1]["why"] == "out of memory"


@pytest.mark.parametrize("status", ["red", "not run", None])
def test_no_times_of_an_op_whose_tests_are_not_green(status):
    tests = {k: v for k, v in GREEN.items() if k != "test_triton_pool"}
    if status:
        tests["test_triton_pool"] = {"status": status}
    row = gpu.attempt(0, BATCHED, tests, COPY, Budget(1.0, Clock()), None)
    assert row["status"] == "refused"
    assert row["why"] == f"test_triton_pool: {status or 'not run'}"
    assert not row["contenders"]


def test_unfinished_tests_are_noted():
    tests = GREEN | {"test_triton_pool": {"status": "unfinished"}}
    row = gpu.attempt(0, BATCHED, tests, COPY, Budget(1.0, Clock()), lambda *_: measured(BATCHED))
    assert row["status"] == "measured"
    assert row["note"] == "tests unfinished: test_triton_pool"


def test_ctrl_c_leaves_what_there_is(monkeypatch):
    class Stopped(gpu_worker.Worker):
        def ask(self, index, found, seconds):
            if index == 1:
                raise KeyboardInterrupt
            return COPY if index == gpu_worker.PROBES else measured(CASES[index])

    monkeypatch.setattr(gpu, "Worker", Stopped)
    monkeypatch.setattr(gpu, "describe", dict)
    monkeypatch.setattr(gpu_tests, "run", lambda *_: (GREEN, "", True))
    monkeypatch.setattr(gpu_warm, "beside", lambda *_: contextlib.nullcontext())
    budget = Budget(9.0, Clock())
    result = gpu.run(CASES, budget, gpu.Progress(9, budget))
    assert result["interrupted"] is True
    assert [row["status"] for row in result["rows"]] == ["measured"]
    assert len(result["targets"]) == len(gpu.judged(CASES, result_of()))


def test_a_peer_that_fails_or_is_absent_costs_the_others_nothing(monkeypatch):
    def missing(data):
        raise sizes.Absent("peft is not installed")

    def fails(data):
        raise ValueError("no such layer\nat all")

    def times(graphs):
        return {name: [float(i)] for i, name in enumerate(graphs, start=1)}

    monkeypatch.setattr(gpu_worker, "captured", lambda timed: timed)
    monkeypatch.setattr(gpu_worker, "interleaved", times)
    monkeypatch.setattr(gpu_worker, "launches_of", lambda call: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    done = sizes.Timed([lambda: None], lambda run: None)
    peers = {"a": missing, "b": fails, "c": lambda data: done}
    case = sizes.Case("op", "s", (), 10**9, lambda sets: sets, {OURS: lambda data: done, **peers})
    row = gpu_worker.measure(case, COPY)
    assert {name: state["status"] for name, state in row["contenders"].items()} == {
        OURS: "measured", "a": "absent", "b": "failed", "c": "measured",
    }  # fmt: skip
    assert row["contenders"]["b"]["why"] == "ValueError: no such layer"
    assert row["ratios"] == {"c": {"p10": 2.0, "median": 2.0, "p90": 2.0}}
    with pytest.raises(ValueError, match="no such layer"):
        gpu_worker.measure(replace(case, contenders={OURS: fails}), COPY)


def test_a_worker_says_why_and_is_started_anew():
    """Where there is no GPU, each answer is that there is none."""
    worker = gpu_worker.Worker()
    try:
        if torch.cuda.is_available():
            pytest.skip("of a machine without a GPU")
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"CUDA|NVIDIA|ended without"):
                worker.ask(gpu_worker.PROBES, {}, 120.0)
        with pytest.raises(RuntimeError, match="took more than 0 s and was stopped"):
            worker.ask(0, {}, 0.0)
    finally:
        worker.stop()


def test_pytest_lines_are_read():
    ids = [f"test_triton_a.py::test_x[{i} b]" for i in range(3)] + [
        "test_triton_b.py::test_y", "test_triton_b.py::test_z", "test_triton_c.py::test_z",
    ]  # fmt: skip
    output = """
tests/test_triton_a.py::test_x[0 b] PASSED        [ 10%]
test_triton_a.py::test_x[1 b] FAILED
FAILED test_triton_a.py::test_x[1 b] - AssertionError: no
test_triton_b.py::test_y SKIPPED (why)
test_triton_c.py::test_z SKIPPED (why)
"""
    found = gpu_tests.summarise(ids, output)
    assert {name: t["status"] for name, t in found.items()} == {
        "test_triton_a": "red", "test_triton_b": "unfinished", "test_triton_c": "not run",
    }  # fmt: skip
    assert found["test_triton_a"]["failures"] == ["test_x[1 b]"]
    assert gpu_tests.summarise(ids, output, ["test_triton_b"])["test_triton_b"]["status"] == "red"


def test_shards_have_one_file_each_and_every_test():
    ids = [f"test_a.py::t[{i}]" for i in range(90)] + ["test_b.py::t"] * 10
    parts = gpu_tests.shards(ids, 10)
    assert sorted(itertools.chain(*parts)) == sorted(ids)
    assert len(parts) == 10
    assert all(len({gpu_tests.file_of(t) for t in part}) == 1 for part in parts)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(out)], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == ("no GPU: torch sees no CUDA GPU; nothing was run, nothing is claimed\n")
    assert not out.exists()
