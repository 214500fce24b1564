"""What a launcher takes from a tuned file, and what it does not."""

from __future__ import annotations

import json
import pwd
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits
from helpers_triton import on_device, triton_backend  # noqa: F401  a fixture

import lora_engine as le
from lora_engine import reference
from lora_engine.kernels import batched_lora_delta, lora_delta, nf4_forms, tunable, tuned
from lora_engine.kernels.launch import DEVICES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TUNABLES = (lora_delta.TILING, batched_lora_delta.TILING, nf4_forms.TILING)
pytestmark = pytest.mark.usefixtures("triton_backend")
IN, OUT, RANK = 64, 96, 4
KEY = f"lora_delta x=fp32 w=fp32 in={IN} out={OUT} rank=16 rows=16"
CHOICE = {"rows": 32, "columns": 64, "warps": 8, "stages": 3}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The user's folder and the packaged one, both empty."""
    user, packaged = tmp_path / "user", tmp_path / "packaged"
    for folder in (user, packaged):
        folder.mkdir()
    monkeypatch.setenv("LORA_ENGINE_TUNED", str(user))
    monkeypatch.setattr(tuned, "PACKAGED", packaged)

    def forget() -> None:
        tuned.forget()
        for op in TUNABLES:
            op.forget()

    forget()
    yield user, packaged
    forget()


def content(**changes: Any) -> dict[str, Any]:
    made = {
        "format": tuned.FORMAT,
        "device": tunable.identity(None),
        "versions": tunable.versions(),
        "choices": {KEY: CHOICE},
    }
    return made | changes


def write(folder: Path, data: Any) -> None:
    path = folder / tuned.file_name(tunable.identity(None))
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def chosen(n: int = 9) -> Any:
    return lora_delta.TILING.choose(None, n, torch.float32, torch.float32, IN, OUT, RANK)


def test_a_choice_is_launched_and_changes_no_bit(places, monkeypatch):
    rng = np.random.default_rng(0)
    x, A, B = (on_device(rng.standard_normal(s)) for s in ((9, IN), (RANK, IN), (OUT, RANK)))
    untuned = le.lora_delta(x, A, B, 0.5)
    write(places[0], content())
    tuned.forget()
    lora_delta.TILING.forget()
    launched = []
    launch = lora_delta.launch

    def spy(fn, grid, pointers, sizes, shape, constants, config):
        launched.append((grid, constants[:2], config))
        return launch(fn, grid, pointers, sizes, shape, constants, config)

    monkeypatch.setattr(lora_delta, "launch", spy)
    got = le.lora_delta(x, A, B, 0.5)
    assert bits(got) == bits(untuned)
    want = reference.lora_delta(x.cpu(), A.cpu(), B.cpu(), 0.5)
    assert np.allclose(got.cpu(), want, atol=1e-4)
    shrink, expand = launched
    assert shrink[1:] == ((32, 16), lora_delta.SHRINK._replace(num_warps=8, num_stages=3))
    assert expand[:2] == ((1, 2, 1), (32, 64))


