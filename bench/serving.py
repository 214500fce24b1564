"""MiniLM serving many adapters in one batch, against PEFT: ``python -m bench.serving``.

One batch of 128 sentences of Python's documentation, padded to 32 tokens, through
all-MiniLM-L6-v2 (float32) with adapters on the attention's query and value projections of all six
layers. The same adapters in ``lora_engine.attach``, in PEFT's ``adapter_names`` and as one forward
an adapter with its rows alone (PEFT, ``set_adapter``). Rows take the adapters in turn. Before
anything is timed the outputs are held to PEFT's. Contenders take turns in rounds; ratios are
within a round, medians over rounds, with the 10th and 90th percentile.

Base rows: the attached model whose rows all name ``__base__`` against the bare model.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

import lora_engine as le
from bench import environment
from bench.paired import Times, ratio, spread, waiting_seconds
from lora_engine.text_demo import corpus
from lora_engine.text_demo.encoder import model_folder

ROWS, TOKENS, RANK, ADAPTERS = 128, 32, 8, 32
COUNTS = (1, 8, 32, 128)
RANKS = (1, 4, 16, 64)
TARGETS = ("query", "value")
OURS, PEFT, EACH, BARE, BASE = "lora_engine", "PEFT", "one forward each", "bare", "base rows"
FASTER, SLOWER = 2.0, 1.03  # than PEFT, wanted; than the bare model, allowed
SCHEMA = "lora_engine serving"

Calls = dict[str, Callable[[], Any]]


def batch() -> dict[str, Any]:
    """Tokens of ROWS sentences, on which nothing but their number depends."""
    from transformers import AutoTokenizer

    texts = [q.text for q in corpus.queries(corpus.passages())][:ROWS]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    return dict(
        tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS,
                  return_tensors="pt")
    )  # fmt: skip


def _in_peft(model: Any, count: int, rank: int) -> Any:
    """``count`` drawn adapters on a copy of the model."""
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*TARGETS],
                             init_lora_weights=False)  # fmt: skip
    made = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="a0")
    for i in range(1, count):
        made.add_adapter(f"a{i}", config)
    return made.eval()


def _names(count: int) -> list[str]:
    return [f"a{i % count}" for i in range(ROWS)]


def contenders(model: Any, tokens: dict[str, Any], count: int, rank: int) -> Calls:
    """Ours and PEFT's two ways, which are held to each other here."""
    import torch

    peer = _in_peft(model, count, rank)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        names = [f"a{i}" for i in range(count)]
        ours = copy.deepcopy(model)
        handle = le.attach(ours, {name: Path(folder, name) for name in names})
    named = _names(count)
    rows = [torch.arange(i, ROWS, count) for i in range(count)]
    parts = [{key: value[at] for key, value in tokens.items()} for at in rows]

    def each() -> Any:
        out: Any = None
        for name, at, part in zip(names, rows, parts, strict=True):
            peer.set_adapter(name)
            found = peer(**part).last_hidden_state
            if out is None:
                out = torch.empty(ROWS, *found.shape[1:])
            out[at] = found
        return out

    def together() -> Any:
        return peer(**tokens, adapter_names=named).last_hidden_state

    def served() -> Any:
        return ours(**tokens, adapter_names=named).last_hidden_state

    with torch.inference_mode():
        want = each()
        for call in (served, together):
            torch.testing.assert_close(call(), want, rtol=1e-3, atol=1e-4)
    assert len(handle.names) == count
    return {OURS: served, PEFT: together, EACH: each}


def base_rows(model: Any, tokens: dict[str, Any]) -> Calls:
    """The attached model that serves no adapter, and the bare one."""
    attached = copy.deepcopy(model)
    lora = le.MicroLoRA(
        le.MicroLoRAConfig(model.config.hidden_size, model.config.hidden_size, rank=RANK,
                           target_modules=TARGETS)
    )  # fmt: skip
    le.attach(attached, {"a0": lora})
    named = ["__base__"] * ROWS
    return {
        BASE: lambda: attached(**tokens, adapter_names=named).last_hidden_state,
        BARE: lambda: model(**tokens).last_hidden_state,
    }


