"""Adapter folders: round trips, PEFT, hostile files, and saves that are cut short."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import delta_error, f64, magnitude
from helpers_files import (
    CONFIG,
    STATE,
    WEIGHTS,
    edit_config,
    header_of,
    raw_safetensors,
    redraw,
    run_python,
    trained,
    weight_bits,
)
from hypothesis import given
from hypothesis import strategies as st

import lora_engine as le
from lora_engine import reference
from lora_engine.adapters import atomic

A_KEY, B_KEY = (f"base_model.model.q.lora_{which}.weight" for which in "AB")
FILES = {CONFIG, WEIGHTS, STATE}


def saved(tmp_path: Path, lora: le.MicroLoRA | None = None) -> Path:
    folder = tmp_path / "adapter"
    (lora or trained()).save(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def steps_of(lora: le.MicroLoRA) -> dict[str, int]:
    return {name: m.steps for name, m in lora._modules.items()}


# ---- round trips ------------------------------------------------------------

CASES = {
    "r2": {},
    "r1-dropout-seed": {"rank": 1, "alpha": 2.5, "dropout": 0.25, "seed": 2**64 - 1},
    "r3-rslora": {"rank": 3, "alpha": 7.0, "use_rslora": True, "gradient_checkpointing": True},
    "shapes": {"target_modules": ("b", "a", "c"), "shapes": {"a": (3, 5), "c": (6, 11)}},
    "names": {"target_modules": ("model.layers.0.q_proj", "größe.投影", "lora_A.weight", "a b")},
}
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_folder_round_trip(case, tmp_path):
    lora = trained(**CASES[case])
    folder = saved(tmp_path, lora)
    assert set(contents(folder)) == FILES
    loaded = le.MicroLoRA.load(folder)
    assert loaded.config == lora.config
    assert weight_bits(loaded) == weight_bits(lora)


@cases
def test_bytes_round_trip(case):
    lora, other = trained(**CASES[case]), trained(draw=9, **CASES[case])
    assert weight_bits(other) != weight_bits(lora)
    data = lora.export_weights()
    other.import_weights(data)
    assert weight_bits(other) == weight_bits(lora)
    names = {
        f"base_model.model.{name}.lora_{which}.weight"
        for name in lora.config.target_modules
        for which in "AB"
    }
    assert set(header_of(data)) - {"__metadata__"} == names


@pytest.mark.parametrize(
    "form", [bytes, bytearray, memoryview, lambda b: memoryview(bytearray(b * 2))[: len(b)]],
    ids=["bytes", "bytearray", "memoryview", "memoryview-of-part"],
)  # fmt: skip
def test_import_takes_any_bytes(form):
    lora, other = trained(), trained(draw=9)
    other.import_weights(form(lora.export_weights()))
    assert weight_bits(other) == weight_bits(lora)


def test_import_of_something_else_is_a_type_error():
    for data in ("text", 3, None, np.zeros(8, "u1"), [1, 2]):
        with pytest.raises(TypeError, match="data: expected bytes, got"):
            trained().import_weights(data)


def test_import_drops_what_waits():
    lora = trained()
    lora.adapt(np.ones(6, "f4"), le.Feedback.from_gradient(np.ones(5, "f4")), "q")
    lora.import_weights(trained(draw=9).export_weights())
    assert lora.apply_updates(lr=0.1).note == "nothing was accumulated"
    assert weight_bits(lora) == weight_bits(trained(draw=9))


@cases
def test_same_adapter_gives_the_same_bytes(case, tmp_path):
    lora = trained(**CASES[case])
    assert lora.export_weights() == trained(**CASES[case]).export_weights()
    first = contents(saved(tmp_path / "1", lora))
    assert contents(saved(tmp_path / "2", trained(**CASES[case]))) == first
    again = le.MicroLoRA.load(tmp_path / "1" / "adapter")
    assert contents(saved(tmp_path / "3", again)) == first
    assert first[WEIGHTS] == lora.export_weights()


def test_steps_survive_and_dropout_goes_on(tmp_path):
    """A loaded adapter draws the masks that the saved one would have drawn."""
    lora = trained(dropout=0.5, seed=3)
    x, feedback = np.ones((2, 6), "f4"), le.Feedback.from_gradient(np.ones((2, 5), "f4"))
    for _ in range(3):
        assert lora.adapt(x, feedback, "q", lr=0.1).applied
    loaded = le.MicroLoRA.load(saved(tmp_path, lora))
    fresh = trained(dropout=0.5, seed=3)
    fresh.import_weights(lora.export_weights())
    for each in (lora, loaded, fresh):
        assert each.adapt(x, feedback, "q", lr=0.1).applied
    assert weight_bits(loaded) == weight_bits(lora)
    assert weight_bits(fresh) != weight_bits(lora)


# ---- the state file ---------------------------------------------------------


def load_dropping(folder: Path, why: str) -> le.MicroLoRA:
    """Loads a folder whose state file must be dropped, and say so."""
    with pytest.warns(UserWarning, match=rf"^engine state dropped: .*{why}") as caught:
        lora = le.MicroLoRA.load(folder)
    assert Path(caught[0].filename) == Path(__file__)  # it points at who called load
    assert STATE in str(caught[0].message)
    return lora


def stepped(**config) -> le.MicroLoRA:
    lora = trained(seed=5, **config)
    x, feedback = np.ones((2, 6), "f4"), le.Feedback.from_gradient(np.ones((2, 5), "f4"))
    assert lora.adapt(x, feedback, "q", lr=0.1).applied
    return lora


def test_state_of_other_weights_is_dropped(tmp_path):
    folder = saved(tmp_path, stepped())
    (folder / WEIGHTS).write_bytes(trained(draw=9).export_weights())
    lora = load_dropping(folder, "it belongs to other weights")
    assert weight_bits(lora) == weight_bits(trained(draw=9))
    assert steps_of(lora) == {"q": 0}
    assert lora.config.seed == 0


def test_folder_without_state_loads(tmp_path):
    lora = stepped()
    folder = saved(tmp_path, lora)
    (folder / STATE).unlink()
    loaded = le.MicroLoRA.load(folder)
    assert weight_bits(loaded) == weight_bits(lora)
    assert steps_of(loaded) == {"q": 0}


COUNT = {"q": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}


def state(digest: str, **own) -> bytes:
    """A state file of those weights."""
    return raw_safetensors(
        COUNT, bytes(8), {"lora_engine": json.dumps({"weights_sha256": digest, **own})}
    )


def counts(digest: str, dtype: str, shape: list[int], payload: bytes) -> bytes:
    entries = {"q": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(payload)]}}
    own = json.dumps({"weights_sha256": digest})
    return raw_safetensors(entries, payload, {"lora_engine": own})


STATES = {
    "empty": b"",
    "random": bytes(range(256)),
    "no-metadata": lambda d: raw_safetensors(COUNT, bytes(8)),
    "null-metadata": lambda d: raw_safetensors(COUNT, bytes(8), None),
    "text-metadata": lambda d: raw_safetensors(COUNT, bytes(8), {"lora_engine": "{"}),
    "list-metadata": lambda d: raw_safetensors(COUNT, bytes(8), {"lora_engine": "[]"}),
    "deep-metadata": lambda d: raw_safetensors(COUNT, bytes(8), {"lora_engine": "[" * 100_000}),
    "negative-count": lambda d: counts(d, "I64", [1], b"\xff" * 8),
    "nan-count": lambda d: counts(d, "F64", [1], np.float64(np.nan).tobytes()),
    "matrix-of-counts": lambda d: counts(d, "I64", [1, 1], bytes(8)),
    "no-count": lambda d: counts(d, "I64", [0], b""),
    "seed-too-large": lambda d: state(d, seed=2**64),
    "seed-negative": lambda d: state(d, seed=-1),
    "seed-text": lambda d: state(d, seed="1"),
    "checkpointing-text": lambda d: state(d, gradient_checkpointing="false"),
}


def digest_of(folder: Path) -> str:
    """What the state file says of the weights."""
    own = header_of((folder / STATE).read_bytes())["__metadata__"]["lora_engine"]
    return json.loads(own)["weights_sha256"]


@pytest.mark.parametrize("what", STATES)
def test_damaged_state_is_dropped(what, tmp_path):
    lora = stepped()
    folder = saved(tmp_path, lora)
    made = STATES[what]
    (folder / STATE).write_bytes(made(digest_of(folder)) if callable(made) else made)
    loaded = load_dropping(folder, "")
    assert weight_bits(loaded) == weight_bits(lora)
    assert steps_of(loaded) == {"q": 0}
    assert loaded.config.seed == 0


def test_state_of_unknown_modules_is_no_harm(tmp_path):
    folder = saved(tmp_path, trained())
    entries = {
        name: {"dtype": "I64", "shape": [1], "data_offsets": [8 * i, 8 * i + 8]}
        for i, name in enumerate(("other", "q"))
    }
    own = {"lora_engine": json.dumps({"weights_sha256": digest_of(folder)})}
    (folder / STATE).write_bytes(raw_safetensors(entries, np.array([3, 4]).tobytes(), own))
    assert steps_of(le.MicroLoRA.load(folder)) == {"q": 4}


# ---- PEFT -------------------------------------------------------------------


class Base(torch.nn.Module):
    """A frozen model whose layers have the names of target_modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 5), "v_proj": torch.nn.Linear(6, 4)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outs = [layer[name](x) for layer in self.layers for name in ("q_proj", "v_proj")]
        return torch.cat(outs, dim=-1)


