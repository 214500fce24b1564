"""The ``lora-engine`` command."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from lora_engine import inspect_command, merge_command
from lora_engine.tuning import command


def _doctor(_: argparse.Namespace) -> int:
    """What is there, and why what is not is not."""
    import lora_engine as le
    from lora_engine.backends import chosen

    print(f"lora_engine {le.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(f"threads: {le.get_num_threads()}")
    for name, about in le.backends().items():
        print(f"backend {name}: {about}")
    for package in ("numpy", "safetensors", "torch", "triton", "transformers", "peft"):
        try:
            print(f"{package}: {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package}: not installed")
    try:
        chosen()
    except RuntimeError as error:
        print(f"what the environment asks for cannot be had: {error}", file=sys.stderr)
        return 1
    return 0


def _demo(args: argparse.Namespace) -> int:
    if args.serve is not None and not args.text:
        print("demo: --serve: expected --text with it", file=sys.stderr)
        return 2
    extra = "text" if args.text else "demo"
    try:
        if args.learning:
            from lora_engine.evidence import report

            return report.run(out=args.out)
        if args.text:
            return _text_demo(args)
        from lora_engine import demo
    except ModuleNotFoundError as missing:
        print(f"the demo needs {missing.name}: pip install 'lora-engine[{extra}]'", file=sys.stderr)
        return 1
    return demo.run(rounds=args.rounds, out=args.out)


def _text_demo(args: argparse.Namespace) -> int:
    if args.serve is not None:
        from lora_engine.text_demo import serve

        return serve.run(args.serve, args.out)
    from lora_engine.text_demo import report

    return report.run(out=args.out)


def _bench(args: argparse.Namespace) -> int:
    """The benchmarks stand beside the package's source, not in the installed package."""
    import lora_engine as le

    for root in (Path.cwd(), Path(le.__file__).parents[1]):
        if (root / "bench" / "command.py").is_file() and (root / "lora_engine").is_dir():
            sys.path.insert(0, str(root))
            break
    else:
        print(
            "the benchmarks are in the source of lora_engine, not in the installed package: run"
            " this in a checkout",
            file=sys.stderr,
        )
        return 1
    try:
        from bench import command as benchmarks
    except ModuleNotFoundError as missing:
        print(f"bench needs {missing.name}: pip install '.[bench]'", file=sys.stderr)
        return 1
    return int(benchmarks.main(args.rest))


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lora-engine", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is there, and which instruction set runs")
    doctor.set_defaults(run=_doctor)
    demo = commands.add_parser("demo", help="64 users' handwriting, one adapter each, learned live")
    demo.add_argument("--rounds", type=int, default=600, help="rounds of 64 images (600)")
    demo.add_argument("--out", default="demo_output", help="folder for adapters and picture")
    demo.add_argument(
        "--learning",
        action="store_true",
        help="instead: experiments on what learning keeps and gains, with pictures; minutes",
    )
    demo.add_argument(
        "--text",
        action="store_true",
        help="instead: search in Python's documentation that learns from clicks, with MiniLM",
    )
    demo.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=8417,
        metavar="PORT",
        help="with --text: as a page on this machine's loopback alone (port 8417)",
    )
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser(
        "inspect",
        help="what adapter folders adapt: ranks, norms, singular values, size",
        description=inspect_command.__doc__,
    )
    inspect_command.add_arguments(inspect)
    inspect.set_defaults(run=inspect_command.run)
    tune = commands.add_parser("tune", help="measure what is quickest on this CPU and GPU")
    command.add_arguments(tune)
    tune.set_defaults(run=command.run)
    merge = commands.add_parser("merge", help="merge PEFT adapter folders into one")
    merge_command.add_arguments(merge)
    merge.set_defaults(run=merge_command.run)
    bench = commands.add_parser(
        "bench", add_help=False, help="latencies against peers, as a page to look at; in a checkout"
    )
    bench.set_defaults(run=_bench)
    args, rest = parser.parse_known_args(argv)
    if rest and args.run is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest  # bench reads its own arguments
    try:
        status = int(args.run(args))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
