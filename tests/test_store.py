"""AdapterStore: who is resident, what is on disk, and that both are the same adapter."""

from __future__ import annotations

import copy
import gc
import sys

import numpy as np
import pytest
import torch
from helpers_ewc import samples
from helpers_files import run_python
from helpers_store import SIZES, drawn, file_of, files, open_store, put, same

import lora_engine as le
from lora_engine.adapters import store_file

# ---- what comes back --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_adapter_comes_back_to_the_bit_from_eviction_flush_and_close(dtype, tmp_path):
    want = {}
    with open_store(tmp_path, 3, dtype=dtype) as store:
        for i in range(20):
            slot = put(store, f"user {i}", i, rank=1 + i % 4)
            want[f"user {i}"] = store.pool.get(slot)  # as the pool's dtype has it
            assert len(store.pool) <= 3
        for user, adapter in want.items():
            assert same(store.pool.get(store.slot(user)), adapter)
    with open_store(tmp_path, 3, dtype=dtype) as store:
        for user, adapter in reversed(want.items()):
            assert same(store.pool.get(store.slot(user)), adapter)
        size = {"float32": 4}.get(dtype, 2) * (12 + 7)
        assert file_of(tmp_path, "user 3").stat().st_size < 600 + 4 * size


@pytest.mark.parametrize("user_count", [1, 40])
def test_what_is_learned_goes_on_through_evictions(user_count, tmp_path):
    """Against a pool that holds everyone."""
    rng = np.random.default_rng(0)
    pool = le.AdapterPool(12, 7)
    slots: dict[str, int] = {}
    with open_store(tmp_path, 5) as store:
        for _ in range(40):
            users = [f"u{rng.integers(user_count)}" for _ in range(4)]
            x, grad = (rng.standard_normal((4, n)).astype("f4") for n in (12, 7))
            with store.slots(users) as ids:
                for user, slot in zip(users, ids.tolist(), strict=True):
                    if user not in slots:
                        slots[user] = pool.add(*store.pool.get(slot))
                theirs = np.array([slots[user] for user in users], np.int32)
                assert store.pool.adapt(x, grad, ids, lr=0.05).applied.all()
                pool.adapt(x, grad, theirs, lr=0.05)
                y = store.pool.forward(x, ids)
                assert y.tobytes() == pool.forward(x, theirs).tobytes()
                assert np.abs(y).max() > 0


def test_slices_and_missing_ones(tmp_path):
    sizes = {"in_features": 12, "out_features": (7, 3)}
    A, B, _ = drawn(1)
    with open_store(tmp_path, 1, **sizes) as store:
        store.pool.set(store.slot("a"), [A, None], [B, None], 2.0)
        fresh = store.pool.get(store.slot("b"))
        assert [a.shape for a in fresh[0]] == [(2, 12), (2, 12)]
        assert [b.shape for b in fresh[1]] == [(7, 2), (3, 2)]
        got = store.pool.get(store.slot("a"))
        assert got[0][0].tobytes() == A.tobytes()
        assert got[1][0].tobytes() == B.tobytes()
        assert got[0][1] is got[1][1] is None


# ---- a new user -------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_is_no_file_until_it_learns(tmp_path):
    x, grad = samples(np.random.default_rng(0), 1, 12, 7)
    with open_store(tmp_path, 1, rank=3, alpha=6.0) as store:
        A, B, scaling = store.pool.get(store.slot("ann"))
        assert (A.shape, scaling) == ((3, 12), 2.0)
        assert not B.any()
        bound = 1 / np.sqrt(12)
        assert 0.8 * bound < np.abs(A).max() <= bound
        other = store.pool.get(store.slot("bob"))[0]
        assert not np.array_equal(A, other)
        assert same(store.pool.get(store.slot("ann")), (A, B, scaling))  # drawn again
        assert store.flush() == 0
        assert not files(tmp_path)
        store.pool.adapt(x, grad, np.array([store.slot("ann")], np.int32), lr=0.1)
        assert store.flush() == 1
        assert store.flush() == 0
        assert files(tmp_path) == [file_of(tmp_path, "ann")]


def test_who_has_none_is_served_the_base_where_none_is_to_be_made(tmp_path):
    with open_store(tmp_path, 2) as store:
        assert store.slot("nobody", create=False) == -1
        slot = store.slot("ann")
        assert store.slot("ann", create=False) == slot
        with store.slots(["nobody", "ann", "nobody"], create=False) as ids:
            assert ids.dtype == np.int32
            assert ids.tolist() == [-1, slot, -1]
        assert len(store.pool) == 1


# ---- who leaves -------------------------------------------------------------


def resident(store, users):
    """Who of them is in the pool, without bringing anyone in."""
    return [u for u in users if u in store._residents._users]