NAMES = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


def deltas(lora: le.MicroLoRA, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([lora.forward(x, name) for name in NAMES], dim=-1)


def quietly(call, *args, **kwargs):
    """PEFT's and torch's own warnings are not ours to fail on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
@pytest.mark.parametrize("rank", [1, 3], ids=lambda r: f"r{r}")
def test_peft_loads_what_we_save(rank, use_rslora, tmp_path):
    from peft import PeftModel

    lora = trained(
        6, 5, rank=rank, alpha=3.0, use_rslora=use_rslora, target_modules=NAMES,
        shapes={name: (6, 4) for name in NAMES if "v_proj" in name},
    )  # fmt: skip
    base, x = Base(), torch.randn(7, 6)
    want = base(x).detach() + deltas(lora, x)
    model = quietly(PeftModel.from_pretrained, base, saved(tmp_path, lora))
    got = model(x).detach()
    assert deltas(lora, x).abs().max() > 0.1
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
def test_we_load_what_peft_saves(dtype, use_rslora, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=use_rslora, target_modules=["q_proj", "v_proj"],
        init_lora_weights=False, lora_dropout=0.125,
    )  # fmt: skip
    torch.manual_seed(1)
    model = quietly(get_peft_model, Base(), config).to(getattr(torch, dtype))
    quietly(model.save_pretrained, tmp_path / "a")
    edit_config(tmp_path / "a", base_model_name_or_path="some/base", of_a_later_peft=[1, {}])
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    lora = le.MicroLoRA.load(tmp_path / "a")
    assert lora.config.target_modules == tuple(NAMES)
    assert lora.config.dropout == 0.125
    for name in NAMES:
        A, B, scaling = lora.weights(name)
        assert scaling == pytest.approx(5 / (np.sqrt(3) if use_rslora else 3), rel=1e-6)
        for which, got in (("A", A), ("B", B)):
            want = stored[f"base_model.model.{name}.lora_{which}.weight"].float().numpy()
            assert got.tobytes() == want.tobytes()
    x = torch.randn(7, 6)
    model = model.float().eval()
    with torch.no_grad():
        want = model(x)
        with model.disable_adapter():
            want = want - model(x)
    got = deltas(lora, x)
    assert got.abs().max() > 0.1
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)

    # And back: what PEFT wrote that we have no use for is kept, and PEFT loads it again.
    before = json.loads((tmp_path / "a" / CONFIG).read_text())
    readme = (tmp_path / "a" / "README.md").read_bytes()
    lora.save(tmp_path / "a")
    after = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert after.pop("target_modules") == NAMES
    assert sorted(before.pop("target_modules")) == ["q_proj", "v_proj"]
    assert after == before
    assert after["base_model_name_or_path"] == "some/base"
    assert (tmp_path / "a" / "README.md").read_bytes() == readme
    again = quietly(PeftModel.from_pretrained, Base(), tmp_path / "a").eval()
    with torch.no_grad():
        assert torch.allclose(again(x), Base()(x) + got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("use_dora", {"use_dora": True}),
        ("rank_pattern", {"rank_pattern": {"v_proj": 1}}),
        ("alpha_pattern", {"alpha_pattern": {"v_proj": 1}}),
        ("bias", {"bias": "lora_only"}),
        ("lora_bias", {"lora_bias": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_a_micro_lora_is_not_is_refused(key, options, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    model = quietly(get_peft_model, Base(), config)
    quietly(model.save_pretrained, tmp_path / "a")
    with pytest.raises(le.FormatError, match=rf"{CONFIG}: {key}: |{WEIGHTS}: base_model.*: "):
        le.MicroLoRA.load(tmp_path / "a")


# ---- hostile weights --------------------------------------------------------


def pair(A: np.ndarray, B: np.ndarray, dtype: str = "F32") -> dict[str, object]:
    """Header entries of A and B, one after the other."""
    cut, end = A.nbytes, A.nbytes + B.nbytes
    return {
        A_KEY: {"dtype": dtype, "shape": list(A.shape), "data_offsets": [0, cut]},
        B_KEY: {"dtype": dtype, "shape": list(B.shape), "data_offsets": [cut, end]},
    }


def hostile_weights() -> dict[str, tuple[bytes, str]]:
    """{what: (bytes, what the message must name)}."""
    A, B, _ = trained().weights("q")
    good = pair(A, B)
    payload = A.tobytes() + B.tobytes()

    def tensor(key, shape, dtype="F32", size=None):
        end = (4 if size is None else size) * int(np.prod(shape, dtype=object))
        return raw_safetensors({key: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}},
                               bytes(end))  # fmt: skip

    def with_A(values):
        return raw_safetensors(good, np.asarray(values, "f4").tobytes() + B.tobytes())

    spoilt = {name: A.copy() for name in ("nan", "inf")}
    spoilt["nan"][1, 3], spoilt["inf"][0, 0] = np.nan, -np.inf
    wide = np.full(A.shape, 1e39), B.astype("f8")
    found = {
        "empty": (b"", "got 0 bytes"),
        "seven-bytes": (b"\0" * 7, "got 7 bytes"),
        "header-2^60": ((1 << 60).to_bytes(8, "little") + payload, "header: expected at most 88"),
        "header-2^64-1": (b"\xff" * 8 + payload, f"header: .*got {2**64 - 1}"),
        "header-past-end": ((89).to_bytes(8, "little") + payload, "header: .*88 bytes, got 89"),
        "header-over-the-cap": (
            (17 << 20).to_bytes(8, "little") + bytes(18 << 20), f"header: .*most {16 << 20}"),
        "header-empty": (bytes(8), "safetensors"),
        "header-no-json": (raw_safetensors({}, header=b"{" * 20), "safetensors"),
        "header-array": (raw_safetensors({}, header=b"[]"), "safetensors"),
        "header-deep": (raw_safetensors({}, header=b'{"a":' + b"[" * 100_000), "safetensors"),
        "header-no-utf8": (raw_safetensors({}, header=b'{"\xff":{}}'), "safetensors"),
        "no-tensors": (raw_safetensors({}), "at least one adapted module"),
        "trailing-bytes": (raw_safetensors(good, payload + b"\0"), "safetensors"),
        "missing-A": (tensor(B_KEY, [5, 2]), f"{A_KEY}: missing"),
        "missing-B": (tensor(A_KEY, [2, 6]), f"{B_KEY}: missing"),
        "other-module": (
            trained(target_modules=("p",)).export_weights(), f"{A_KEY}: missing"),
        "module-too-many": (
            trained(target_modules=("q", "p")).export_weights(), "p: expected modules of the"),
        "foreign-key": (tensor("model.weight", [2, 2]), "model.weight: expected a key like"),
        "no-suffix": (tensor("base_model.model.q.lora_A", [2, 6]), "q.lora_A: expected a key like"),
        "rank-3": (trained(rank=3).export_weights(), r"q: expected A \[2, 6\]"),
        "wider": (trained(7, 5).export_weights(), r"q: expected A \[2, 6\]"),
        "ranks-differ": (
            raw_safetensors(pair(np.zeros((2, 6), "f4"), np.zeros((5, 3), "f4")), bytes(108)),
            rf"{B_KEY}: expected shape \[out, 2\]"),
        "transposed": (
            raw_safetensors(pair(A.T, B.T), payload), rf"{B_KEY}: expected shape \[out, 6\]"),
        "nan": (with_A(spoilt["nan"]), f"{A_KEY}: .*NaN or Inf"),
        "inf": (with_A(spoilt["inf"]), f"{A_KEY}: .*NaN or Inf"),
        "beyond-float32": (
            raw_safetensors(pair(*wide, "F64"), b"".join(w.tobytes() for w in wide)),
            f"{A_KEY}: .*NaN or Inf"),
        "vector": (tensor(A_KEY, [12]), rf"{A_KEY}: expected a float matrix, got float32 \[12\]"),
        "scalar": (tensor(A_KEY, []), f"{A_KEY}: expected a float matrix"),
        "3-d": (tensor(A_KEY, [1, 2, 6]), f"{A_KEY}: expected a float matrix"),
        "100-d": (tensor(A_KEY, [1] * 100), A_KEY),
        "no-rows": (tensor(A_KEY, [0, 6]), f"{A_KEY}: expected a float matrix"),
        "no-rows-2^63-columns": (tensor(A_KEY, [0, 2**63]), A_KEY),
        "no-rows-2^62-columns": (tensor(A_KEY, [0, 2**62]), A_KEY),
        "2^40-columns": (
            raw_safetensors({A_KEY: {"dtype": "F32", "shape": [2, 2**40],
                                     "data_offsets": [0, 2**43]}}, bytes(64)), "safetensors"),
        "int64": (tensor(A_KEY, [2, 6], "I64", 8), f"{A_KEY}: expected a float matrix, got int64"),
        "int8": (tensor(A_KEY, [2, 6], "I8", 1), f"{A_KEY}: dtype I8 is not supported"),
        "float8": (tensor(A_KEY, [2, 6], "F8_E4M3", 1), f"{A_KEY}: dtype F8_E4M3"),
        "long-key": (tensor("x" * 100_000, [2, 6]), "x{200}[.]{3}: expected a key like"),
    }  # fmt: skip
    return found


HOSTILE = hostile_weights()


def check_refusal(error: pytest.ExceptionInfo, source: str) -> None:
    assert str(error.value).startswith(source), error.value
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_refused(what):
    data, names = HOSTILE[what]
    lora = trained()
    before = weight_bits(lora)
    with pytest.raises(le.FormatError, match=names) as caught:
        lora.import_weights(data)
    check_refusal(caught, "import_weights: ")
    assert weight_bits(lora) == before


# load takes its modules from the file, so these are other adapters to it, not wrong ones.
ONLY_IMPORT = {"other-module", "module-too-many", "wider"}


@pytest.mark.parametrize("what", sorted(set(HOSTILE) - ONLY_IMPORT))
def test_hostile_weights_file_is_refused(what, tmp_path):
    folder = saved(tmp_path)
    data, names = HOSTILE[what]
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(le.FormatError, match=names) as caught:
        le.MicroLoRA.load(folder)
    check_refusal(caught, str(folder / WEIGHTS))


def interesting_cuts(data: bytes) -> list[int]:
    """Before, inside and after each part of the file."""
    start = len(data) - len(payload_of(data))
    ends = [start + o for e in tensors_of(data).values() for o in e["data_offsets"]]
    near = {at + by for at in (0, 8, start // 2, start, *ends) for by in (-1, 0, 1)}
    return sorted(at for at in near if 0 <= at < len(data))


def tensors_of(data: bytes) -> dict[str, dict]:
    return {key: entry for key, entry in header_of(data).items() if key != "__metadata__"}


def payload_of(data: bytes) -> bytes:
    """What follows the header."""
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_truncated_files_are_refused(tmp_path):
    folder = saved(tmp_path)
    lora = trained(draw=9)
    before = weight_bits(lora)
    data = (folder / WEIGHTS).read_bytes()
    cuts = interesting_cuts(data)
    assert len(cuts) >= 15
    for at in cuts:
        with pytest.raises(le.FormatError, match=r"^import_weights: "):
            lora.import_weights(data[:at])
        (folder / WEIGHTS).write_bytes(data[:at])
        with pytest.raises(le.FormatError, match=WEIGHTS):
            le.MicroLoRA.load(folder)
    assert weight_bits(lora) == before


def test_flipped_header_bits_never_give_other_weights():
    """A damaged header is refused; where it still says the same (a changed name in the
    metadata), the weights are the file's own."""
    donor, lora = trained(), trained(draw=9)
    data = donor.export_weights()
    before, own = weight_bits(lora), weight_bits(donor)
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(data) - len(payload_of(data))):
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.integers(8)
        try:
            lora.import_weights(flipped)
        except le.FormatError:
            refused += 1
            assert weight_bits(lora) == before
        else:
            assert weight_bits(lora) == own
            redraw(lora, 9)
    assert refused > 150


