"""The report's pictures, as SVG that stands in the page: colours that a colour-blind reader can
tell apart (Okabe and Ito 2008), and never told by colour alone."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "black", "#F0E442", "#999999")
MARKERS = "osD^vPX*<>"
_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}


def _svg(draw: Callable[[Figure], None], width: float, height: float) -> str:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    # As wide as its place in the page, up to its own size; the view box keeps its shape.
    sized = re.sub(r'(<svg [^>]*?)width="[^"]*pt"|height="[^"]*pt"', r"\1", text.getvalue())
    return sized[sized.index("<svg") :].replace("<svg ", f'<svg style="max-width: {width}in" ', 1)


def _plain(value: float, _: Any = None) -> str:
    return f"{value:g}"


def _log(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(_plain))


def roofline(report: dict[str, Any]) -> str:
    """GFLOP/s over operations a byte, below what memory and arithmetic allow."""
    rows = [r for r in report["rows"] if r.get("flops") and r.get("floor") and "ours" in r]
    if not rows or not report["flop_rates"]:
        return ""
    peak = max(r["gflop_s"] for r in report["flop_rates"] if r["dtype"] == "float32")
    intensity = [r["flops"] / r["floor"]["bytes"] for r in rows]
    reached = [r["flops"] / (r["ours"]["median_us"] * 1e3) for r in rows]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        low, high = min(intensity) / 2, max(*intensity, peak / 10) * 2
        most = max(b["threads"] for b in report["bandwidth"])
        shown = [b for b in report["bandwidth"] if b["threads"] == most and "at" not in b["level"]]
        for i, (b, dash) in enumerate(zip(shown, ("-.", "-", "--", ":"), strict=False)):
            start, knee = b["read_gb_s"] * low, peak / b["read_gb_s"]
            axes.plot([low, knee, high], [start, peak, peak], dash, color=GREY, lw=1.2)
            axes.annotate(
                f"{b['level']}, {b['read_gb_s']:g} GB/s", (low, start), color=GREY, fontsize=9,
                xytext=(4, 4 - 11 * (i % 2)), textcoords="offset points",
            )  # fmt: skip
        axes.annotate(f"float32 matmul, {peak:g} GFLOP/s", (high, peak), ha="right", va="bottom",
                      color=GREY, fontsize=9)  # fmt: skip
        ops = list(dict.fromkeys(r["op"] for r in rows))
        for i, op in enumerate(ops):
            at = [k for k, r in enumerate(rows) if r["op"] == op]
            axes.plot(
                [intensity[k] for k in at], [reached[k] for k in at], MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)], label=op, ms=7, mec="white",
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
        _log(axes.xaxis)
        _log(axes.yaxis)
        axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
        axes.grid(True, which="major", alpha=0.3)

    return _svg(draw, 8, 5)


def ratios(report: dict[str, Any]) -> str:
    """Each peer's time over ours, with its spread, and what was aimed at."""
    lines = [
        (f"{row['op']}, {row['shape']}", peer)
        for row in report["rows"]
        for peer in row["peers"]
        if "ratio" in peer
    ]
    if not lines:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, (_, peer) in enumerate(lines):
            r = peer["ratio"]
            good = r["median"] >= 1
            axes.plot([r["p10"], r["p90"]], [i, i], color=GREY, lw=2)
            axes.plot(r["median"], i, "o" if good else "v", color=BLUE if good else ORANGE, ms=7)
            if peer["wanted"]:
                axes.plot(peer["wanted"], i, "|", color="black", ms=14, mew=2)
        axes.axvline(1, color="black", lw=1)
        labels = [f"{case}\nagainst {peer['name']}" for case, peer in lines]
        axes.set_yticks(range(len(lines)), labels, fontsize=8)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set(xscale="log", xlabel="peer's time over ours; right of 1: ours is faster;"
                 " upright bar: the aim")  # fmt: skip
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        _log(axes.xaxis)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, axis="x", which="major", alpha=0.3)

    return _svg(draw, 9, 1.2 + 0.42 * len(lines))


def histogram(row: dict[str, Any]) -> str:
    """Single calls of one case, by how long they took."""
    found = row["latency"]
    edges, counts = found["histogram"]["edges_us"], found["histogram"]["counts"]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.8)
        for name, dash in (("p50", "-"), ("p99", "--"), ("p99.9", ":")):
            value = found[f"{name}_us"]
            if value is not None:
                axes.axvline(value, color="black", ls=dash, lw=1.2, label=f"{name} {value:g} us")
        axes.set(xscale="log", yscale="log", xlabel="us a call", ylabel="calls")
        axes.set_ylim(bottom=0.7)
        ticks = [edges[0] * (edges[-1] / edges[0]) ** (i / 3) for i in range(4)]
        axes.set_xticks(ticks, [f"{tick:.3g}" if tick < 1000 else f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
        axes.legend(fontsize=8)

    return _svg(draw, 5.2, 2.6)


def growth(rows: Sequence[dict[str, Any]], axis: str) -> str:
    """Time of each op over one of the sizes, with its byte floor."""
    points = [r for r in rows if r["axis"] == axis and "median_us" in r]
    curves: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        curves.setdefault(point["op"], []).append(point)
    curves = {op: curve for op, curve in curves.items() if len(curve) > 1}
    if not curves:
        return ""
    ops = list(dict.fromkeys(r["op"] for r in rows))  # an op looks the same over every size

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for op, curve in curves.items():
            i = ops.index(op)
            color, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            x = [p["value"] for p in curve]
            low, high = [p["p10_us"] for p in curve], [p["p90_us"] for p in curve]
            axes.fill_between(x, low, high, color=color, alpha=0.25)
            axes.plot(x, [p["median_us"] for p in curve], f"{marker}-", color=color, label=op)
            axes.plot(x, [p["floor_us"] for p in curve], f"{marker}:", color=color, ms=3)
        axes.plot([], [], ":", color=GREY, label="bytes over bandwidth")
        _size_axis(axes, sorted({p["value"] for p in points}), axis)
        axes.set(yscale="log", ylabel="us a call")
        _log(axes.yaxis)
        axes.grid(True, which="major", alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)

    return _svg(draw, 5.2, 4.6)


def _size_axis(axes: Axes, values: list[int], name: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(v) for v in values])
    axes.minorticks_off()
    pad = math.sqrt(2)
    axes.set(xlabel=name, xlim=(values[0] / pad, values[-1] * pad))
