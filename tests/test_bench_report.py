"""The report of ``lora-engine bench``: its page, files, comparison. Nothing is timed here."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import helpers_report
import numpy as np
import pytest

from bench import (
    command,
    compare,
    formats,
    growth,
    growth_ops,
    instructions,
    latency,
    machine,
    page,
    suite,
)
from lora_engine.cli import main

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=3000",
)  # fmt: skip


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return helpers_report.report()


@pytest.fixture(scope="module")
def html(report: dict[str, Any]) -> str:
    return page.render(report)


def _text(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


# ---- the page ----


def test_a_failed_row_has_no_number(html: str) -> None:
    line = next(line for line in re.findall(r"(?s)<tr.*?</tr>", html) if "FAILED" in line)
    assert "error 0.5 &lt;script&gt;" in line
    assert re.findall(r"\d+(?:\.\d+)?", _text(line).replace("error 0.5", "")) == ["64"]  # its shape
    assert "1 cases, " not in html
    assert "3 failed" in html  # a case, a point of a curve, a variant


def test_the_page_says_what_was_aimed_at_and_missed(html: str) -> None:
    text = _text(html)
    assert "2.5x, met" in text
    assert "8x, MISSED" in text
    assert "≤ 1.5, met" in text
    assert "1 aims missed" in text
    assert "peft is not installed" in text
    assert "+30.0 ms" in text
    assert "too few" in text  # calls for p99.9
    assert "peft absent: not installed" in text


def test_the_page_needs_nothing_else(html: str) -> None:
    assert not re.search(r"<(script|link|img|iframe)\b", html)
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", html)
    assert "@import" not in html
    assert "A &lt;CPU&gt; &amp; more" in html


def test_the_page_has_a_picture_of_each_kind(html: str) -> None:
    for label in (
        "operations a byte",
        "peer's time over ours",
        "us a call",
        "bytes over bandwidth",
    ):
        assert label in html, label
    assert html.count("<svg") == 1 + 1 + 4 + 2  # roofline, ratios, latencies, curves


def test_every_tag_is_closed(html: str) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(html)
    assert parser.open == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium (Debian's package) is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors_or_overflow(
    html: str, width: int, tmp_path: Path
) -> None:
    probe = (
        "<script>document.title = JSON.stringify({over: document.documentElement.scrollWidth -"
        " innerWidth, pictures: [...document.querySelectorAll('svg')].every(s =>"
        " s.getBoundingClientRect().width > 100)})</script></body>"
    )
    file = tmp_path / "report.html"
    file.write_text(html.replace("</body>", probe))
    run = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},2000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", run.stdout)
    assert found, run.stderr[-500:]
    seen = json.loads(found[1])
    assert seen["pictures"], seen
    assert seen["over"] <= 0, seen
    assert "CONSOLE" not in run.stderr, run.stderr[-2000:]


# ---- files ----


def test_csv_has_a_line_for_each_contender(report: dict[str, Any]) -> None:
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(report))))
    assert len(lines) == 3 + 2 + 2 + 2 + 1 + 1  # of each row: ours and its peers
    by = {(line["op"], line["contender"]): line for line in lines}
    assert by["lora.forward", "NumPy"]["ratio"] == "4.7"
    assert by["lora.adapt", "by hand"]["met"] == "False"
    assert by["broken", "lora_engine"]["median_us"] == ""
    assert by["broken", "lora_engine"]["status"].startswith("wrong")


def test_pytest_benchmark_reads_its_file(report: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text(json.dumps(formats.as_pytest_benchmark(report)))
    out = tmp_path / "out.csv"
    subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(file), f"--csv={out}"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(out.read_text())))
    assert {line["name"] for line in lines} >= {"lora.forward, 4096, r=2: NumPy"}
    ours = next(line for line in lines if line["name"] == "lora.adapt, 4096, r=2: lora_engine")
    assert float(ours["median"]) == pytest.approx(7.0e-6)


def test_write_replaces_a_report_whole(report: dict[str, Any], tmp_path: Path) -> None:
    first = command.write(report, tmp_path / "r")
    assert [f.name for f in first] == [
        "report.json", "pytest-benchmark.json", "report.csv", "report.html",
    ]  # fmt: skip
    command.write(report | {"rows": []}, tmp_path / "r")
    assert json.loads(first[0].read_text())["rows"] == []
    assert len(list((tmp_path / "r").iterdir())) == 4


# ---- comparison ----


def _ratio(report: dict[str, Any], factor: float) -> dict[str, Any]:
    """The report of an engine whose lora.forward takes ``factor`` times as long."""
    now = json.loads(json.dumps(report))
    for peer in now["rows"][0]["peers"]:
        for key in ("median", "p10", "p90"):
            peer["ratio"][key] /= factor
    return now


@pytest.mark.parametrize(
    ("factor", "word", "lost"),
    [(1.0, "", False), (1.02, "", False), (1.08, "slower", False), (1.3, "LOST", True),
     (0.7, "faster", False)],
)  # fmt: skip
def test_compare_tells_a_loss_from_noise(
    report: dict[str, Any], factor: float, word: str, lost: bool
) -> None:
    found, left = compare.changes(report, _ratio(report, factor))
    text = compare.lines(found, left)
    assert any(line.startswith(f"{word}: lora.forward") for line in text) == bool(word)
    assert any(c.lost for c in found) is lost
    assert next(c for c in found if "forward" in c.case).factor == pytest.approx(factor)
    assert sum("not compared" in line for line in text) == 2  # wrong, absent


def test_a_clock_of_wide_spread_hides_a_loss(report: dict[str, Any]) -> None:
    now = _ratio(report, 1.3)
    for peer in now["rows"][0]["peers"]:
        peer["ratio"]["p90"] = 4 * peer["ratio"]["p10"]
    found, _ = compare.changes(report, now)
    assert not any(c.lost for c in found)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": "other"}, "schema"),
        ({"schema_version": 99}, "version 1"),
        ({"rows": None}, "rows"),
        ({"rows": [1]}, "rows: expected those of a report, got '1'"),
        ({"rows": [{"op": "a", "shape": "b", "ours": {}, "peers": [{}]}]}, "rows: expected"),
    ],
)
def test_a_file_of_another_schema_is_refused(
    report: dict[str, Any], change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(report | change))
    with pytest.raises(compare.Unusable, match=why):
        compare.load(file)
    file.write_text("{")
    with pytest.raises(compare.Unusable, match="expected a report"):
        compare.load(file)


def test_a_report_of_another_machine_is_not_compared(report: dict[str, Any]) -> None:
    compare.check_machine(report, report)
    other = report | {"machine": report["machine"] | {"cpu": "another"}}
    with pytest.raises(compare.Unusable, match="cpu"):
        compare.check_machine(report, other)
    with pytest.raises(compare.Unusable, match="threads"):
        compare.check_machine(report, report | {"threads": 4})
    with pytest.raises(compare.Unusable, match=r"numpy: expected 2\.3\.0, as now, got 2\.2\.6"):
        compare.check_machine(report, report | {"peers": {"numpy": "2.3.0", "peft": "0.18"}})


def test_noisy_and_missing_cases_are_not_judged(report: dict[str, Any]) -> None:
    slower = _ratio(report, 1.3)
    noisy = [slower["rows"][0] | {"noisy": True}, *slower["rows"][1:]]
    for old, now in ((report, slower | {"rows": noisy}), (report | {"rows": noisy}, slower)):
        found, left = compare.changes(old, now)
        assert not any(c.lost for c in found)
        assert any(line.startswith("lora.forward, 4096, r=2: noisy") for line in left)
    fewer = slower | {"rows": slower["rows"][1:]}
    assert "lora.forward, 4096, r=2: not measured now" in compare.changes(report, fewer)[1]
    assert not any("forward" in line for line in compare.changes(report, fewer, whole=False)[1])


def test_bad_places_are_refused_before_anything_is_measured(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(suite, "measure", lambda *_: pytest.fail("it measures"))
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    for arguments, why in (
        (["--out", str(file)], "report.json"),
        (["--out", str(tmp_path), "--compare", str(file)], "expected another file than --out"),
        (["--out", str(tmp_path / "o"), "--compare", str(file)], "cpu: expected"),
    ):
        assert main(["bench", *arguments]) == 2
        assert why in capsys.readouterr().err


# ---- what is measured ----


def test_an_unknown_op_or_shape_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--op", "nosuch"]) == 2
    said = capsys.readouterr().err
    assert "'nosuch'" in said
    assert "fisher_accumulate" in said
    assert main(["bench", "--op", "lora.forward", "--shape", "9999"]) == 2
    assert "4096, r=2, one row" in capsys.readouterr().err
    assert main(["bench", "--compare", "/nonexistent.json"]) == 2


def test_select_keeps_growth_for_whole_runs() -> None:
    assert suite.select([], []).whole
    chosen = suite.select(["lora.forward"], ["one row"])
    assert [c.op for c in chosen.cases] == [
        "lora.forward(x, m, out=y), NumPy", "lora.forward(x, m, out=y), torch",
    ]  # fmt: skip
    assert not chosen.whole


class _NoMachine:
    def levels(self, threads: int) -> None: ...

    def report(self) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_writes_what_there_is(
    ended_by: signal.Signals,
    report: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = iter(report["rows"])

    def measured(*_: Any) -> dict[str, Any]:
        row = next(rows)
        if row is report["rows"][1]:
            os.kill(os.getpid(), ended_by)
        return row

    monkeypatch.setattr(suite, "Machine", _NoMachine)
    monkeypatch.setattr(suite.flops, "rates", lambda threads: [])
    monkeypatch.setattr(suite.table, "measure", measured)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        status = main(["bench", "--op", "lora.forward", "--quick", "--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert status == 130
    said = capsys.readouterr().err
    assert "1/3 bandwidths" in said
    assert "2/3 lora.forward" in said
    assert "stopped: the report holds what was measured" in said
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["stopped"]
    assert [r["op"] for r in written["rows"]] == ["lora.forward"]


def test_percentiles_are_of_single_calls_and_need_enough_of_them() -> None:
    ns = np.arange(1, 2001) * 1000
    found = latency.describe(ns)
    assert found["p50_us"] == pytest.approx(1000.5)
    assert found["p99_us"] == pytest.approx(1980.01)
    assert found["p99.9_us"] is None  # two calls are beyond it
    assert found["max_us"] == 2000
    counts, edges = found["histogram"]["counts"], found["histogram"]["edges_us"]
    assert sum(counts) == 2000
    assert edges[0] <= 1
    assert edges[-1] >= 2000


def test_points_of_growth_are_held_to_the_reference() -> None:
    point = growth_ops.Point(rows=3, rank=2, adapters=2, hidden=64)
    for op in growth_ops.OPS.values():
        op.build(point).verify()
    found = list(growth.points(quick=False, threads=2))
    assert {place.op for place in found} == set(growth_ops.OPS)
    assert {place.axis for place in found} == set(growth.AXES)
    assert all(p.point.rows >= p.point.adapters for p in found if p.axis == "adapters")
    adapt = [p.value for p in found if (p.op, p.axis) == ("pool.adapt", "threads")]
    assert adapt == [1, 2]


def test_a_wrong_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a curve's point, and of a variant: the reference is moved instead of the op."""
    point = growth_ops.Point(rows=3, rank=2, adapters=2, hidden=64)
    real = growth_ops.reference.batched_adapt
    for op, name in (
        ("lora.forward", "lora_delta"),
        ("pool.forward", "batched_lora_delta"),
        ("nf4_linear", "nf4_linear"),
        ("fisher_accumulate", "fisher_accumulate"),
    ):
        with monkeypatch.context() as patch:
            moved = getattr(growth_ops.reference, name)
            patch.setattr(growth_ops.reference, name, lambda *a, f=moved: 1.001 * f(*a))
            with pytest.raises(AssertionError, match=f"{op}, .*wrong, so not timed"):
                growth_ops.OPS[op].build(point).verify()
    with monkeypatch.context() as patch:
        fisher = growth_ops.reference.lora_fisher
        patch.setattr(
            growth_ops.reference, "lora_fisher", lambda x, *rest: fisher(1.001 * x, *rest)
        )
        with pytest.raises(AssertionError, match=r"lora_fisher, .*wrong, so not timed"):
            growth_ops.OPS["lora_fisher"].build(point).verify()
    for op in ("lora.adapt", "pool.adapt"):
        with monkeypatch.context() as patch:
            patch.setattr(
                growth_ops.reference, "batched_adapt",
                lambda x, grad, *rest: real(1.001 * x, grad, *rest),
            )  # fmt: skip
            with pytest.raises(AssertionError, match=f"{op}, .*wrong, so not timed"):
                growth_ops.OPS[op].build(point).verify()