def test_bfloat16_is_widened_without_torch():
    A, B, _ = trained().weights("q")
    a, b = (reference.round_bfloat16(w) for w in (A, B))
    halves = [(w.view(np.uint32) >> 16).astype("<u2") for w in (a, b)]
    lora = trained(draw=9)
    payload = b"".join(h.tobytes() for h in halves)
    lora.import_weights(raw_safetensors(pair(*halves, "BF16"), payload))
    assert lora.weights("q")[0].tobytes() == a.tobytes()
    assert lora.weights("q")[1].tobytes() == b.tobytes()


def test_float64_is_narrowed():
    A, B, _ = trained().weights("q")
    wide = [w.astype("f8") * (1 + 1e-12) for w in (A, B)]
    lora = trained(draw=9)
    lora.import_weights(raw_safetensors(pair(*wide, "F64"), b"".join(w.tobytes() for w in wide)))
    assert weight_bits(lora) == weight_bits(trained())


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", [WEIGHTS, STATE, CONFIG])
def test_pickle_is_not_opened(name, tmp_path):
    folder, mark = saved(tmp_path), tmp_path / "mark"
    data = pickle.dumps(Bomb(mark))
    pickle.loads(data)
    assert mark.exists()  # the bomb works
    mark.unlink()
    (folder / name).write_bytes(data)
    if name == STATE:
        load_dropping(folder, "")
    else:
        with pytest.raises(le.FormatError, match=name):
            le.MicroLoRA.load(folder)
    with pytest.raises(le.FormatError):
        trained().import_weights(data)
    assert not mark.exists()


