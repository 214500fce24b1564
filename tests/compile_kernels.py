"""A process of its own that compiles kernels: TRITON_INTERPRET must not be set in it.

Reads jobs from stdin, one JSON line each, and answers each with one JSON line; ends with
stdin. A compilation that hangs is ended by SIGALRM, and the process with it.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import cache
from typing import Any

from helpers_kernels import variants_of

from lora_engine.kernels.compiled import compile_variant, problems, resources
from lora_engine.kernels.launch import DEVICES, Variant

TIMEOUT = 120  # seconds for one compilation, on the slowest machine


@cache
def variants(module: str, device: str, tuned: bool) -> tuple[Variant, ...]:
    return tuple(variants_of(module, DEVICES[device], tuned))


def answer(module: str, device: str, index: int, plain: bool, tuned: bool) -> dict[str, Any]:
    """What the variant takes, and what is wrong with it."""
    variant = variants(module, device, tuned)[index]
    signal.alarm(TIMEOUT)
    try:
        used = resources(compile_variant(variant, DEVICES[device], plain))
    except Exception as error:  # Triton's, LLVM's, ptxas': of any class
        return {"variant": variant.name, "problems": [reason(error)]}
    finally:
        signal.alarm(0)
    found = problems(variant, DEVICES[device], used)
    return {"variant": variant.name, "problems": found, **used._asdict()}


def reason(error: BaseException) -> str:
    """The first cause: Triton wraps it once for every function that was inlined."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])[:400]}"


def main() -> None:
    replies = sys.stdout
    sys.stdout = sys.stderr  # what the compiler prints is no answer
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