def test_what_fails_otherwise_is_a_row_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> dict[str, Any]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(suite, "Machine", _NoMachine)
    monkeypatch.setattr(suite.flops, "rates", lambda threads: [])
    for module in (suite.table, suite.growth, suite.variants):
        monkeypatch.setattr(module, "measure", fails)
    steps: list[str] = []
    chosen = suite.select([], [])
    found = suite.measure(chosen, suite.QUICK, steps.append)
    assert len(steps) == suite.steps(chosen, suite.QUICK)
    for kind in ("rows", "growth", "variants"):
        assert found[kind]
        assert all(row["wrong"] == "RuntimeError: out of luck" for row in found[kind])


# ---- instruction counts ----


def _counts(**ops: float) -> dict[str, Any]:
    return {"isa": "avx2", "compiler": "GCC 12", "instructions": ops}


def test_instruction_counts_are_compared_exactly() -> None:
    result = instructions.compare(_counts(a=1000.0, b=500.0), _counts(a=1001.0, b=500.0))
    assert result.lines == [
        "changed: a: 1000 -> 1001 instructions (1.001x)", "1 of 2 ops unchanged",
    ]  # fmt: skip
    assert not result.lost
    assert instructions.compare(_counts(a=1000.0), _counts(a=1020.0)).lost
    assert instructions.compare(_counts(a=1000.0), _counts(b=1.0)).lost  # a is gone
    assert not instructions.compare(_counts(a=1000.0), _counts(a=900.0)).lost


