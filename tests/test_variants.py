"""LoRA-FA, LoRA+ and rsLoRA against PEFT; Delta-LoRA, int8, dynamic rank, long inputs."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_merge import delta, gap, random_adapter

import lora_engine as le
from lora_engine import reference
from lora_engine.adapters.adapter import LoraWeights
from lora_engine.adapters.variants.resize import singular_values

RNG = np.random.default_rng

# ---- what the ops' own options do, as PEFT does it --------------------------


def peft_layer(use_rslora: bool = False):
    """A frozen linear layer with an adapter, and the same adapter in a pool."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(11, 7))
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["0"], use_rslora=use_rslora, init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    pool = le.AdapterPool(11, 7)
    slot = pool.add(A.detach().numpy(), B.detach().numpy(), layer.scaling["default"])
    return model, layer, A, B, pool, slot


@pytest.mark.parametrize("variant", ["lora", "rslora", "lora_fa", "lora_plus"])
def test_training_as_peft_does(variant):
    """20 steps of a regression: a torch loop over PEFT's layer, and ``adapt``."""
    from peft.optimizers import create_loraplus_optimizer

    model, layer, A, B, pool, slot = peft_layer(variant == "rslora")
    ratio = 4.0 if variant == "lora_plus" else 1.0
    if variant == "lora_fa":
        A.requires_grad_(False)
    first_A, first_B, scaling = pool.get(slot)
    assert scaling == pytest.approx(5 / np.sqrt(3) if variant == "rslora" else 5 / 3)
    lr, rows = 0.02, 6
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=lr, loraplus_lr_ratio=ratio)
    rng = RNG(1)
    for _ in range(20):
        x = rng.standard_normal((rows, 11)).astype("f4")
        target = rng.standard_normal((rows, 7)).astype("f4")
        out = layer(torch.from_numpy(x))
        # The mean over the rows of 1/2 ‖y - t‖².
        loss = 0.5 * ((out - torch.from_numpy(target)) ** 2).sum() / rows
        optimizer.zero_grad()
        loss.backward()
        ids = np.full(rows, slot, "i4")
        base = layer.get_base_layer()(torch.from_numpy(x)).detach().numpy()
        y = pool.forward(x, ids) + base
        assert np.allclose(y, out.detach().numpy(), atol=1e-4)
        optimizer.step()
        pool.adapt(x, y - target, ids, lr=lr, lr_ratio=ratio, train_A=variant != "lora_fa")
    got_A, got_B, _ = pool.get(slot)
    assert np.allclose(got_A, A.detach().numpy(), atol=1e-5)
    assert np.allclose(got_B, B.detach().numpy(), atol=1e-5)
    assert np.abs(got_B - first_B).max() > 0.05
    moved = np.abs(got_A - first_A).max()
    assert moved == 0 if variant == "lora_fa" else moved > 0.01


# ---- Delta-LoRA -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch", "bfloat16"])
@pytest.mark.parametrize("shape", [(20, 24), (1, 24), (3000, 500)], ids=str)
def test_delta_lora_moves_the_base_by_the_change(kind, shape):
    rng = RNG(0)
    pool = le.AdapterPool(shape[1], shape[0])
    draw = lambda *s: rng.standard_normal(s).astype("f4")  # noqa: E731
    slot = pool.add(draw(2, shape[1]), draw(shape[0], 2), 0.5)
    W = draw(*shape)
    before, start = pool.get(slot), W.copy()
    pool.adapt(draw(4, shape[1]), draw(4, shape[0]), np.full(4, slot, "i4"), lr=0.1)
    pool.set(slot, *le.resize_rank(pool.get(slot), 3).result)
    after = pool.get(slot)
    if kind == "numpy":
        le.delta_lora(W, before, after, ratio=0.7)
    else:
        given = torch.from_numpy(W)
        given = given.bfloat16() if kind == "bfloat16" else given
        start = given.float().numpy().copy()
        given.requires_grad_(True)
        le.delta_lora(given, before, after, ratio=0.7)
        W = given.detach().float().numpy()
    want = start + 0.7 * (delta(LoraWeights(*after)) - delta(LoraWeights(*before)))
    assert np.abs(want - start).max() > 0.01
    error = np.abs(W - want).max() / np.abs(want).max()
    assert error < (8e-3 if kind == "bfloat16" else 1e-5)


def test_delta_lora_refusals():
    weights = (np.ones((2, 5), "f4"), np.ones((4, 2), "f4"), 1.0)
    W = np.ones((4, 5), "f4")
    for call, error, message in (
        ((W.astype("f8"), weights, weights), TypeError, "W: expected float32, got float64"),
        (([1.0], weights, weights), TypeError, "W: expected a float matrix, got list"),
        ((W.T, weights, weights), ValueError, r"before: expected A \[r, in\].*W \(5, 4\)"),
        ((W, weights, weights, float("nan")), ValueError, "ratio: expected a finite number"),
        (
            (W, weights, (weights[0], weights[1] * np.nan, 1.0)),
            ValueError,
            "after: expected finite",
        ),
    ):
        with pytest.raises(error, match=f"delta_lora: {message}"):
            le.delta_lora(*call)
    frozen = W.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        le.delta_lora(frozen, weights, weights)
    assert (W == 1).all()


