"""MiniLM serving many adapters in one batch, against PEFT: ``python -m bench.serving``.

all-MiniLM-L6-v2 in float32 embeds queries on Python's documentation, with the same adapters in
``lora_engine.attach``, in PEFT's ``adapter_names``, and as one forward an adapter with its rows
alone (PEFT, ``set_adapter``); rows take the adapters in turn. Before anything is timed each
contender's output is held to the others'. The model without adapters is timed beside them: what
PEFT takes over that is the most that any engine could be faster.

The aims: 32 users, a query of 16 tokens each, an adapter of rank 8 on every linear layer; at
least twice PEFT's throughput. And on the attached model rows that all name ``__base__``: at most
3 % slower than the bare model. Growth: 128 such queries, with more adapters, and with more rank,
without one forward each.

Contenders take turns in rounds, A B C, C B A; of the rounds the half is kept in which our threads
waited least for a CPU. Ratios are within a round, medians over rounds, with the 10th and 90th
percentile. With ``--threads 1`` it is CPU time that is measured, which neighbours disturb least.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np

import lora_engine as le
from bench import environment
from bench.paired import Times, ratio, spread, waiting_seconds
from lora_engine.progress import Bar
from lora_engine.text_demo import corpus
from lora_engine.text_demo.encoder import model_folder

TOKENS = 16
COUNTS = (1, 8, 32, 128)
RANKS = (1, 4, 16, 64)
ALL, ATTENTION = ("query", "key", "value", "dense"), ("query", "value")
OURS, PEFT, EACH = "lora_engine", "PEFT", "one forward each"
BARE, BASE = "no adapters", "base rows"
FASTER, SLOWER = 2.0, 1.03  # than PEFT, wanted; than the bare model, allowed
SCHEMA = "lora_engine serving"

Calls = dict[str, Callable[[], Any]]


class Setup(NamedTuple):
    """What is timed: a batch of ``rows`` queries, whose adapters are on the layers ``targets``."""

    rows: int = 32
    adapters: int = 32
    rank: int = 8
    targets: tuple[str, ...] = ALL


AIM = Setup()


def setups(quick: bool) -> list[Setup]:
    """quick: without growth."""
    growth = {Setup(128, count) for count in COUNTS} | {Setup(128, rank=rank) for rank in RANKS}
    return [AIM, AIM._replace(targets=ATTENTION), *(() if quick else sorted(growth))]


def batch(rows: int) -> dict[str, Any]:
    """Tokens of so many queries."""
    from transformers import AutoTokenizer

    texts = [q.text for q in corpus.queries(corpus.passages())][:rows]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    return dict(
        tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS,
                  return_tensors="pt")
    )  # fmt: skip


def _in_peft(model: Any, setup: Setup) -> Any:
    """Drawn adapters on a copy of the model."""
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(r=setup.rank, lora_alpha=2 * setup.rank, init_lora_weights=False,
                             target_modules=[*setup.targets])  # fmt: skip
    made = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="a0")
    for i in range(1, setup.adapters):
        made.add_adapter(f"a{i}", config)
    return made.eval()


def contenders(model: Any, setup: Setup) -> Calls:
    """Ours, PEFT's two ways and the bare model; ours and PEFT's are held to each other here."""
    import torch

    tokens, peer = batch(setup.rows), _in_peft(model, setup)
    names = [f"a{i}" for i in range(setup.adapters)]
    ours = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        le.attach(ours, {name: Path(folder, name) for name in names})
    named = [names[i % setup.adapters] for i in range(setup.rows)]
    rows = [torch.arange(i, setup.rows, setup.adapters) for i in range(setup.adapters)]
    parts = [{key: value[at] for key, value in tokens.items()} for at in rows]

    def each() -> Any:
        found = []
        for name, part in zip(names, parts, strict=True):
            peer.set_adapter(name)
            found.append(peer(**part).last_hidden_state)
        return torch.cat(found)[torch.cat(rows).argsort()]

    calls: Calls = {
        OURS: lambda: ours(**tokens, adapter_names=named).last_hidden_state,
        PEFT: lambda: peer(**tokens, adapter_names=named).last_hidden_state,
        EACH: each,
        BARE: lambda: model(**tokens).last_hidden_state,
    }
    with torch.inference_mode():
        want, base = each(), calls[BARE]()
        for name in (OURS, PEFT):
            torch.testing.assert_close(calls[name](), want, rtol=1e-3, atol=1e-3)
    if not (want - base).abs().amax((1, 2)).min() > 0.1:
        raise RuntimeError("expected adapters that every row shows, got some that change nothing")
    return calls


def base_rows(model: Any) -> Calls:
    """The attached model that serves no adapter, and the bare one."""
    import torch

    tokens, attached = batch(AIM.rows), copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        _in_peft(model, AIM._replace(adapters=1)).save_pretrained(folder)
        le.attach(attached, {"a0": Path(folder, "a0")})
    named = ["__base__"] * AIM.rows
    calls: Calls = {
        BASE: lambda: attached(**tokens, adapter_names=named).last_hidden_state,
        BARE: lambda: model(**tokens).last_hidden_state,
    }
    with torch.inference_mode():
        torch.testing.assert_close(calls[BASE](), calls[BARE](), rtol=0, atol=0)
    return calls


def timed(calls: Calls, rounds: int, tick: Callable[[], None]) -> tuple[Times, float]:
    """Seconds of each call in the quieter half of the rounds; and the most that our threads waited
    for a CPU in a round kept, per second of it."""
    import torch

    clock = process_time if torch.get_num_threads() == 1 else perf_counter
    taken: list[tuple[float, dict[str, float]]] = []
    with torch.inference_mode():
        for call in calls.values():
            call()
        for turn in range(rounds):
            times = {}
            start, waited = perf_counter(), waiting_seconds()
            for name in [*calls] if turn % 2 == 0 else reversed([*calls]):
                before = clock()
                calls[name]()
                times[name] = clock() - before
            taken.append(((waiting_seconds() - waited) / (perf_counter() - start), times))
            tick()
    kept = sorted(taken, key=lambda one: one[0])[: (rounds + 1) // 2]
    return {name: np.array([times[name] for _, times in kept]) for name in calls}, kept[-1][0]


def row(times: Times, waited: float, **about: Any) -> dict[str, Any]:
    """What was measured of one set of contenders: milliseconds a batch, ratios to the first."""
    first = next(iter(times))
    return about | {
        "ms": {name: spread(taken * 1e3)._asdict() for name, taken in times.items()},
        "ratio": {name: ratio(times, name, first)._asdict() for name in times if name != first},
        "waited": round(waited, 3),
    }


def measure(rounds: int, quick: bool) -> dict[str, Any]:
    """All of it; quick: without growth."""
    from transformers import AutoModel

    head = environment.describe()
    threads = environment.one_thread_count()
    model, wanted = AutoModel.from_pretrained(model_folder()).eval(), setups(quick)
    with Bar("rounds", (len(wanted) + 4) * rounds) as bar:
        base = row(*timed(base_rows(model), 4 * rounds, lambda: bar.advance(1)))
        found = []
        for setup in wanted:
            calls = contenders(model, setup)
            if setup.rows != AIM.rows:
                del calls[EACH]  # seconds a call, and no rival
            times, waited = timed(calls, rounds, lambda: bar.advance(1))
            found.append(row(times, waited, **setup._asdict()))
    faster, slower = found[0]["ratio"][PEFT]["median"], 1 / base["ratio"][BARE]["median"]
    aims = {
        "times PEFT's throughput": {"wanted": FASTER, "got": faster, "met": faster >= FASTER},
        "time of base rows over the bare model's": {
            "allowed": SLOWER, "got": slower, "met": slower <= SLOWER,
        },
    }  # fmt: skip
    load = {"before": head["machine"]["load_average"], "after": os.getloadavg()[0]}
    # fmt: off
    return {"schema": SCHEMA, "schema_version": 2, **head, "tokens": TOKENS, "rounds": rounds,
            "threads": threads, "load": load, "setups": found, "base": base, "aims": aims}
    # fmt: on


# ---- shown ------------------------------------------------------------------


def table(result: dict[str, Any]) -> Iterator[str]:
    """As markdown."""
    yield "| adapters | rank | layers | rows | ours, ms | PEFT | one forward each | no adapters |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in result["setups"]:
        layers = "all linear" if tuple(one["targets"]) == ALL else ", ".join(one["targets"])
        cells = [
            one["adapters"],
            one["rank"],
            layers,
            one["rows"],
            f"{one['ms'][OURS]['median']:.0f}",
        ]
        for name in (PEFT, EACH, BARE):
            r = one["ratio"].get(name)
            cells.append(f"{r['median']:.2f}x [{r['p10']:.2f}-{r['p90']:.2f}]" if r else "")
        yield "| " + " | ".join(map(str, cells)) + " |"


def draw(result: dict[str, Any], path: Path) -> None:
    """Time a batch, over that of the model without adapters; by number of adapters, and by rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2, sharey=True)
    fixed = {"adapters": ("rank", AIM.rank), "rank": ("adapters", AIM.adapters)}
    growth = [one for one in result["setups"] if one["rows"] != AIM.rows]
    for axis, (over, (other, value)) in zip(axes, fixed.items(), strict=True):
        points = sorted((g for g in growth if g[other] == value), key=lambda g: int(g[over]))
        at = [g[over] for g in points]
        for name, colour in ((OURS, "#0072B2"), (PEFT, "#D55E00"), (BARE, "black")):
            times = [g["ms"][name]["median"] / g["ms"][BARE]["median"] for g in points]
            axis.plot(at, times, "--" if name == BARE else "o-", color=colour, label=name)
        axis.set_xscale("log", base=2)
        axis.set(xlabel=over, title=f"{other} {value}", xticks=at, xticklabels=at)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"time of 128 rows of {TOKENS} tokens,\nover the model without adapters")
    axes[0].legend(fontsize=9)
    figure.savefig(path)


def main() -> int:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.serving", None, __doc__, formatter_class=text)
    parser.add_argument("--rounds", type=int, default=13, help="a setup")
    parser.add_argument("--quick", action="store_true", help="without growth")
    parser.add_argument("--out", type=Path, default=Path("bench_output"), help="folder")
    parser.add_argument("--threads", type=int, help="of torch and the engine; else all")
    args = parser.parse_args()
    if args.threads is not None:
        le.set_num_threads(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    result = measure(args.rounds, args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
    written = "serving.json"
    if not args.quick:
        draw(result, args.out / "serving.png")
        written += ", serving.png"
    print(*table(result), sep="\n")
    for name, aim in result["aims"].items():
        print(f"{name}: {aim['got']:.3f}, {'met' if aim['met'] else 'MISSED'}")
    print(f"load {result['load']['before']:.1f} to {result['load']['after']:.1f};"
          f" in {args.out}: {written}", file=sys.stderr)  # fmt: skip
    return 0 if all(aim["met"] for aim in result["aims"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
