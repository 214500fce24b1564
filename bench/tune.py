"""``python -m bench.tune``: the same as ``lora-engine tune``, from a checkout."""

from __future__ import annotations

import sys

from lora_engine.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