# ---- int8 -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6], ids=str)
def test_int8_is_within_its_bound(scale):
    A, B, scaling = random_adapter(1, {"q": 5}, 0.7).modules["q"][:3]
    A, B = A * np.float32(scale), B.copy()
    A[2] = 0
    B[:, 1] *= 1000  # each direction has a scale of its own
    q = le.Int8LoRA.from_weights(A, B, scaling)
    assert (q.A.dtype, q.B.dtype) == (np.int8, np.int8)
    got_A, got_B, got_scaling = q.dequantize()
    e_A, e_B = q.A_scales / 2, q.B_scales / 2
    slack = 1 + 1e-5
    assert (np.abs(got_A - A) <= e_A[:, None] * slack).all()
    assert (np.abs(got_B - B) <= e_B * slack).all()
    assert np.allclose(q.A_scales * 127, np.abs(A).max(axis=1))
    bound = scaling * (
        np.abs(B) @ np.broadcast_to(e_A[:, None], A.shape)
        + np.broadcast_to(e_B, B.shape) @ np.abs(A)
        + (e_B * e_A).sum()
    )
    off = np.abs(delta(LoraWeights(got_A, got_B, got_scaling)) - delta(LoraWeights(A, B, scaling)))
    assert (off <= bound * slack).all()
    assert off.max() > 0.02 * bound.max()  # the bound says something


def test_int8_memory_and_forward():
    rng = RNG(0)
    A = rng.standard_normal((16, 4096)).astype("f4")
    B = rng.standard_normal((1024, 16)).astype("f4")
    q = le.Int8LoRA.from_weights(A, B, 0.5)
    assert q.nbytes == 16 * (4096 + 1024 + 8)
    assert q.nbytes < 0.26 * (A.nbytes + B.nbytes)
    x = rng.standard_normal((3, 4096)).astype("f4")
    want = reference.lora_delta(x, *q.dequantize())
    assert gap(q.forward(x), want) < 1e-5
    assert gap(q.forward(torch.from_numpy(x)).numpy(), want) < 1e-5
    y = np.ones((3, 1024), "f4")
    assert q.forward(x, y, accumulate=True) is y
    assert gap(y, want + 1) < 1e-5
    assert gap(q.forward(x), reference.lora_delta(x, A, B, 0.5)) < 0.02
    with pytest.raises(ValueError, match="Int8LoRA: A: expected a finite matrix"):
        le.Int8LoRA.from_weights(np.full((2, 3), np.nan), np.ones((4, 2)), 1.0)
    with pytest.raises(ValueError, match=r"Int8LoRA: B: expected shape \[out, 2\]"):
        le.Int8LoRA.from_weights(np.ones((2, 3)), np.ones((4, 3)), 1.0)


# ---- dynamic rank -----------------------------------------------------------


def test_growing_keeps_the_delta_and_can_learn():
    pool = le.AdapterPool(24, 20)
    lora = random_adapter(1, {"q": 3}, 0.75).modules["q"]
    slot = pool.add(*lora[:3])
    grown = le.resize_rank(pool.get(slot), 7, seed=5)
    assert (grown.ranks, grown.errors) == ({"": 7}, {"": 0.0})
    pool.set(slot, *grown.result)
    A, B, scaling = pool.get(slot)
    assert A[:3].tobytes() == lora.A.tobytes()
    assert gap(delta(LoraWeights(A, B, scaling)), delta(lora)) < 1e-12
    assert (np.abs(A[3:]).max(axis=1) > 0.1).all()
    assert np.abs(A[3:]).max() <= 1 / np.sqrt(24)
    x = RNG(0).standard_normal((9, 24)).astype("f4")
    pool.adapt(x, x[:, :20], np.full(9, slot, "i4"), lr=0.1)
    assert np.abs(pool.get(slot)[1][:, 3:]).max() > 0  # new directions learn


@pytest.mark.parametrize("scaling", [0.7, -2.0], ids=str)
def test_shrinking_is_the_nearest_and_says_what_it_lost(scaling):
    lora = random_adapter(1, {"q": 6}, scaling).modules["q"]
    U, S, Vt = np.linalg.svd(delta(lora), full_matrices=False)
    assert np.allclose(singular_values(*lora[:3]), S[:6])
    for rank in (1, 4):
        small = le.resize_rank(lora, rank)
        A, B, kept = small.result
        assert (A.shape, B.shape, kept) == ((rank, 24), (20, rank), scaling)
        want = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        assert gap(delta(LoraWeights(A, B, kept)), want) < 1e-6
        lost = np.linalg.norm(S[rank:]) / np.linalg.norm(S)
        assert small.errors[""] == pytest.approx(lost, rel=1e-4)


