"""EWC's state as arrays and as a file: read as hostile, and to the same bits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import bits
from helpers_ewc import (
    FORMS,
    ewc_backend,  # noqa: F401  the fixture
    samples,
    small_pool,
)

import lora_engine as le
from lora_engine import safetensors_file

pytestmark = [pytest.mark.usefixtures("ewc_backend"), pytest.mark.parametrize("form", FORMS)]


def learned(form, pool=None):
    """One whose slots have: 0 record and average, 1 record, 2 average; and more samples."""
    pool = small_pool().pool if pool is None else pool
    ewc = le.EWC(pool, 1.0, 0.8, form, fisher_samples=7)
    x, grad = samples(np.random.default_rng(0), 20, 12, 7)
    ewc.observe(x, grad, [0, 1] * 10)
    pool.adapt(x, grad, np.array([0, 1] * 10, np.int32), 0.05)
    ewc.consolidate()
    pool.adapt(x, grad, np.array([0, 1] * 10, np.int32), 0.05)
    ewc.observe(x, grad, [0, 2] * 10)
    return ewc, samples(np.random.default_rng(1), 6, 12, 7)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
    )


def test_the_state_goes_on_to_the_same_bits(form, tmp_path):
    ewc, (x, grad) = learned(form)
    state = ewc.state()
    fields = {key.split(".")[1] for key in state}
    assert fields == {
        "first", "second", "anchor_A", "anchor_B", "mean_first", "mean_second", "samples",
    }  # fmt: skip
    ewc.save(tmp_path / "ewc.safetensors")
    other = le.EWC(ewc.target, 1.0, 0.8, form, fisher_samples=7)
    other.observe(x, grad, 1)  # which is dropped
    other.load_state(state)
    read = le.EWC.load(tmp_path / "ewc.safetensors", ewc.target)
    assert (read.ewc_lambda, read.gamma, read.form, read.fisher_samples) == (1.0, 0.8, form, 7)
    assert ewc.penalty() > 0
    for one in (other, read):
        assert same(one.state(), state)
        assert one.penalty() == ewc.penalty()
    for one in (ewc, other, read):
        one.observe(x, grad, [0, 1, 2, 0, 0, -1])
        one.consolidate()
    assert same(other.state(), ewc.state())
    assert same(read.state(), ewc.state())
    state[f"{form}.first.0.0"][:] = 7.0  # a copy: it is nobody's
    assert same(read.state(), ewc.state())


def test_an_empty_state_forgets_all(form):
    ewc, _ = learned(form)
    ewc.load_state({})
    assert ewc.state() == {}
    assert ewc.penalty() == 0.0
    assert ewc.consolidate().consolidated == {}


def changed(form, key, value):
    def change(state):
        state[f"{form}.{key}"] = value(state[f"{form}.{key}"])

    return change


def dropped(form, key):
    return lambda state: state.pop(f"{form}.{key}")


def put(key, value):
    return lambda state: state.update({key: value})


def nan_in(a):
    a[0] = np.nan
    return a


ONE = np.ones(1, "f4")


def test_a_hostile_state_is_refused_and_changes_nothing(form):
    ewc, _ = learned(form)
    good = ewc.state()
    other_form = FORMS[1 - FORMS.index(form)]
    cases = [
        (ValueError, "first.0.0: expected shape", changed(form, "first.0.0", lambda a: a[1:])),
        (ValueError, "expected shape", changed(form, "anchor_B.0.0", lambda a: a.T.copy())),
        (ValueError, "expected shape", changed(form, "mean_second.0.2", lambda a: a[None])),
        (TypeError, "expected a float32 array, got float64",
         changed(form, "second.0.1", lambda a: a.astype("f8"))),
        (TypeError, "expected a float32 array, got list",
         changed(form, "second.0.1", lambda a: a.tolist())),
        (ValueError, "finite values of 0 or more", changed(form, "first.0.0", nan_in)),
        (ValueError, "finite values of 0 or more", changed(form, "mean_first.0.0", lambda a: -a)),
        (ValueError, "finite values, got", changed(form, "anchor_A.0.0", nan_in)),
        (ValueError, "anchor_A.0.1: missing", dropped(form, "anchor_A.0.1")),
        (ValueError, "mean_first.0.2: missing", dropped(form, "mean_first.0.2")),
        (ValueError, "the number of its samples", dropped(form, "samples.0.2")),
        (ValueError, "samples", changed(form, "samples.0.0", lambda a: a * 0)),
        (ValueError, "samples", changed(form, "samples.0.0", lambda a: a.astype("i4"))),
        (ValueError, "no such slice", put(f"{form}.first.1.0", ONE)),
        (ValueError, "no such slice", put(f"{form}.samples.1.0", np.ones(1, "i8"))),
        (ValueError, "expected a key", put(f"{form}.third.0.0", ONE)),
        (ValueError, "expected a key", put("first", ONE)),
        (ValueError, "expected a key", put(3, ONE)),
        (ValueError, f"expected form {form}", put(f"{other_form}.first.0.0", ONE)),
        (ValueError, "expected a slot", put(f"{form}.first.0.-1", ONE)),
        (ValueError, "expected a slot", put(f"{form}.first.0." + "9" * 40, ONE)),
        (ValueError, "expected a slot", put(f"{form}.first.0.q_proj", ONE)),
        (IndexError, "slot", put(f"{form}.first.0.7", ONE)),
    ]  # fmt: skip
    for error, message, change in cases:
        state = {key: value.copy() for key, value in good.items()}
        change(state)
        with pytest.raises(error, match=message):
            ewc.load_state(state)
        assert same(ewc.state(), good)


def test_a_damaged_file_is_refused(form, tmp_path):
    ewc, _ = learned(form)
    file = tmp_path / "ewc.safetensors"
    ewc.save(file)
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for damaged in (b"", data[:7], data[: header - 3], data[:-4], data + b"\0", b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(le.FormatError, match=r"ewc\.safetensors"):
            le.EWC.load(file, ewc.target)
    rng = np.random.default_rng(2)
    for place in rng.integers(0, header, 60):  # a bit of the header: an error, or no matter
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(flipped))
        try:
            le.EWC.load(file, ewc.target)
        except (ValueError, IndexError):  # FormatError is a ValueError
            continue
    with pytest.raises(FileNotFoundError):
        le.EWC.load(tmp_path / "none", ewc.target)


def rewritten(file, settings=None, **arrays):
    """The file with other settings or arrays, as well made as before."""
    content, metadata = safetensors_file.from_bytes(file.read_bytes(), "test")
    own = json.loads(metadata["lora_engine_ewc"])
    own.update(settings or {})
    own = {key: value for key, value in own.items() if value is not None}
    file.write_bytes(
        safetensors_file.to_bytes({**content, **arrays}, "lora_engine_ewc", json.dumps(own))
    )


def test_a_file_of_something_else_is_refused(form, tmp_path):
    ewc, _ = learned(form)
    file = tmp_path / "ewc.safetensors"
    for settings in (
        {"gamma": 2.0}, {"gamma": None}, {"form": "dense"}, {"form": 3}, {"fisher_samples": 0},
        {"fisher_samples": 1.5}, {"ewc_lambda": "1"}, {"ewc_lambda": True}, {"ewc_lambda": -1},
        {"ewc_lambda": 10**400}, {"weights_sha256": "0" * 64}, {"weights_sha256": None},
    ):  # fmt: skip
        ewc.save(file)
        rewritten(file, settings)
        with pytest.raises(le.FormatError, match=r"ewc\.safetensors"):
            le.EWC.load(file, ewc.target)
    for key, array, error in (
        (f"{form}.first.0.0", np.ones((3, 3), "f4"), "expected shape"),
        (f"{form}.first.0.0", np.ones((2, 12), "f8"), "float32"),
        (f"{form}.first.0.99", np.ones((2, 12), "f4"), "slot"),
    ):
        ewc.save(file)
        rewritten(file, **{key: array})
        with pytest.raises(ValueError, match=error):
            le.EWC.load(file, ewc.target)
    ewc.save(file)
    ewc.target.set(2, *ewc.target.get(1))
    with pytest.raises(le.FormatError, match="other weights"):
        le.EWC.load(file, ewc.target)
    file.write_bytes(safetensors_file.to_bytes({"a": np.ones(1, "f4")}))
    with pytest.raises(le.FormatError, match="lora_engine_ewc"):
        le.EWC.load(file, ewc.target)


def test_a_file_is_replaced_whole_or_not_at_all(form, tmp_path, monkeypatch):
    ewc, _ = learned(form)
    file = tmp_path / "ewc.safetensors"
    ewc.save(file)
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    ewc.consolidate()
    with pytest.raises(OSError, match="no"):
        ewc.save(file)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ewc.safetensors"]


def test_slices_that_are_missing_stay_missing(form, tmp_path):
    pool = le.AdapterPool(12, (3, 4))
    rng = np.random.default_rng(3)
    A, B = rng.standard_normal((2, 12)).astype("f4"), rng.standard_normal((4, 2)).astype("f4")
    pool.add([None, A], [None, B], 1.0)
    ewc, _ = learned(form, _with_three(pool, A, B))
    state = ewc.state()
    assert not any(key.split(".")[2] == "0" and "samples" not in key for key in state)
    ewc.save(tmp_path / "ewc.safetensors")
    read = le.EWC.load(tmp_path / "ewc.safetensors", pool)
    assert same(read.state(), state)
    assert bits(state[f"{form}.anchor_A.1.0"]) != bits(pool.get(0)[0][1])


def _with_three(pool, A, B):
    for _ in range(2):
        pool.add([None, A], [None, B], 1.0)
    return pool