# ---- random bytes -----------------------------------------------------------

GOOD = trained().export_weights()
OWN = weight_bits(trained())
LORA = trained(draw=9)
KEPT = weight_bits(LORA)

entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "C64", "X"]),
        "shape": st.lists(st.sampled_from([*range(-1, 5), 2**31, 2**63, 2**64 - 1]), max_size=4),
        "data_offsets": st.lists(st.integers(0, 200), min_size=2, max_size=2),
    }
)
headers = st.dictionaries(
    st.sampled_from([A_KEY, B_KEY, "__metadata__", "", "base_model.model.lora_A.weight"]),
    entry | st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)


def import_or_refuse(data: bytes) -> None:
    try:
        LORA.import_weights(data)
    except le.FormatError:
        assert weight_bits(LORA) == KEPT
    else:
        assert weight_bits(LORA) != KEPT
        redraw(LORA, 9)


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data):
    with pytest.raises(le.FormatError):
        LORA.import_weights(data)
    assert weight_bits(LORA) == KEPT


@given(headers, st.integers(0, 300))
def test_random_headers_raise_format_errors_only(header, size):
    import_or_refuse(raw_safetensors(header, bytes(size)))


edit = st.tuples(st.integers(0, len(GOOD) - 1), st.binary(max_size=3))


