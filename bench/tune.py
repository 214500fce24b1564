"""``python -m bench.tune``: the same as ``lora-engine tune``, from a checkout."""

from __future__ import annotations

import sys

try:
    from lora_engine.cli import main
except ImportError as missing:
    sys.exit(
        f"bench.tune: this checkout's lora_engine cannot be imported ({missing}): run"
        " pip install -e '.[bench]' here, or `lora-engine tune`, which takes the installed one"
    )

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
