"""AdapterStore: what EWC keeps of an adapter travels with it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_ewc import FORMS, samples
from helpers_store import open_store, put, same

import lora_engine as le


def observe(store, ewc, user, draw, boundary):
    rng = np.random.default_rng(draw)
    x, grad = samples(rng, 5, 12, 7)
    slot = store.slot(user)
    ewc.observe(x, grad, slot)
    store.pool.adapt(x, grad, np.full(5, slot, np.int32), lr=0.02, ewc=ewc)
    if boundary:
        ewc.consolidate(slot)


@pytest.mark.parametrize("form", FORMS)
def test_ewc_goes_on_as_if_all_had_stayed_resident(form, tmp_path):
    stores = [open_store(tmp_path / name, n) for name, n in (("few", 2), ("all", 9))]
    pairs = [(store, le.EWC(store.pool, 2.0, 0.8, form, fisher_samples=7)) for store in stores]
    for store, ewc in pairs:
        store.carry(ewc)
        for i in range(40):
            observe(store, ewc, f"u{i * 5 % 7}", i, boundary=i % 3 == 1)
    (few, few_ewc), (whole, whole_ewc) = pairs
    assert len(few.pool) == 2
    recorded = 0
    for i in range(7):
        a, b = few.slot(f"u{i}"), whole.slot(f"u{i}")
        mine, theirs = few_ewc.slot_state(a), whole_ewc.slot_state(b)
        assert {k: v.tobytes() for k, v in mine.items()} == {
            k: v.tobytes() for k, v in theirs.items()
        }
        recorded += f"{form}.anchor_A.0.0" in mine and f"{form}.samples.0.0" in mine
        assert same(few.pool.get(a), whole.pool.get(b))
    assert recorded  # both kinds were there
    for store in stores:
        store.close()


@pytest.mark.parametrize("form", FORMS)
def test_each_change_to_ewc_alone_is_one_to_write(form, tmp_path):
    x, grad = samples(np.random.default_rng(0), 2, 12, 7)
    with open_store(tmp_path) as store:
        slot = put(store, "a", 1)
        store.flush()
        ewc = le.EWC(store.pool, 1.0, 0.9, form)
        store.carry(ewc)
        with pytest.raises(ValueError, match="companion: expected one, got a second"):
            store.carry(ewc)
        changes = [
            lambda: ewc.observe(x, grad, slot),
            lambda: ewc.consolidate(),
            lambda: ewc.load_state(ewc.state()),
            lambda: ewc.remove(slot),
        ]
        for change in changes:
            assert store.flush() == 0
            change()
            assert store.flush() == 1


def test_a_state_that_no_ewc_takes_stays_in_the_file(tmp_path):
    with open_store(tmp_path, 1) as store:
        ewc = le.EWC(store.pool, 1.0, form="factor")
        store.carry(ewc)
        put(store, "a", 1)
        observe(store, ewc, "a", 0, boundary=True)
        state = ewc.slot_state(store.slot("a"))
    with open_store(tmp_path, 1) as store:  # nobody asks for it
        put(store, "a", 2)
        store.slot("b")
    with open_store(tmp_path, 1) as store:  # the other form
        ewc = le.EWC(store.pool, 1.0, form="delta")
        store.carry(ewc)
        with pytest.warns(UserWarning, match=r"its state is kept, and not used:.*form delta"):
            put(store, "a", 3)
        observe(store, ewc, "a", 1, boundary=True)
    with open_store(tmp_path, 1) as store:
        store.slot("a")
        kept = store._residents.find("a").kept
        assert {k: v.tobytes() for k, v in kept.items() if k.startswith("factor")} == {
            k: v.tobytes() for k, v in state.items()
        }
        assert "delta.anchor_A.0.0" in kept