@given(st.lists(edit, min_size=1, max_size=4))
def test_random_edits_raise_format_errors_only(edits):
    data = GOOD
    for at, new in edits:
        data = data[:at] + new + data[at + len(new) :]
    import_or_refuse(data)


# ---- hostile configs --------------------------------------------------------

CONFIGS = {
    "peft_type-none": ("peft_type", {"peft_type": None}),
    "peft_type-IA3": ("peft_type", {"peft_type": "IA3"}),
    "r-0": ("r", {"r": 0}),
    "r-minus-1": ("r", {"r": -1}),
    "r-10^12": ("r", {"r": 10**12}),
    "r-10^400": ("r", {"r": 10**400}),
    "r-1.5": ("r", {"r": 1.5}),
    "r-text": ("r", {"r": "2"}),
    "r-true": ("r", {"r": True}),
    "r-null": ("r", {"r": None}),
    "r-list": ("r", {"r": [2]}),
    "r-nan": ("r", {"r": float("nan")}),
    "r-infinity": ("r", {"r": float("inf")}),
    "r-3": (r"q: expected A \[3, 6\]", {"r": 3}),
    "alpha-text": ("lora_alpha", {"lora_alpha": "4"}),
    "alpha-nan": ("lora_alpha", {"lora_alpha": float("nan")}),
    "alpha-10^400": ("lora_alpha", {"lora_alpha": 10**400}),
    "alpha-1e300": ("lora_alpha", {"lora_alpha": 1e300}),
    "alpha-null": ("lora_alpha", {"lora_alpha": None}),
    "alpha-long-list": ("lora_alpha", {"lora_alpha": [0] * 10_000}),
    "dropout-1": ("lora_dropout", {"lora_dropout": 1.0}),
    "dropout-negative": ("lora_dropout", {"lora_dropout": -0.5}),
    "dropout-null": ("lora_dropout", {"lora_dropout": None}),
    "rslora-text": ("use_rslora", {"use_rslora": "false"}),
    "rslora-1": ("use_rslora", {"use_rslora": 1}),
    "dora": ("use_dora", {"use_dora": True}),
    "qalora": ("use_qalora", {"use_qalora": True}),
    "bdlora": ("use_bdlora", {"use_bdlora": {"nblocks": 2}}),
    "kasa": ("kasa_config", {"kasa_config": {"beta": 1}}),
    "alora": ("alora_invocation_tokens", {"alora_invocation_tokens": [1, 2]}),
    "lora_bias": ("lora_bias", {"lora_bias": True}),
    "rank_pattern": ("rank_pattern", {"rank_pattern": {"q": 3}}),
    "rank_pattern-regex": ("rank_pattern", {"rank_pattern": {"(a+)+$": 3}}),
    "alpha_pattern": ("alpha_pattern", {"alpha_pattern": {"q": 3}}),
    "modules_to_save": ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    "bias-all": ("bias", {"bias": "all"}),
    "bias-list": ("bias", {"bias": []}),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_hostile_config_is_refused(what, tmp_path):
    folder = saved(tmp_path)
    names, changes = CONFIGS[what]
    edit_config(folder, **changes)
    where = WEIGHTS if what == "r-3" else CONFIG
    with pytest.raises(le.FormatError, match=f"{names}: ?" if where == CONFIG else names) as caught:
        le.MicroLoRA.load(folder)
    check_refusal(caught, str(folder / where))
    assert str(caught.value).count(str(folder)) == 1


NO_CONFIGS = {
    "empty": b"",
    "null": b"null",
    "array": b"[]",
    "text": b'"LORA"',
    "number": b"1e999",
    "cut": b'{"r": 2',
    "deep": b"[" * 100_000,
    "deep-object": b'{"a":' * 100_000,
    "deep-inside": b'{"r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "huge": b'{"r": 2, "x": "' + b"x" * (2 << 20) + b'"}',
    "huge-spaces": b" " * (2 << 20),
    "not-utf8": b'{"peft_type": "\xff"}',
    "utf16": '{"r": 2}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf{}",
    "many-digits": b'{"r": ' + b"1" * 100_000 + b"}",
    "nul": b'{"r": 2}\0',
}


@pytest.mark.parametrize("what", NO_CONFIGS)
def test_config_that_is_no_json_object_is_refused(what, tmp_path):
    folder = saved(tmp_path)
    (folder / CONFIG).write_bytes(NO_CONFIGS[what])
    with pytest.raises(le.FormatError, match=f"{CONFIG}: expected") as caught:
        le.MicroLoRA.load(folder)
    check_refusal(caught, str(folder / CONFIG))


@pytest.mark.parametrize(
    ("listed", "order"),
    [
        (["b", "a"], ("b", "a")),
        (["a", "b"], ("a", "b")),
        (["b", "b", "a"], ("b", "a")),
        (["c", "b"], ("b", "a")),
        (["b", ["a"], {}, 3, None], ("b", "a")),
        ([], ("a", "b")),
        ("all-linear", ("a", "b")),
        ("(a+)+$", ("a", "b")),
        (None, ("a", "b")),
        (3, ("a", "b")),
        ({"a": 1}, ("a", "b")),
    ],
    ids=repr,
)
def test_modules_come_from_the_weights_in_the_listed_order(listed, order, tmp_path):
    lora = trained(target_modules=("b", "a"))
    folder = saved(tmp_path, lora)
    (folder / STATE).unlink()
    edit_config(folder, target_modules=listed)
    loaded = le.MicroLoRA.load(folder)
    assert loaded.config.target_modules == order
    assert weight_bits(loaded) == weight_bits(lora)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("instead", ["nothing", "folder", "pipe", "dangling link"])
def test_missing_file_is_named(name, instead, tmp_path):
    folder = saved(tmp_path)
    (folder / name).unlink()
    if instead == "folder":
        (folder / name).mkdir()
    elif instead == "pipe":
        os.mkfifo(folder / name)
    elif instead == "dangling link":
        (folder / name).symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=f"{name}: expected an adapter folder's file"):
        le.MicroLoRA.load(folder)