def test_counts_of_another_compiler_are_not_compared() -> None:
    other = _counts(a=5000.0) | {"compiler": "GCC 13"}
    result = instructions.compare(_counts(a=1000.0), other)
    assert not result.lost
    assert "compiler" in result.lines[0]


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_the_core_takes_no_more_instructions_than_were_kept() -> None:
    """The gate: after a change that is meant, ``python -m bench.instructions --write``."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.instructions"], capture_output=True, text=True,
        cwd=instructions.ROOT,
    )  # fmt: skip
    for why in ("not compared", "is not installed"):
        if run.returncode == 0 and why in run.stdout:
            pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


def test_the_l1_is_read_many_times_in_a_call() -> None:
    """A call takes longer than to read it once; what changes it would only time the call."""
    place = machine.canonical(machine.L1, 2)
    assert place.size == machine.cache_bytes().get("L1", 32 << 10)
    (kernel,) = machine.kernels(place)
    assert (kernel.kind, kernel.threads) == (machine.READ, 2)
    assert kernel.moved == machine.REPEATED
    assert kernel.call().tolist() == [place.size / 2 / 4] * (2 * machine.REPEATED // place.size)
    seen = machine.Machine()
    seen.record(place, machine.READ, machine.Rate(2e9, kernel.name))
    (row,) = seen.report()
    assert (row["level"], row["read_gb_s"], row["update_gb_s"]) == ("L1", 2.0, None)
