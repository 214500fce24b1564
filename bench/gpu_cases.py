"""All cases of the GPU suite. Builders are named as "module:function", so that the list can be
read, and tested, where torch sees no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

from bench import gpu_case as sizes
from bench.case import OURS
from bench.gpu_case import FEATURES, Case, Timed

PEFT, TORCH, DENSE, BITSANDBYTES = "PEFT's layer", "torch eager", "dense torch", "bitsandbytes"
BASELINE, GATHER, SORTED = "zeroing + shrink + expand", "gather + bmm", "sorted rows + addmm"
COPIES = "torch mul_ + addcmul_"
ITEM = {"float32": 4, "bfloat16": 2}
MILLION = 1 << 20


def call(path: str, *arguments: Any) -> Any:
    """``bench.MODULE:FUNCTION`` called; "torch.x" among the arguments is that dtype."""
    module, name = path.split(":")
    given = [dtype(a[6:]) if str(a).startswith("torch.") else a for a in arguments]
    return getattr(import_module(f"bench.{module}"), name)(*given)


def dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def make(path: str, *arguments: Any) -> Callable[[int], Any]:
    """Of inputs: ``path`` with these arguments gives what takes the number of sets."""
    return lambda sets: call(path, *arguments)(sets)


def by(path: str) -> Callable[[Any], Timed]:
    return partial(call, path)


def _rows(n: int, adapters: int, rank: int, kind: str) -> Callable[[int], Any]:
    return make("gpu_adapters:rows", n, adapters, rank, f"torch.{kind}")


def _lora_delta() -> Iterator[Case]:
    for n, expected in ((1, 5.0), (512, 7.0), (4096, 25.0)):
        yield Case(
            "lora_delta", f"{n} rows, r=16, bfloat16", ("test_triton_lora_delta",),
            sizes.delta_bytes(n, 1, 16, 2), _rows(n, 1, 16, "bfloat16"),
            {OURS: by("gpu_adapters:single_ours"), TORCH: by("gpu_adapters:single_torch"),
             PEFT: by("gpu_adapters:single_peft")},
            expected_us=expected,
        )  # fmt: skip


def _batched() -> Iterator[Case]:
    tests = ("test_triton_batched", "test_triton_pool")
    ours = {OURS: by("gpu_adapters:batched_ours")}
    for rank, expected, within in ((16, 8.0, 2.0), (2, 5.0, None)):
        yield Case(
            "batched_lora_delta", f"64 rows on 64 adapters, r={rank}, bfloat16", tests,
            sizes.delta_bytes(64, 64, rank, 2), _rows(64, 64, rank, "bfloat16"),
            {**ours, BASELINE: by("gpu_adapters:batched_baseline"),
             GATHER: by("gpu_adapters:batched_gather")},
            expected_us=expected, within=within, faster={BASELINE: 1.5}, launches=2,
        )  # fmt: skip
    yield Case(
        "batched_lora_delta", "4096 rows on 8 adapters, r=16, bfloat16", tests,
        sizes.delta_bytes(4096, 8, 16, 2), _rows(4096, 8, 16, "bfloat16"),
        {**ours, SORTED: by("gpu_adapters:batched_sorted")}, expected_us=40.0, launches=2,
    )  # fmt: skip


def _adapt() -> Iterator[Case]:
    tests = ("test_triton_adapt", "test_triton_pool")
    gather = {"torch, gather + bmm": by("gpu_adapters:adapt_gather")}
    runs = {"torch, adapter by adapter": by("gpu_adapters:adapt_sorted")}
    for n, users, rank, kind, expected, peers in (
        (256, 256, 2, "float32", 45.0, gather),
        (256, 256, 2, "bfloat16", 35.0, gather),
        (64, 64, 16, "bfloat16", 45.0, gather),
        (4096, 8, 16, "bfloat16", 400.0, runs),
    ):
        yield Case(
            "batched_adapt", f"{n} rows of {users} users, r={rank}, {kind}", tests,
            sizes.adapt_bytes(n, users, rank, ITEM[kind]), _rows(n, users, rank, kind),
            {OURS: lambda data: call("gpu_adapters:adapt_ours")(data), **peers},
            expected_us=expected,
        )  # fmt: skip
    for form, rank, kind, expected, record in (
        ("factor", 2, "float32", None, sizes.factor_bytes(256, 2)),
        ("delta", 2, "bfloat16", 95.0, sizes.delta_record_bytes(256, 2)),
        ("delta", 16, "bfloat16", 650.0, sizes.delta_record_bytes(256, 16)),
    ):
        yield Case(
            "batched_adapt with EWC", f"{form} form, 256 rows of 256 users, r={rank}, {kind}",
            ("test_triton_adapt", "test_triton_ewc"),
            sizes.adapt_bytes(256, 256, rank, ITEM[kind]) + record, _rows(256, 256, rank, kind),
            {OURS: lambda data, form=form: call("gpu_adapters:adapt_ours", form)(data)},
            expected_us=expected,
        )  # fmt: skip


def _nf4_linear() -> Iterator[Case]:
    tests = ("test_triton_nf4",)
    peers = {DENSE: by("gpu_nf4:linear_dense"), BITSANDBYTES: by("gpu_nf4:linear_bitsandbytes")}
    for n, expected in ((1, 5.2), (8, None), (16, 7.5), (32, None), (64, None), (4096, 260.0)):
        wanted = {DENSE: 1.0} if n <= 64 else {}
        if 8 <= n <= 64:
            wanted[BITSANDBYTES] = 1.5
        yield Case(
            "nf4_linear", f"4096 x 4096, {n} rows, bfloat16", tests, sizes.nf4_bytes(n),
            make("gpu_nf4:matrices", n), {OURS: by("gpu_nf4:linear_ours"), **peers},
            expected_us=expected, within=1.5 if n == 1 else None, faster=wanted,
        )  # fmt: skip
    for n in (8, 64):
        yield Case(
            "nf4_linear with adapters", f"4096 x 4096, {n} rows on 8 adapters, r=16, bfloat16",
            (*tests, "test_triton_pool"), sizes.nf4_bytes(n) + sizes.weights(8, 16, 2),
            make("gpu_nf4:matrices", n),
            {OURS: by("gpu_nf4:linear_with_adapters"),
             "nf4_linear alone": by("gpu_nf4:linear_ours")},
        )  # fmt: skip
    for n in (16, 4096):
        yield Case(
            "nf4_linear backward", f"4096 x 4096, {n} rows, bfloat16", tests, sizes.nf4_bytes(n),
            make("gpu_nf4:matrices", n),
            {OURS: by("gpu_nf4:backward_ours"), DENSE: by("gpu_nf4:backward_dense")},
        )  # fmt: skip


def _nf4_format() -> Iterator[Case]:
    tests, elements = ("test_triton_nf4",), FEATURES**2
    for kind, expected in (("float32", 24.0), ("bfloat16", 15.0)):
        yield Case(
            "nf4_dequantize", f"4096 x 4096 to {kind}", tests,
            sizes.packed_bytes() + elements * ITEM[kind],
            make("gpu_nf4:matrices", 1, f"torch.{kind}"),
            {OURS: by("gpu_nf4:dequantize_ours"), TORCH: by("gpu_nf4:dequantize_torch")},
            expected_us=expected,
        )  # fmt: skip
    yield Case(
        "nf4_quantize", "4096 x 4096 of float32", tests, sizes.packed_bytes() + elements * 4,
        make("gpu_nf4:matrices", 1), {OURS: by("gpu_nf4:quantize_ours")}, expected_us=40.0,
    )  # fmt: skip


def _fisher() -> Iterator[Case]:
    tests = ("test_triton_fisher",)
    for elements, kind, expected, of_copy in (
        (16 * MILLION, "float32", 50.0, 0.9),
        (16 * MILLION, "bfloat16", 26.0, 0.9),
        (64 * 1024, "float32", 2.0, None),
    ):
        yield Case(
            "fisher_accumulate", f"{elements // 1024} K elements, {kind}", tests,
            3 * elements * ITEM[kind], make("gpu_fisher:flat", elements, f"torch.{kind}", 2),
            {OURS: by("gpu_fisher:accumulate_ours"), COPIES: by("gpu_fisher:accumulate_torch")},
            expected_us=expected, of_copy=of_copy,
        )  # fmt: skip
    for n, rank, kind, expected in ((256, 2, "float32", 15.0), (4096, 16, "bfloat16", 60.0)):
        yield Case(
            "lora_fisher", f"{n} samples, r={rank}, {kind}", tests,
            sizes.fisher_bytes(n, rank, ITEM[kind]), _rows(n, 1, rank, kind),
            {OURS: by("gpu_fisher:fisher_ours"), TORCH: by("gpu_fisher:fisher_torch")},
            expected_us=expected,
        )  # fmt: skip
    for n, kind, expected in ((256, "float32", 6.0), (4096, "bfloat16", 22.0)):
        yield Case(
            "lora_fisher_factors", f"{n} rows, {kind}", tests,
            2 * sizes.matrix(n, ITEM[kind]) + 2 * sizes.matrix(1, 4), _rows(n, 1, 1, kind),
            {OURS: by("gpu_fisher:factors_ours"), TORCH: by("gpu_fisher:factors_torch")},
            expected_us=expected,
        )  # fmt: skip


def _ewc_step() -> Iterator[Case]:
    for elements, kind, expected in (
        (16 * MILLION, "float32", 85.0),
        (16 * MILLION, "bfloat16", 60.0),
        (32 * 1024, "float32", 3.0),
    ):
        yield Case(
            "ewc_step", f"{elements // 1024} K elements, {kind}", ("test_triton_ewc",),
            elements * (3 * ITEM[kind] + 8),
            make("gpu_fisher:ewc_inputs", elements, f"torch.{kind}"),
            {OURS: by("gpu_fisher:step_ours"), TORCH: by("gpu_fisher:step_torch")},
            expected_us=expected,
        )  # fmt: skip


# The most important first, should the time not do for all.
CASES = tuple(
    case
    for family in (
        _batched, _lora_delta, _nf4_linear, _adapt, _fisher, _ewc_step, _nf4_format,
    )
    for case in family()
)  # fmt: skip