def test_missing_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in ("nowhere", "file", "file/below"):
        with pytest.raises((FileNotFoundError, NotADirectoryError), match=folder):
            le.MicroLoRA.load(tmp_path / folder)


def test_files_may_be_links(tmp_path):
    """As in the hub's cache, where a folder links to blobs."""
    folder = saved(tmp_path)
    for name in FILES:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(Path("..") / name)
    assert weight_bits(le.MicroLoRA.load(folder)) == OWN
    assert not caught_by_links(folder, tmp_path)


def caught_by_links(folder: Path, blobs: Path) -> list[str]:
    """Saves over the links and returns the blobs that it changed."""
    before = {name: (blobs / name).read_bytes() for name in FILES}
    trained(draw=9).save(folder)
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
    return [name for name in FILES if (blobs / name).read_bytes() != before[name]]


# ---- where a folder may lie -------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "größe 投影", "u[1]*?", "-rf", "a.tmp-1-b", ".hidden"])
def test_folder_names(name, tmp_path):
    folder = tmp_path / "deep" / name
    trained(draw=9).save(folder)
    (tmp_path / "deep" / f".{name}.tmp-{dead_pid()}-x").mkdir()
    trained().save(str(folder) + "/")
    assert os.listdir(tmp_path / "deep") == [name]  # the leftover is swept, whatever the name
    assert weight_bits(le.MicroLoRA.load(str(folder) + "/")) == OWN


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained().save("a")
    trained(draw=9).save("./b/../a/")
    assert set(os.listdir(tmp_path)) - {"b"} == {"a"}
    assert weight_bits(le.MicroLoRA.load("a")) == KEPT


def test_link_to_a_folder_stays_a_link(tmp_path):
    trained().save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    trained(draw=9).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    for name in ("link", "real"):
        assert weight_bits(le.MicroLoRA.load(tmp_path / name)) == KEPT
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    (tmp_path / "new").symlink_to("made-later")
    trained().save(tmp_path / "new")
    assert weight_bits(le.MicroLoRA.load(tmp_path / "made-later")) == OWN


def test_working_folder_is_refused(tmp_path, monkeypatch):
    """To replace it would leave this process, and the shell above it, nowhere."""
    folder = saved(tmp_path)
    (folder / "sub").mkdir()
    before = contents(folder)
    for here, target in [(folder, "."), (folder, folder), (folder / "sub", ".."), (folder, "/")]:
        monkeypatch.chdir(here)
        with pytest.raises(ValueError, match="working folder"):
            trained(draw=9).save(target)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_file_in_the_folders_place_is_kept(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OSError, match="Not a directory"):
        trained().save(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
    assert os.listdir(tmp_path) == ["a"]


def test_whatever_else_lies_in_the_folder_is_kept(tmp_path):
    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("notes")
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "sub" / "deeper" / "weights.bin").write_bytes(b"\1\2\3")
    (folder / "sub" / "up").symlink_to("../notes.txt")
    (folder / "dangling").symlink_to("nowhere")
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe")
    inodes = [(folder / n).stat().st_ino for n in ("notes.txt", "sub/deeper/weights.bin")]
    for draw in (9, 0):
        trained(draw=draw).save(folder)
    names = {"notes.txt", "sub", "dangling", "link", "pipe"}
    assert set(os.listdir(folder)) == FILES | names
    assert os.readlink(folder / "dangling") == "nowhere"
    assert os.readlink(folder / "link") == str(tmp_path / "elsewhere")
    assert os.readlink(folder / "sub" / "up") == "../notes.txt"
    assert stat.S_ISFIFO((folder / "pipe").lstat().st_mode)
    assert (folder / "notes.txt").read_text() == "notes"
    # The same files, not copies: a folder of checkpoints costs nothing.
    after = [(folder / n).stat().st_ino for n in ("notes.txt", "sub/deeper/weights.bin")]
    assert after == inodes
    assert sorted(os.listdir(tmp_path)) == ["adapter", "elsewhere"]


