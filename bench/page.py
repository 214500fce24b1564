"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench import growth, plots


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _times(value: float) -> str:
    return f"{value:.2g}x" if value < 10 else f"{value:.0f}x"


def _verdict(aim: str, met: bool | None, noisy: bool) -> Markup:
    if noisy or met is None:
        return Markup("{}, not judged").format(aim)
    return Markup("{}, met" if met else '<span class="missed">{}, MISSED</span>').format(aim)


def _missed(row: dict[str, Any]) -> int:
    if "ours" not in row or row["noisy"]:
        return 0
    return [row["floor"].get("met"), *(p.get("met") for p in row["peers"])].count(False)


def _plots(report: dict[str, Any]) -> dict[str, Any]:
    latency = [(row, Markup(plots.histogram(row))) for row in report["rows"] if "latency" in row]
    curves = [(axis, Markup(plots.growth(report["growth"], axis))) for axis in growth.AXES]
    return {
        "roofline": Markup(plots.roofline(report)),
        "ratios": Markup(plots.ratios(report)),
        "latency": latency,
        "growth": [(axis, svg) for axis, svg in curves if svg],
    }


def render(report: dict[str, Any]) -> str:
    """The page of a report."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"us": _us, "times": _times}
    environment.globals["verdict"] = _verdict
    base = growth.BASE._asdict()
    base["threads"] = "all"
    return environment.get_template("page.html").render(
        r=_lenient(report),
        plots=_plots(report),
        failed=sum("wrong" in r for r in report["rows"] + report["growth"] + report["variants"]),
        uncounted=sorted({r["op"] for r in report["rows"] if "ours" in r and not r["flops"]}),
        missed=sum(map(_missed, report["rows"])),
        base=", ".join(f"{name} {value}" for name, value in base.items()),
    )


def _lenient(report: dict[str, Any]) -> dict[str, Any]:
    """Rows with every key that the template asks for."""

    def with_keys(row: dict[str, Any]) -> dict[str, Any]:
        empty = {"wrong": "", "absent": "", "noisy": False, "floor": {}, "peers": []}
        peers = [{"absent": "", "ratio": None, **p} for p in row.get("peers", [])]
        return empty | row | {"peers": peers}

    points = [{"wrong": "", **point} for point in report["growth"]]
    kept = [{"wrong": "", "absent": "", **variant} for variant in report["variants"]]
    rows = [with_keys(row) for row in report["rows"]]
    return report | {"rows": rows, "growth": points, "variants": kept}
