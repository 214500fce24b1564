"""python -m bench.readme: the README's speed table from the results file that it names.

python -m bench.readme          # exit 1 where the README says something else
python -m bench.readme --write  # puts the table there
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- speed table: (?P<file>\S+) -->\n)(?P<table>.*?)(<!-- end -->)", re.S)


def _us(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _times(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.2g}x"


def _aim(text: str, met: bool | None, noisy: bool) -> str:
    return f"{text}{', not judged' if noisy else '' if met else ', missed'}"


def _against(row: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(against, ratio, aim) of everything that something was aimed at."""
    noisy, floor = row["noisy"], row["floor"]
    for peer in row["peers"]:
        if "absent" in peer:
            if peer.get("wanted"):
                yield peer["name"], "absent", _aim(f"{peer['wanted']:.2g}x", None, True)
            continue
        if peer.get("wanted"):
            r = peer["ratio"]
            text = f"{_times(r['median'])} [{_times(r['p10'])[:-1]}-{_times(r['p90'])[:-1]}]"
            yield peer["name"], text, _aim(f"{peer['wanted']:.2g}x", peer["met"], noisy)
        if "extra_ms" in peer:
            e = peer["extra_ms"]
            aim = _aim(f"{peer['wanted_extra_ms']:g} ms", peer["met"], noisy)
            peer_name = peer["name"] if " " in peer["name"] else f"`import {peer['name']}`"
            yield peer_name, f"{e['median']:.0f} ms more", aim
    if floor and floor["within"]:
        a = floor["achieved_over_floor"]
        text = f"takes {a['median']:.1f}x the floor [{a['p10']:.1f}-{a['p90']:.1f}]"
        yield "bytes over bandwidth", text, _aim(f"{floor['within']}x", floor["met"], noisy)


def table(results: dict[str, Any]) -> str:
    """Markdown: what was aimed at, and what was measured."""
    lines = [
        "| op and shape | ours, us | against | ratio [p10-p90] | aim |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        head = f"`{row['op']}`, {row['shape']}"
        if "ours" not in row:
            why = "wrong" if "wrong" in row else "absent"
            lines.append(f"| {head} | {why} |  |  |  |")
            continue
        time = _us(row["ours"]["median_us"])
        for against, ratio, aim in _against(row):
            lines.append(f"| {head} | {time} | {against} | {ratio} | {aim} |")
            head = time = ""
    return "\n".join(lines) + "\n"


def generated(readme: str) -> str:
    """The README with its table as the results file has it."""

    def block(found: re.Match[str]) -> str:
        return found[1] + table(json.loads((ROOT / found["file"]).read_text())) + found[4]

    text, count = BLOCK.subn(block, readme)
    if count != 1:
        raise SystemExit(f"{README.name}: expected one speed table between its marks, got {count}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    readme = README.read_text()
    wanted = generated(readme)
    if args.write:
        README.write_text(wanted)
        return 0
    if readme != wanted:
        print("README.md: the speed table is not that of its results file: python -m bench.readme"
              " --write")  # fmt: skip
        return 1
    print("README.md has the table of its results file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