def test_files_are_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    folder = saved(tmp_path)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("kept")
    (folder / "notes.txt").write_text("kept too")
    (folder / "dangling").symlink_to("nowhere")

    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    trained(draw=9).save(folder)
    assert (folder / "sub" / "file").read_text() == "kept"
    assert (folder / "notes.txt").read_text() == "kept too"
    assert os.readlink(folder / "dangling") == "nowhere"
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT


def test_permissions_are_kept(tmp_path):
    folder = saved(tmp_path)
    for mode in (0o700, 0o750, 0o2775):
        folder.chmod(mode)
        trained(draw=9).save(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == mode


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_new_folder_has_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        folder = saved(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    for name in FILES:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("where", ["", "/sub", "/sub/deeper"], ids=["itself", "sub", "deeper"])
def test_folder_with_a_mount_in_it_is_refused(where, tmp_path, monkeypatch):
    """To clear the old folder away would empty what is mounted there."""
    folder = tmp_path / "a b"
    trained().save(folder)
    before = contents(folder)
    point = os.fsencode(f"{folder}{where}").replace(b" ", rb"\040")
    lines = b"22 27 0:21 / /proc rw - proc proc rw\n36 35 98:0 / %s rw - ext4 /dev/x rw\n" % point
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda p: lines if str(p) == "/proc/self/mountinfo" else read(p)
    )
    with pytest.raises(OSError, match="mount points") as caught:
        trained(draw=9).save(folder)
    assert caught.value.errno == errno.EBUSY
    assert caught.value.filename == str(folder)
    assert contents(folder) == before
    trained(draw=9).save(tmp_path / "a")  # a longer name beside it is no matter
    trained(draw=9).save(tmp_path / "a b c")


def test_mounts_of_this_machine_are_seen():
    assert atomic._has_mounts(Path("/proc"))
    assert atomic._has_mounts(Path("/"))
    assert not atomic._has_mounts(Path("/proc/self"))


# ---- saves that are cut short -----------------------------------------------


def dead_pid() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


without_exchange = pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "fallback"])


@pytest.fixture
def exchange_or_not(exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return exchange


KILL = """
import os, random, signal, sys, time, warnings
import lora_engine as le
from helpers_files import trained, weight_bits
from lora_engine.adapters import atomic

warnings.simplefilter("error", UserWarning)
folder, rounds = sys.argv[1], int(sys.argv[2])
if sys.argv[3] == "fallback":
    atomic._exchange = lambda a, b: False
pair = [trained(draw=i, rank=i + 1, alpha=float(i + 1), seed=i) for i in range(2)]
want = [(weight_bits(each), each.config) for each in pair]
pair[0].save(folder)
with open(folder + "/notes.txt", "w") as file:
    file.write("kept")
parent, rng, cut, gone, seen = os.path.dirname(folder), random.Random(0), 0, 0, set()
for _ in range(rounds):
    child = os.fork()
    if not child:
        while True:
            for each in reversed(pair):
                each.save(folder)
    time.sleep(rng.uniform(0.002, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += len(os.listdir(parent)) > 1
    gone += not os.path.exists(folder)
    loaded = le.MicroLoRA.load(folder)
    seen.add(want.index((weight_bits(loaded), loaded.config)))
    with open(folder + "/notes.txt") as file:
        assert file.read() == "kept"
    pair[0].save(folder)
    assert len(os.listdir(parent)) == 1, os.listdir(parent)
print(cut, gone, len(seen))
"""


@pytest.mark.parametrize("exchange", ["exchange", "fallback"])
def test_kill_leaves_one_adapter_or_the_other(exchange, tmp_path):
    """A child that saves two adapters in turn is killed at 40 moments."""
    ran = run_python(
        "-c", KILL, str(tmp_path / "adapter"), "40", exchange, PYTHONPATH=str(Path(__file__).parent)
    )
    assert ran.returncode == 0, ran.stderr
    cut, _, seen = map(int, ran.stdout.split())
    assert cut >= 10, "too few kills fell into a save"
    assert seen == 2


WRITER = """
import sys
from helpers_files import trained
pair = [trained(draw=i, rank=i + 1, alpha=float(i + 1), seed=i) for i in range(2)]
for i in range(int(sys.argv[2])):
    pair[i % 2].save(sys.argv[1])
"""


def test_load_beside_saves_sees_one_adapter_or_the_other(tmp_path):
    """Config, weights and state are of one save, whenever the folder is exchanged."""
    folder = tmp_path / "adapter"
    pair = [trained(draw=i, rank=i + 1, alpha=float(i + 1), seed=i) for i in range(2)]
    want = [(weight_bits(each), each.config) for each in pair]
    pair[0].save(folder)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    seen = []
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder), "120"], env=env) as writer:
        while writer.poll() is None:
            loaded = le.MicroLoRA.load(folder)  # a dropped state is a warning, hence an error
            seen.append(want.index((weight_bits(loaded), loaded.config)))
    assert writer.returncode == 0
    assert min(seen.count(0), seen.count(1)) > 10