def test_the_least_recently_asked_for_leaves_and_its_slot_is_anothers(tmp_path):
    with open_store(tmp_path, 3) as store:
        slots = {user: store.slot(user) for user in "abc"}
        assert store.slot("a") == slots["a"]
        assert store.slot("d") == slots["b"]
        assert resident(store, "abcd") == ["a", "c", "d"]
        with store.slots(["c", "a"]):
            pass
        store.slot("e")
        assert resident(store, "abcde") == ["a", "c", "e"]


def test_a_pinned_adapter_stays_until_the_last_batch_ends(tmp_path):
    with open_store(tmp_path, 3) as store:
        with store.slots(["a", "b"]) as outer:
            with store.slots(["a", "a"]):
                for user in "cdefg":
                    store.slot(user)
                assert [store.slot(u) for u in "ab"] == outer.tolist()
            for user in "hij":
                store.slot(user)
            assert [store.slot(u) for u in "ab"] == outer.tolist()
            with (
                pytest.raises(RuntimeError, match="resident: expected an adapter that is not in"),
                store.slots([*"cde"]),
            ):
                pass
            assert resident(store, "abcde") == ["a", "b", "c"]  # c was let go again
            store.slot("f")
            assert resident(store, "abdf") == ["a", "b", "f"]
        for user in "xyz":
            store.slot(user)
        assert resident(store, "ab") == []


def test_a_gradient_that_waits_holds_its_adapter(tmp_path):
    x, grad = samples(np.random.default_rng(0), 1, 12, 7)
    with open_store(tmp_path, 2) as store:
        slot = store.slot("a")
        store.pool.accumulate_gradient(slot, x, grad)
        for user in "bcd":
            store.slot(user)
        assert store.slot("a") == slot
        assert store.pool.apply_updates(0.1) == {slot: ""}
        store.flush()
        for user in "bc":
            store.slot(user)
        assert resident(store, "a") == []
        assert store.pool.get(store.slot("a"))[1].any()


def test_a_batch_of_more_users_than_fit_is_refused_and_pins_nobody(tmp_path):
    with open_store(tmp_path, 2) as store:
        with pytest.raises(ValueError, match=r"at most resident = 2, got 3"), store.slots([*"abc"]):
            pass
        with pytest.raises(TypeError, match="expected several ids, got text"), store.slots("a" * 9):
            pass
        with pytest.raises(TypeError, match="user: expected text, got int"), store.slots(["a", 3]):
            pass
        for user in "bcde":
            store.slot(user)


def test_an_adapter_of_a_larger_rank_than_is_allowed_now_is_served_the_base(tmp_path):
    with open_store(tmp_path, 2) as store:
        put(store, "wide", 1, rank=8)
    with open_store(tmp_path, 1, rank=2, max_rank=4) as store:
        put(store, "b", 2)
        message = r"lora_A\.0: expected a rank of at most max_rank = 4, got 8"
        with pytest.warns(UserWarning, match=message):
            assert store.slot("wide") == -1
        assert message.replace("\\", "") in store.damaged["wide"]
        assert store.evictions == 0
    with open_store(tmp_path, 1) as store:
        assert same(store.pool.get(store.slot("wide")), drawn(1, 8))


def test_a_slot_that_was_removed_from_the_pool_is_an_error_and_holds_no_lock(tmp_path):
    store = open_store(tmp_path, 1)
    store.pool.remove(store.slot("a"))
    for call in (lambda: store.slot("b"), store.flush, store.close):
        for _ in range(2):
            with pytest.raises(IndexError):
                call()
    store.pool.add(*drawn(0))  # its slot is in use again
    store.close()


# ---- ids --------------------------------------------------------------------

IDS = ["../x", "/etc/passwd", "a\0b", "", ".", "größe 投影 🦊", "\u00e9", "e\u0301", "\u202e\n",
       "x" * 10240, '","digest":"00', "CON", "%2e%2e"]  # fmt: skip


def test_no_id_reaches_the_file_system(tmp_path):
    with open_store(tmp_path, 2) as store:
        for i, user in enumerate(IDS):
            put(store, user, i)
    names = [p.relative_to(tmp_path / "store" / "adapters").as_posix() for p in files(tmp_path)]
    assert len(names) == len(set(IDS)) == len(IDS)
    for name in names:
        shard, file = name.split("/")
        assert int(shard + file.removesuffix(".safetensors"), 16) >= 0
        assert (len(shard), len(file)) == (3, 61 + 12)
    assert {p.name for p in tmp_path.iterdir()} == {"store"}
    with open_store(tmp_path, 2) as store:
        for i, user in enumerate(IDS):
            assert same(store.pool.get(store.slot(user)), drawn(i))


@pytest.mark.parametrize(
    ("user", "error", "match"),
    [
        (3, TypeError, "expected text, got int"),
        (b"ann", TypeError, "expected text, got bytes"),
        (None, TypeError, "expected text, got NoneType"),
        ("\ud800", ValueError, "half a surrogate pair"),
        ("x" * (store_file.MAX_USER + 1), ValueError, "at most 65536 bytes, got 65537"),
    ],
)
def test_what_is_no_id_is_refused(user, error, match, tmp_path):
    with open_store(tmp_path) as store:
        with pytest.raises(error, match=match):
            store.slot(user)
        with pytest.raises(error, match=match):
            store.remove(user)
        assert len(store.pool) == 0


