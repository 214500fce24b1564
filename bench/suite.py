"""The whole measurement behind a report: machine, cases, single calls, growth, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from bench import environment, flops, growth, table, variants
from bench.case import Case
from bench.cases import CASES
from bench.machine import Machine
from bench.paired import BUDGET_SECONDS

SCHEMA = "lora_engine bench report"
SCHEMA_VERSION = 1
PEERS = ("numpy", "torch", "peft", "bitsandbytes", "onnxruntime")


class Effort(NamedTuple):
    """rounds: of paired blocks. budget: most seconds a case waits for quiet rounds. seconds: of
    single calls a case. quick: fewer points of growth."""

    name: str
    rounds: int
    budget: float
    seconds: float
    quick: bool


QUICK = Effort("quick", 7, 3.0, 0.15, True)
NORMAL = Effort("normal", 31, BUDGET_SECONDS, 1.0, False)
FULL = Effort("full", 101, BUDGET_SECONDS, 10.0, False)

Step = Callable[[str], None]  # told the name of what was measured


class Selection(NamedTuple):
    """cases: what to measure. whole: with growth and memory, as nothing was left out."""

    cases: tuple[Case, ...]
    whole: bool


def select(ops: Sequence[str], shapes: Sequence[str], cases: Iterable[Case] = CASES) -> Selection:
    """The cases whose op holds one of ``ops`` and whose shape one of ``shapes``; all by default.

    Raises ValueError naming what there is where one of them fits nothing.
    """
    everything = tuple(cases)

    def check(option: str, wanted: Sequence[str], texts: list[str]) -> None:
        for text in wanted:
            if not any(text in known for known in texts):
                known = "\n  ".join(dict.fromkeys(texts))
                raise ValueError(
                    f"{option}: expected a part of one of these, got {text!r}:\n  {known}"
                )

    check("--op", ops, [case.op for case in everything])
    chosen = tuple(c for c in everything if not ops or any(op in c.op for op in ops))
    check("--shape", shapes, [case.shape for case in chosen])
    chosen = tuple(c for c in chosen if not shapes or any(s in c.shape for s in shapes))
    if not chosen:
        raise ValueError("--op, --shape: expected a case that fits both, got none")
    return Selection(chosen, not ops and not shapes)


def peers() -> dict[str, str]:
    """Who we are compared with: versions, or why one is absent."""
    return {name: environment.version(name) for name in PEERS}


def steps(chosen: Selection, effort: Effort) -> int:
    """How many times ``measure`` calls ``step``."""
    extra = 0
    if chosen.whole:
        points = list(growth.points(effort.quick, environment.one_thread_count()))
        extra = len(points) + len(variants.VARIANTS)
    return 1 + len(chosen.cases) + extra


def _row(case: Case, machine: Machine, threads: int, effort: Effort) -> dict[str, Any]:
    """A case's row of the speed table, with the latency of single calls."""
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "flops": case.flops, "peers": []}
    try:
        row |= table.measure(case, machine, threads, effort.rounds, effort.budget, effort.seconds)
    except Exception as error:
        row["wrong"] = _why(error)
    return row


def _point(place: growth.Place, machine: Machine, effort: Effort) -> dict[str, Any]:
    point = {"op": place.op, "axis": place.axis, "value": place.value, **place.point._asdict()}
    try:
        return point | growth.measure(place, machine, max(effort.rounds // 3, 5))
    except Exception as error:
        return point | {"wrong": _why(error)}


def _variant(variant: variants.Variant, effort: Effort) -> dict[str, Any]:
    try:
        return variants.measure(variant, max(effort.rounds // 3, 5))
    except ModuleNotFoundError as missing:
        return {"variant": variant.name, "absent": str(missing)}
    except Exception as error:
        return {"variant": variant.name, "wrong": _why(error)}


def _why(error: Exception) -> str:
    """An output that was wrong in words; whatever else went wrong by its kind too."""
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def measure(chosen: Selection, effort: Effort, step: Step) -> dict[str, Any]:
    """Everything, as the report's JSON holds it; on Ctrl-C what there is, marked ``stopped``."""
    threads = environment.one_thread_count()
    result = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "effort": effort.name}
    result |= environment.describe()
    result["peers"] = peers()
    result |= {"rows": [], "growth": [], "variants": [], "stopped": False}
    machine = Machine()
    try:
        machine.levels(threads)
        result["flop_rates"] = flops.report(flops.rates(threads))
        step("bandwidths and FLOP rates")
        for case in chosen.cases:
            result["rows"].append(_row(case, machine, threads, effort))
            step(case.name)
        if chosen.whole:
            for place in growth.points(effort.quick, threads):
                result["growth"].append(_point(place, machine, effort))
                step(f"{place.op}: growth with {place.axis}: {place.value}")
            for variant in variants.VARIANTS:
                result["variants"].append(_variant(variant, effort))
                step(f"memory: {variant.name}")
    except KeyboardInterrupt:
        result["stopped"] = True
    result.setdefault("flop_rates", [])
    result["bandwidth"] = machine.report()
    result["noise"] = noise(result["rows"])
    return result


def noise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How restless the machine was: the median over the rows of our p90 over p10 block, the
    most that a row's kept rounds waited for a CPU, and how many rows are not judged."""
    timed = [row for row in rows if "ours" in row]
    if not timed:
        return {"p90_over_p10": None, "waited_for_cpu": None, "noisy_rows": 0}
    swings = sorted(r["ours"]["p90_us"] / r["ours"]["p10_us"] for r in timed)
    return {
        "p90_over_p10": round(swings[len(swings) // 2], 3),
        "waited_for_cpu": max(r["waited_for_cpu"] for r in timed),
        "noisy_rows": sum(bool(r["noisy"]) for r in timed),
    }