@without_exchange
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, STATE])
def test_load_that_a_save_overtakes_begins_anew(name, exchange_or_not, tmp_path, monkeypatch):
    """The folder is replaced, and the old one cleared away, just before one file is read."""
    newer = trained(draw=9, rank=3, alpha=1.5, seed=4)
    folder = saved(tmp_path)
    read_at, saves = atomic._read_at, []

    def overtaken(handle, wanted, limit):
        if wanted == name and not saves:
            saves.append(newer.save(folder))
        return read_at(handle, wanted, limit)

    monkeypatch.setattr(atomic, "_read_at", overtaken)
    loaded = le.MicroLoRA.load(folder)
    assert (weight_bits(loaded), loaded.config) == (weight_bits(newer), newer.config)


@without_exchange
def test_leftovers_of_a_dead_saver_are_swept(exchange_or_not, tmp_path):
    folder = saved(tmp_path)
    gone = tmp_path / f".adapter.tmp-{dead_pid()}-0"
    alive = tmp_path / f".adapter.tmp-{os.getppid()}-0"
    other = tmp_path / f".adapter2.tmp-{dead_pid()}-0"
    aside = tmp_path / ".adapter.old"
    for left in (gone, alive, other, aside):
        left.mkdir()
        (left / WEIGHTS).write_bytes(b"half")
    trained(draw=9).save(folder)
    assert set(os.listdir(tmp_path)) == {"adapter", alive.name, other.name}
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT


@without_exchange
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_interrupted_write_leaves_the_old(exchange_or_not, at, error, tmp_path, monkeypatch):
    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("kept")
    before = contents(folder)
    calls = []

    def write(path, data):
        calls.append(path.name)
        path.write_bytes(data[: len(data) // 2])
        if len(calls) > at:
            raise error("cut short")

    monkeypatch.setattr(atomic, "write_file", write)
    with pytest.raises(error, match="cut short"):
        trained(draw=9).save(folder)
    assert len(calls) == at + 1
    assert contents(folder) == before
    with pytest.raises(error, match="cut short"):
        trained(draw=9).save(tmp_path / "new")
    assert os.listdir(tmp_path) == ["adapter"]


@without_exchange
@pytest.mark.parametrize("at", [0, 1])
def test_interrupted_rename_leaves_the_old(exchange_or_not, at, tmp_path, monkeypatch):
    folder = saved(tmp_path)
    before = contents(folder)
    rename, calls = os.rename, []

    def interrupted(a, b):
        calls.append(b)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "rename", interrupted)
    if exchange_or_not:
        trained(draw=9).save(folder)
        assert not calls
        return
    with pytest.raises(KeyboardInterrupt):
        trained(draw=9).save(folder)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_fallback_replaces_and_recovers(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("kept")
    trained(draw=9).save(folder)
    assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
    assert os.listdir(tmp_path) == ["adapter"]
    for finish in (lambda: None, lambda: trained(draw=9).save(folder)):
        folder.rename(tmp_path / ".adapter.old")  # as a kill between the two renames leaves it
        finish()
        assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
        assert (folder / "notes.txt").read_text() == "kept"
        assert os.listdir(tmp_path) == ["adapter"]


def test_recovery_prefers_the_folder_that_is_there(tmp_path):
    folder = saved(tmp_path)
    shutil.copytree(folder, tmp_path / ".adapter.old")
    trained(draw=9).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / ".adapter.old" / WEIGHTS)
    assert weight_bits(le.MicroLoRA.load(folder)) == OWN


@pytest.mark.parametrize(
    ("code", "falls_back"),
    [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EPERM, True), (errno.EIO, False)],
    ids=lambda v: errno.errorcode[v] if v in errno.errorcode and v is not True else "",
)
def test_system_without_exchange(code, falls_back, tmp_path, monkeypatch):
    import ctypes

    class Library:
        @staticmethod
        def renameat2(*args):
            ctypes.set_errno(code)
            return -1

    folder = saved(tmp_path)
    before = contents(folder)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Library)
    if falls_back:
        trained(draw=9).save(folder)
        assert weight_bits(le.MicroLoRA.load(folder)) == KEPT
    else:
        with pytest.raises(OSError, match="adapter") as caught:
            trained(draw=9).save(folder)
        assert caught.value.errno == code
        assert contents(folder) == before
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("exists", [True, False], ids=["old", "new"])
def test_parent_that_cannot_be_written(exists, tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal is played."""
    folder = tmp_path / "adapter"
    if exists:
        trained().save(folder)
    before = contents(folder) if exists else None

    def refuse(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: .*adapter"):
        trained(draw=9).save(folder)
    assert (contents(folder) if folder.exists() else None) == before
    assert os.listdir(tmp_path) == (["adapter"] if exists else [])


def test_two_threads_may_save_one_folder(tmp_path):
    import threading

    folder = saved(tmp_path)
    (folder / "notes.txt").write_text("kept")
    errors = []

    def save(draw):
        try:
            lora = trained(draw=draw)
            for _ in range(20):
                lora.save(folder)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(draw,)) for draw in (0, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert weight_bits(le.MicroLoRA.load(folder)) in (OWN, KEPT)
    assert (folder / "notes.txt").read_text() == "kept"
    assert os.listdir(tmp_path) == ["adapter"]


def test_loaded_folder_serves_like_the_saved(tmp_path):
    lora = trained()
    loaded = le.MicroLoRA.load(saved(tmp_path, lora))
    x = np.random.default_rng(0).standard_normal((3, 6)).astype("f4")
    A, B, s = lora.weights("q")
    out = np.full((3, 5), np.nan, "f4")
    loaded.forward(x, "q", out=out)
    assert delta_error(out, reference.lora_delta(x, A, B, s), magnitude(f64(x), A, B, s)) <= 1e-6