REFUSED = {
    "cut": json.dumps(content()).encode()[:-40],
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "too large": b" " * (tuned.MAX_BYTES + 1),
    "a list": [1, 2],
    "another format": content(format=2),
    "no device": content(device=None),
    "no choices": content(choices=[CHOICE]),
    "choices of another kind": content(choices={KEY: 3}),
    "another device": content(device=tunable.identity(None) | {"name": "NVIDIA B200"}),
    "another arch": content(device=tunable.identity(None) | {"arch": "sm_80"}),
    "fewer processors": content(device=tunable.identity(None) | {"processors": 66}),
    "another engine": content(versions=tunable.versions() | {"lora_engine": "0.0.9"}),
    "another triton": content(versions=tunable.versions() | {"triton": "3.5.0"}),
    "other kernels": content(versions=tunable.versions() | {"kernels": "0" * 16}),
    "no versions": content(versions={}),
    "no such rows": content(choices={KEY: CHOICE | {"rows": 64}}),
    "no power of two": content(choices={KEY: CHOICE | {"columns": 100}}),
    "a float": content(choices={KEY: CHOICE | {"warps": 8.0}}),
    "a bool": content(choices={KEY: CHOICE | {"warps": True}}),
    "text": content(choices={KEY: CHOICE | {"warps": "8"}}),
    "one more": content(choices={KEY: CHOICE | {"registers": 1}}),
    "one less": content(choices={KEY: {"rows": 32}}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_refused_is_told_once_and_not_used(why, places):
    write(places[0], REFUSED[why])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (1, 9, 16, 100):
            assert chosen(n) == lora_delta._heuristic(None, n)
        lora_delta.TILING.forget()
        assert chosen() == lora_delta._heuristic(None, 9)
    assert [str(w.message).split(": ")[1] for w in caught] == ["not used"]
    assert str(places[0]) in str(caught[0].message)
    assert caught[0].filename == __file__  # it points at who called


def test_no_file_is_no_warning(places, monkeypatch):
    assert chosen() == lora_delta._heuristic(None, 9)
    monkeypatch.setenv("LORA_ENGINE_TUNED", "/dev/null")
    tuned.forget()
    lora_delta.TILING.forget()
    assert chosen() == lora_delta._heuristic(None, 9)


def test_the_users_file_comes_before_the_packaged(places):
    user, packaged = places
    other = KEY.replace("rows=16", "rows=64")
    write(packaged, content(choices={KEY: CHOICE | {"warps": 4}, other: CHOICE}))
    write(user, content())
    assert chosen() == lora_delta.Tiling(**CHOICE)
    assert chosen(64) == lora_delta.Tiling(**CHOICE)  # of which the user's says nothing
    assert chosen(65) == lora_delta._heuristic(None, 65)


def test_a_case_is_looked_up_once(places, monkeypatch):
    write(places[0], content())
    looked_up = []
    choice = tuned.choice
    monkeypatch.setattr(tuned, "choice", lambda *given: looked_up.append(given) or choice(*given))
    for n in (9, 9, 10, 16, 2):
        assert chosen(n).warps == 8
    assert len(looked_up) == 1


def test_where_the_users_folder_is(monkeypatch):
    monkeypatch.delenv("LORA_ENGINE_TUNED")
    monkeypatch.setenv("HOME", "/home/one")
    for base, want in (("/c", "/c"), ("", "/home/one/.cache"), ("not/whole", "/home/one/.cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert tuned.folder() == Path(want, "lora_engine", "tuned")
    monkeypatch.setenv("LORA_ENGINE_TUNED", "/t")
    assert tuned.folder() == Path("/t")


def test_a_user_without_a_home_has_no_folder(monkeypatch):
    for name in ("LORA_ENGINE_TUNED", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert tuned.folder() is None
    assert tuned.folders() == [tuned.PACKAGED]
    tuned.forget()
    lora_delta.TILING.forget()
    assert chosen() == lora_delta._heuristic(None, 9)


def test_kernels_that_change_are_other_versions(tmp_path):
    kernels = Path(tuned.__file__).parent
    assert tunable.versions()["kernels"] == tuned.digest(kernels.glob("*.py"))
    found = set()
    for name, data in (("a", b""), ("a", b"1"), ("b", b"1"), ("a", b"2")):
        (tmp_path / name).write_bytes(data)
        found.add(tuned.digest(tmp_path.iterdir()))
    assert len(found) == 4


def test_a_file_is_named_after_its_device():
    hostile = {"name": "../../etc/x\0 " + "y" * 500, "arch": "sm_90", "processors": 1}
    assert tuned.file_name({"name": "NVIDIA H200", "arch": "sm_90", "processors": 132}) == (
        "nvidia-h200-sm-90-132.json"
    )
    assert "/" not in tuned.file_name(hostile)
    assert len(tuned.file_name(hostile)) < 200


SIZES = (1, 64, 4096)


def cases() -> Iterator[tuple[Any, int, tuple[Any, ...]]]:
    """Many, of which no two may share an entry."""
    rows = tunable.ROWS
    for n, x, wide, out in product(rows, DTYPES, SIZES, SIZES):
        for w, rank in product(DTYPES, (16, 32, 256)):
            yield TUNABLES[0], n, (x, w, wide, out, rank)
            outs = ((out,), (out, 1, 1), (out, 11))
            for given in product(outs, (1, 2), (False, True)):
                slices, *others = given
                yield TUNABLES[1], n, (x, w, wide, slices, rank, *others)
        for how, block, nested in product(("native", "tf32", "ieee"), (64, 128), (-1, 8)):
            yield TUNABLES[2], n, (x, how, wide, out, block, nested)


def test_no_two_cases_share_an_entry():
    keys = [op.key(n, *case) for op, n, case in cases()]
    assert len(keys) > 10_000
    assert len(set(keys)) == len(keys)


def test_ranks_and_rows_that_share_an_entry_have_one_heuristic():
    assert [tunable.rank_bucket(r) for r in (0, 1, 16, 17, 32, 33, 300)] == [
        16, 16, 16, 32, 32, 64, 512,
    ]  # fmt: skip
    for n in (*range(1, 300), 1023, 1024, 1025, 4096, 100_000):
        rows = tunable.rows_bucket(n)
        assert rows >= n or n > 4096
        for op, case in (
            (TUNABLES[0], ()),
            (TUNABLES[1], ()),
            (TUNABLES[2], (torch.bfloat16, "native", 4096)),
            (TUNABLES[2], (torch.float32, "ieee", 4096)),
            (TUNABLES[2], (torch.float16, "tf32", 4096)),
            (TUNABLES[2], (torch.float32, "ieee", 4095)),
        ):
            assert op.heuristic(None, n, *case) == op.heuristic(None, rows, *case)


def test_the_heuristic_is_in_its_space():
    for op, n, case in cases():
        space = op.space(None, n, *case)
        assert op.heuristic(None, n, *case) in space
        assert len(set(space)) == len(space)


@pytest.mark.parametrize("device", DEVICES)
def test_what_may_be_chosen_fits_the_kernels(device):
    """The order of summation of a product is the heuristic's, whatever is chosen."""
    for n, x in product(tunable.ROWS, DTYPES):
        form = nf4_forms.product_form(None, n, x, "native", True, DEVICES[device])
        for choice in nf4_forms.space(form):
            made = choice.form(form)
            assert (made.block_r, made.blocks) == (form.block_r, form.blocks)
            assert made.config.registers == form.config.registers
    for tiling in lora_delta.SPACE:
        assert tiling.rows in (16, 32)  # one matrix instruction
    for choice in batched_lora_delta.SPACE:
        assert choice.tile.block_m in (16, 32)