def of_values(values: list[float]) -> LoraWeights:
    """Weights whose delta has these singular values."""
    rng, r = RNG(0), len(values)
    Q = [np.linalg.qr(rng.standard_normal((n, r)))[0] for n in (24, 20)]
    A, B = Q[0].T, Q[1] * np.array(values)
    return LoraWeights((A / 0.5).astype("f4"), B.astype("f4"), 0.5)


def test_ranks_follow_the_singular_values():
    adapter = le.Adapter(
        {
            "needs one": of_values([10.0, 0.05, 0.02, 0.01]),
            "needs two": of_values([10.0, 5.0, 0.02, 0.01]),
            "needs more": of_values([1.0, 1.0, 1.0, 1.0]),
            "empty": of_values([0.0, 0.0]),
        }
    )
    resized = le.resize_rank(adapter, tolerance=0.01)
    assert resized.ranks == {"needs one": 1, "needs two": 2, "needs more": 8, "empty": 1}
    for name, lora in resized.result.modules.items():
        assert len(lora.A) == resized.ranks[name]
        whole = delta(adapter.modules[name])
        lost = np.linalg.norm(delta(lora) - whole)
        assert lost <= 0.01 * np.linalg.norm(whole) + 1e-6
        assert resized.errors[name] <= 0.01
    assert le.resize_rank(adapter, tolerance=0.01, max_rank=5).ranks["needs more"] == 5
    assert len(adapter.modules["needs one"].A) == 4  # as it was


def test_a_micro_lora_keeps_one_rank_and_its_scaling():
    for rslora in (False, True):
        config = le.MicroLoRAConfig(
            24, 20, rank=2, alpha=3.0, target_modules=("q", "v"), use_rslora=rslora
        )
        lora = le.MicroLoRA(config)
        for i, name in enumerate(("q", "v")):
            w = random_adapter(i, {"x": 2}).modules["x"]
            lora.set_weights(name, w.A, w.B)
        x = RNG(3).standard_normal((4, 24)).astype("f4")
        grown = le.resize_rank(lora, 5)
        assert grown.result.config.rank == 5
        assert grown.result.config.scaling == pytest.approx(config.scaling)
        for name in ("q", "v"):
            assert np.allclose(
                grown.result.forward(x, name), lora.forward(x, name), rtol=1e-5, atol=1e-5
            )
        back = le.resize_rank(grown.result, tolerance=1e-5)
        assert back.ranks == {"q": 2, "v": 2}
        for name in ("q", "v"):
            assert np.allclose(
                back.result.forward(x, name), lora.forward(x, name), rtol=1e-4, atol=1e-4
            )


def test_resize_refusals():
    lora = random_adapter(1, {"q": 3}).modules["q"]
    bad = replace(random_adapter(1, {"q": 3}), modules={"q": lora._replace(A=lora.A * np.nan)})
    for call, options, error, message in (
        (lora, {}, ValueError, "expected one of rank and tolerance"),
        (lora, {"rank": 2, "tolerance": 0.1}, ValueError, "expected one of rank and tolerance"),
        (lora, {"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
        (lora, {"rank": 8, "max_rank": 4}, ValueError, "max_rank: expected none with rank"),
        (lora, {"tolerance": 1.0}, ValueError, "tolerance: expected 0 <= t < 1"),
        ("folder", {"rank": 2}, TypeError, "adapter: expected .* got str"),
        (bad, {"rank": 2}, ValueError, "expected finite numbers"),
        ((lora.A, lora.B[:, :2], 1.0), {"rank": 1}, ValueError, r"A \[r, in\] and B \[out, r\]"),
    ):
        with pytest.raises(error, match=f"resize_rank: .*{message}"):
            le.resize_rank(call, **options)


# ---- long inputs ------------------------------------------------------------

LONG = """
import resource, sys
import numpy as np
import lora_engine as le
rows, n, r = 400_000, 16, 64
lora = le.MicroLoRA(le.MicroLoRAConfig(n, n, rank=r, target_modules=("q",)))
A, B, _ = lora.weights("q")
lora.set_weights("q", A, np.random.default_rng(0).standard_normal(B.shape).astype("f4"))
x = np.random.default_rng(1).standard_normal((rows, n), dtype="f4")
out = np.full((rows, n), np.nan, "f4")
lora.forward(x[:100], "q")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lora.forward(x, "q", out=out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
for first in range(0, rows, 77_777):
    rows_of = slice(first, first + 77_777)
    assert lora.forward(x[rows_of], "q").tobytes() == out[rows_of].tobytes()
"""


def test_a_long_input_takes_no_scratch_that_grows_with_it():
    """h = A x of all rows would be 102 MB; and rows in chunks have the same bits."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 1024  # KiB
