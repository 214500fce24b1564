"""``lora-engine merge``: several PEFT folders into one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_engine.adapters.merge import MergedModule, merge
from lora_engine.adapters.merge_inputs import METHODS
from lora_engine.progress import Bar

SHOWN = 40  # modules in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER[:WEIGHT]", help="adapters and weights (1)"
    )
    parser.add_argument("--method", choices=METHODS, default="svd", help="how to merge (svd)")
    parser.add_argument("--rank", type=int, help="largest rank of the result")
    parser.add_argument("--density", type=float, help="part kept by methods that prune")
    parser.add_argument(
        "--majority-sign-method", choices=("total", "frequency"), default="total",
        help="how ties elects signs (total)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of what dare drops (0)")
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")


def folder_and_weight(given: str) -> tuple[str, float]:
    """ "a:-0.5" is ("a", -0.5), unless there is a folder of that whole name."""
    folder, colon, weight = given.rpartition(":")
    if not colon or os.path.isdir(given):
        return given, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        return given, 1.0


def _table(modules: Sequence[MergedModule]) -> None:
    """The modules, where they are many those whose cut lost most."""
    ordered = sorted(modules, key=lambda m: -m.error) if len(modules) > SHOWN else list(modules)
    shown = ordered[:SHOWN]
    width = max(len(m.name) for m in shown)
    print(f"{'module':{width}}  {'ranks':>16}  {'rank':>5}  {'cut off':>8}")
    for m in shown:
        ranks = "+".join(map(str, m.ranks))
        print(f"{m.name:{width}}  {ranks:>16}  {m.rank:5}  {m.error:8.2%}")
    if len(ordered) > SHOWN:
        print(f"and {len(ordered) - SHOWN} modules of which at most {ordered[SHOWN].error:.2%} is")


def run(args: argparse.Namespace) -> int:
    """Merges and writes; returns the exit status. Stopped, it leaves OUT as it was."""
    out = Path(args.out)
    if not args.force and (out.exists() or out.is_symlink()):
        print(f"{out}: expected a new folder, got one that exists (--force)", file=sys.stderr)
        return 1
    pairs = [folder_and_weight(given) for given in args.folders]
    try:
        with Bar("merging") as bar:

            def on_module(total: int, _: MergedModule) -> None:
                bar.total = total
                bar.advance(1)

            merged = merge(
                pairs, args.method, args.rank, density=args.density,
                majority_sign_method=args.majority_sign_method, seed=args.seed,
                on_module=on_module,
            )  # fmt: skip
        merged.adapter.save(out)
    except (ValueError, OSError) as error:  # FormatError is a ValueError
        print(error, file=sys.stderr)
        return 1
    _table(merged.modules)
    size = (out / "adapter_model.safetensors").stat().st_size
    names = ", ".join(f"{weight:g} {folder}" for folder, weight in pairs)
    print(f"{args.method} of {names}: {len(merged.modules)} modules, {size / 1e6:.1f} MB in {out}")
    return 0