def timed(calls: Calls, rounds: int) -> tuple[Times, float]:
    """Seconds of each call in each round, A B C, C B A; and waiting for a CPU per second."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        start, waited = perf_counter(), waiting_seconds()
        for turn in range(rounds):
            for name in [*calls] if turn % 2 == 0 else reversed([*calls]):
                before = perf_counter()
                calls[name]()
                times[name].append(perf_counter() - before)
    share = (waiting_seconds() - waited) / (perf_counter() - start)
    return {name: np.array(taken) for name, taken in times.items()}, share


def row(times: Times, waited: float, **about: Any) -> dict[str, Any]:
    """What was measured of one set of contenders: milliseconds a batch, ratios to the first."""
    first = next(iter(times))
    return about | {
        "ms": {name: spread(taken * 1e3)._asdict() for name, taken in times.items()},
        "ratio": {name: ratio(times, name, first)._asdict() for name in times if name != first},
        "waited": round(waited, 3),
    }


def measure(rounds: int, quick: bool) -> dict[str, Any]:
    """All of it; quick: the two aims alone."""
    from transformers import AutoModel

    head = environment.describe()
    environment.one_thread_count()
    model, tokens = AutoModel.from_pretrained(model_folder()).eval(), batch()
    points = {(ADAPTERS, RANK)}
    if not quick:
        points |= {(count, RANK) for count in COUNTS} | {(ADAPTERS, rank) for rank in RANKS}
    growth = []
    for count, rank in sorted(points):
        times, waited = timed(contenders(model, tokens, count, rank), rounds)
        growth.append(row(times, waited, adapters=count, rank=rank))
        print(_line(growth[-1]), flush=True)
    base = row(*timed(base_rows(model, tokens), 3 * rounds))
    at = next(g for g in growth if (g["adapters"], g["rank"]) == (ADAPTERS, RANK))
    faster, slower = at["ratio"][PEFT]["median"], 1 / base["ratio"][BARE]["median"]
    aims = {
        "faster than PEFT": {"wanted": FASTER, "got": faster, "met": faster >= FASTER},
        "base rows' time": {"allowed": SLOWER, "got": slower, "met": slower <= SLOWER},
    }
    load = {"before": head["machine"]["load_average"], "after": os.getloadavg()[0]}
    # fmt: off
    return {"schema": SCHEMA, "schema_version": 1, **head, "rows": ROWS, "tokens": TOKENS,
            "rounds": rounds, "load": load, "growth": growth, "base": base, "aims": aims}
    # fmt: on


def _line(found: dict[str, Any]) -> str:
    ms = ", ".join(f"{name} {s['median']:.1f}" for name, s in found["ms"].items())
    times = ", ".join(f"{name} {s['median']:.2f}x" for name, s in found["ratio"].items())
    about = f"{found['adapters']} adapters, rank {found['rank']}"
    return f"{about}: ms a batch: {ms}; over ours: {times}; waited {found['waited']:.2f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Time a batch over the number of adapters, and over the rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2, sharey=True)
    fixed = {"adapters": ("rank", RANK), "rank": ("adapters", ADAPTERS)}
    for axis, (over, (other, value)) in zip(axes, fixed.items(), strict=True):
        points = [g for g in result["growth"] if g[other] == value]
        for name, colour in ((OURS, "#0072B2"), (PEFT, "#D55E00"), (EACH, "#999999")):
            ms = [g["ms"][name] for g in points]
            at = [g[over] for g in points]
            axis.plot(at, [m["median"] for m in ms], "o-", color=colour, label=name)
            axis.fill_between(
                at, [m["p10"] for m in ms], [m["p90"] for m in ms], color=colour, alpha=0.15
            )
        bare = result["base"]["ms"][BARE]["median"]
        axis.axhline(bare, color="black", linestyle="--", linewidth=1, label="no adapters")
        axis.set_xscale("log", base=2)
        axis.set(xlabel=over, title=f"{other} {value}", xticks=at, xticklabels=at)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"ms a batch of {ROWS} x {TOKENS} tokens")
    axes[0].legend(fontsize=9)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="32 adapters and the base alone")
    parser.add_argument("--out", type=Path, default=Path("bench_output"), help="folder")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    result = measure(args.rounds, args.quick)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out / "serving.png")
    for name, aim in result["aims"].items():
        print(f"{name}: {aim['got']:.3f}, {'met' if aim['met'] else 'MISSED'}")
    print(f"load {result['load']['before']:.1f} to {result['load']['after']:.1f};"
          f" written to {args.out}: serving.json, serving.png")  # fmt: skip
    return 0 if all(aim["met"] for aim in result["aims"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