# ---- PEFT -------------------------------------------------------------------


def test_an_exported_adapter_does_in_peft_what_it_does_here(tmp_path):
    from peft import PeftModel

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(12, 7, bias=False)

        def forward(self, x):
            return self.layer(x)

    x = np.random.default_rng(0).standard_normal((5, 12)).astype("f4")
    model = Model()
    base = model(torch.from_numpy(x)).detach().numpy()
    with open_store(tmp_path, 1) as store:
        put(store, "a", 1, rank=3)
        want = base + store.pool.forward(x, np.full(5, store.slot("a"), np.int32))
        store.export("a", tmp_path / "resident", "layer")
        store.slot("b")
        store.export("a", tmp_path / "from_disk", ["layer"])
        with pytest.raises(ValueError, match="user: expected one with an adapter, got 'nobody'"):
            store.export("nobody", tmp_path / "no", "layer")
        with pytest.raises(ValueError, match=r"expected 1 different names, got \['q', 'k'\]"):
            store.export("a", tmp_path / "no", ["q", "k"])
    for name in ("resident", "from_disk"):
        with torch.no_grad():
            got = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / name)(
                torch.from_numpy(x)
            )
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "no").exists()


def test_slices_are_exported_as_modules(tmp_path):
    A, B, _ = drawn(1)
    with open_store(tmp_path, 2, in_features=12, out_features=(7, 3, 7)) as store:
        store.pool.set(store.slot("a"), [A, None, 2 * A], [B, None, B], 2.0)
        store.export("a", tmp_path / "folder", ["q", "k", "v"])
    modules = le.Adapter.load(tmp_path / "folder").modules
    assert {name: (m.A.tobytes(), m.B.tobytes(), m.scaling) for name, m in modules.items()} == {
        "q": (A.tobytes(), B.tobytes(), 2.0),
        "v": ((2 * A).tobytes(), B.tobytes(), 2.0),
    }


# ---- removing, closing ------------------------------------------------------


def test_remove_deletes_what_is_resident_and_what_is_on_disk(tmp_path):
    with open_store(tmp_path, 2) as store:
        for i, user in enumerate("abc"):
            put(store, user, i)
        store.flush()
        assert store.remove("a")  # on disk only
        put(store, "c", 9)
        assert store.remove("c")  # resident, and changed
        assert not store.remove("c")
        with (
            store.slots(["b"]),
            pytest.raises(RuntimeError, match="user: expected one that no batch uses, got 'b'"),
        ):
            store.remove("b")
        store.flush()
        assert files(tmp_path) == [file_of(tmp_path, "b")]
        assert not store.pool.get(store.slot("a"))[1].any()


def test_a_closed_store_says_so_and_closes_again(tmp_path):
    with open_store(tmp_path) as store:
        put(store, "a", 1)
    assert "closed" in repr(store)
    store.close()
    calls = (lambda: store.slot("a"), store.flush, lambda: store.remove("a"),
             lambda: store.carry(None), lambda: store.slots(["a"]).__enter__())  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match="expected an open store, got one that is closed"):
            call()


AT_EXIT = """
import sys, lora_engine as le, numpy as np
store = le.AdapterStore(sys.argv[1], 2, in_features=12, out_features=7)
for i in range(int(sys.argv[2])):
    slot = store.slot(str(i))
    store.pool.set(slot, np.full((2, 12), i + 1, "f4"), np.ones((7, 2), "f4"), 1.0)
del store
"""


@pytest.mark.parametrize("users", [1, 5])  # with no writer started, and with
def test_a_store_that_nobody_closed_is_written_when_the_interpreter_ends(users, tmp_path):
    done = run_python("-c", AT_EXIT, str(tmp_path / "store"), str(users))
    assert (done.returncode, done.stderr) == (0, "")
    with open_store(tmp_path) as store:
        for i in range(users):
            assert (store.pool.get(store.slot(str(i)))[0] == i + 1).all()


def test_a_store_is_kept_until_it_is_closed(tmp_path):
    put(open_store(tmp_path), "a", 1)
    gc.collect()
    with pytest.raises(le.StoreLocked) as locked:
        open_store(tmp_path)
    assert locked.value.pid is not None
    (store,) = sys.modules["lora_engine.adapters.store"]._open_stores
    store.close()
    with open_store(tmp_path) as again:
        assert same(again.pool.get(again.slot("a")), drawn(1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resident": 0}, "resident: expected at least 1, got 0"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"resident": True}, "resident: expected at least 1, got True"),
        ({"alpha": float("inf")}, "alpha: expected a finite number, got inf"),
        ({"rank": 9, "max_rank": 8}, "rank: expected at most 8, got 9"),
    ],
)
def test_bad_settings(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        le.AdapterStore(tmp_path / "store", **{**SIZES, **options})
    assert not (tmp_path / "store").exists()
