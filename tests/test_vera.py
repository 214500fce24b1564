"""VeRA: PEFT's outputs, PEFT's files both ways, gradients."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

import lora_engine as le
from lora_engine import reference

SIZES = {"first": (12, 9), "second": (9, 14)}
INPUTS = {name: size[0] for name, size in SIZES.items()}


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, size in SIZES.items():
            setattr(self, name, torch.nn.Linear(*size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def peft_model(save_projection: bool = True, key: int = 7):
    from peft import VeraConfig, get_peft_model

    config = quietly(
        VeraConfig, r=5, target_modules=["first", "second"], projection_prng_key=key,
        save_projection=save_projection, d_initial=0.25,
    )  # fmt: skip
    model = quietly(get_peft_model, Base(), config)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            parameter.data.normal_()
    return model


def vera(seed: int = 0, **options) -> le.Vera:
    made = le.Vera(SIZES, 5, **options)
    rng = np.random.default_rng(seed)
    for name, (_, out) in SIZES.items():
        made.set_vectors(name, rng.standard_normal(out), rng.standard_normal(5))
    return made


@pytest.mark.parametrize("save_projection", [True, False], ids=["projection", "key"])
def test_we_load_what_peft_saves(save_projection, tmp_path):
    model = peft_model(save_projection)
    quietly(model.save_pretrained, tmp_path / "a")
    loaded = le.Vera.load(tmp_path / "a", INPUTS)
    for name, (n_in, _) in SIZES.items():
        layer = getattr(model.base_model.model, name)
        x = torch.randn(4, n_in)
        want = (layer(x) - layer.get_base_layer()(x)).detach().numpy()
        got = loaded.forward(x, name).numpy()
        assert np.abs(want).max() > 0.05
        assert np.allclose(got, want, rtol=1e-4, atol=1e-5)
        assert np.allclose(loaded.forward(x.numpy(), name), want, rtol=1e-4, atol=1e-5)
        A, B, scaling = loaded.weights(name)
        delta = layer.get_delta_weight("default").detach().numpy()
        assert np.allclose(scaling * B @ A, delta, rtol=1e-5, atol=1e-6)
        served = loaded.to_adapter().modules[name]
        assert np.array_equal(served.B @ served.A, B @ A)


@pytest.mark.parametrize("save_projection", [True, False], ids=["projection", "key"])
def test_peft_loads_what_we_save(save_projection, tmp_path):
    from peft import PeftModel

    ours = vera(projection_prng_key=3, d_initial=0.5)
    ours.save(tmp_path / "a", save_projection)
    model = quietly(PeftModel.from_pretrained, Base(), tmp_path / "a")
    for name, (n_in, _) in SIZES.items():
        x = np.random.default_rng(1).standard_normal((4, n_in)).astype("f4")
        layer = getattr(model.base_model.model, name)
        given = torch.from_numpy(x)
        want = (layer(given) - layer.get_base_layer()(given)).detach().numpy()
        assert np.abs(want).max() > 0.05
        assert np.allclose(ours.forward(x, name), want, rtol=1e-4, atol=1e-5)
    again = le.Vera.load(tmp_path / "a", INPUTS)
    assert again.d_initial == 0.5
    for name in SIZES:
        for got, want in zip(again.modules[name][:2], ours.modules[name][:2], strict=True):
            assert got.tobytes() == want.tobytes()
    assert again.A.tobytes() == ours.A.tobytes()
    assert again.B.tobytes() == ours.B.tobytes()


def test_unknown_keys_of_a_config_are_kept(tmp_path):
    quietly(peft_model().save_pretrained, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    before = {**json.loads(config.read_text()), "of_a_later_peft": [1]}
    config.write_text(json.dumps(before))
    le.Vera.load(tmp_path / "a", INPUTS).save(tmp_path / "a")
    assert json.loads(config.read_text()) == before


def test_a_fresh_one_changes_nothing():
    fresh = le.Vera(SIZES, 5)
    assert not fresh.forward(np.ones((3, 12), "f4"), "first").any()
    assert np.allclose(fresh.modules["first"].d, 0.1)


def loss(v: le.Vera, x, target, b, d) -> float:
    A, B = v.A[:, : x.shape[1]].astype("f8"), v.B[: len(b)].astype("f8")
    y = b * ((d * (x.astype("f8") @ A.T)) @ B.T)
    return 0.5 * float(((y - target) ** 2).sum()) / len(x)


def test_gradients_are_those_of_finite_differences():
    v = vera()
    rng = np.random.default_rng(2)
    x, target = rng.standard_normal((6, 12)).astype("f4"), rng.standard_normal((6, 9)).astype("f4")
    grad = v.forward(x, "first") - target
    b, d = (m.astype("f8") for m in v.modules["first"][:2])
    for which, got in enumerate(v.gradient(x, grad, "first")):
        for i in range(len(got)):
            step = 1e-5
            sides = []
            for sign in (1, -1):
                vectors = [b.copy(), d.copy()]
                vectors[which][i] += sign * step
                sides.append(loss(v, x, target, *vectors))
            assert got[i] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_adapt_steps_from_old_values_and_learns(kind):
    v = vera()
    rng = np.random.default_rng(2)
    x, target = rng.standard_normal((6, 12)).astype("f4"), rng.standard_normal((6, 9)).astype("f4")

    def given(a):
        return a if kind == "numpy" else torch.from_numpy(a)

    A, B = v.A.copy(), v.B.copy()
    first = loss(v, x, target, *(m.astype("f8") for m in v.modules["first"][:2]))
    for step in range(300):
        before = v.modules["first"]
        grad = v.forward(given(x), "first") - given(target)
        g_b, g_d = v.gradient(given(x), grad, "first")
        result = v.adapt(given(x), grad, "first", lr=0.02)
        assert result.applied
        if step == 0:
            want = np.sqrt((g_b**2).sum() + (g_d**2).sum())
            assert result.grad_norm == pytest.approx(want, rel=1e-5)
            assert np.allclose(v.modules["first"].b, before.b - 0.02 * g_b, atol=1e-6)
            assert np.allclose(v.modules["first"].d, before.d - 0.02 * g_d, atol=1e-6)
    last = loss(v, x, target, *(m.astype("f8") for m in v.modules["first"][:2]))
    assert last < 0.6 * first
    assert (A.tobytes(), B.tobytes()) == (v.A.tobytes(), v.B.tobytes())


def test_a_gradient_with_nan_changes_nothing():
    v = vera()
    before = v.modules["first"]
    result = v.adapt(np.ones((1, 12), "f4"), np.full((1, 9), np.nan, "f4"), "first", lr=0.1)
    assert not result.applied
    assert "NaN" in result.note
    assert v.modules["first"] is before
    empty = v.adapt(np.ones((0, 12), "f4"), np.ones((0, 9), "f4"), "first", lr=0.1)
    assert not empty.applied


def test_its_weights_serve_from_a_pool():
    v = vera()
    pool = le.AdapterPool(12, 9)
    slot = pool.add(*v.weights("first"))
    x = np.random.default_rng(1).standard_normal((4, 12)).astype("f4")
    got = pool.forward(x, np.full(4, slot, "i4"))
    want = reference.lora_delta(x, *v.weights("first"))
    assert np.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type: expected VERA, got 'LORA'"),
        ({"bias": "all"}, "bias: expected none"),
        ({"r": 4}, r"vera_lambda_d: expected shape \[4\], got \[5\]"),
        ({"r": 10**9}, "r: expected a whole number from 1 to"),
        ({"projection_prng_key": -1}, "projection_prng_key: expected a whole number"),
        ({"d_initial": "x"}, "d_initial: expected a number"),
    ],
)
def test_damaged_configs_are_refused(edit, message, tmp_path):
    vera().save(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **edit}))
    with pytest.raises(le.FormatError, match=message):
        le.Vera.load(tmp_path / "a")


def test_damaged_weights_and_wrong_calls_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    made = vera()
    made.save(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    whole = load_file(file)
    key = "base_model.model.first.vera_lambda_b"
    for change, message in (
        ({key: None}, f"{key}: missing"),
        ({key: np.full(9, np.nan, "f4")}, f"{key}: expected finite"),
        ({"base_model.vera_A": None}, "vera_A and vera_B together"),
        ({"base_model.vera_A": np.ones((4, 12), "f4")}, "A: expected finite numbers of at least"),
        ({"base_model.model.x": np.ones(3, "f4")}, "base_model.model.x: expected a key like"),
    ):
        save_file({k: v for k, v in {**whole, **change}.items() if v is not None}, file)
        with pytest.raises(le.FormatError, match=message):
            le.Vera.load(tmp_path / "a")
    made.save(tmp_path / "b", save_projection=False)
    with pytest.raises(ValueError, match="in_features: expected sizes"):
        le.Vera.load(tmp_path / "b")
    with pytest.raises(ValueError, match="in_features: expected a size of second"):
        le.Vera.load(tmp_path / "b", {"first": 12})
    own = le.Vera(SIZES, 5, A=np.ones((5, 12)), B=np.ones((14, 5)))
    with pytest.raises(ValueError, match="save_projection: expected True"):
        own.save(tmp_path / "c", save_projection=False)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        le.Vera.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Vera: module: expected one of first, second"):
        made.forward(np.ones(12, "f4"), "third")
    with pytest.raises(ValueError, match=r"grad: expected shape \[n, 9\]"):
        made.adapt(np.ones((2, 12), "f4"), np.ones((2, 8), "f4"), "first", 0.1)
    with pytest.raises(ValueError, match="grad: expected 2 rows as x, got 3"):
        made.adapt(np.ones((2, 12), "f4"), np.ones((3, 9), "f4"), "first", 0.1)
    with pytest.raises(ValueError, match=r"set_vectors: d: expected finite.*\(5,\)"):
        made.set_vectors("first", np.ones(9), np.ones(4))
