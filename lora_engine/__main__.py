"""``python -m lora_engine``: where the C library that came with the package lies."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_engine import _C


def main(argv: list[str] | None = None) -> int:
    """Prints what was asked for, a line each; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lora_engine", description=__doc__)
    parser.add_argument("--include-dir", action="store_true", help="the folder of lora_engine.h")
    parser.add_argument("--cmake-dir", action="store_true", help="for lora_engine_DIR of CMake")
    parser.add_argument("--libs", action="store_true", help="what to link with, as flags")
    args = parser.parse_args(argv)
    installed = Path(_C.__file__).parent  # of an editable install, too
    lib = installed / "lib"
    answers = {
        "include_dir": str(installed / "include"),
        "cmake_dir": str(lib / "cmake" / "lora_engine"),
        "libs": f"-L{lib} -Wl,-rpath,{lib} -llora_engine",
    }
    asked = [text for name, text in answers.items() if getattr(args, name)]
    if not asked:
        parser.error("expected --include-dir, --cmake-dir or --libs; the commands: lora-engine -h")
    print("\n".join(asked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
