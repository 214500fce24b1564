"""Samples that Sona holds out: which are, of whom, and what is judged by them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from helpers import bits
from helpers_sona import IN, OUT, config, module, row, taught

import lora_engine as le
from lora_engine.learning.held_out import HeldOut


def _drawn(held: HeldOut, count: int) -> list[int]:
    """Which of so many samples are held out, from where it is now."""
    found = []
    for _ in range(count):
        if held.is_next():
            found.append(held.seen)
        held.seen += 1
    return found


def test_one_of_each_ten_is_drawn_evenly_and_by_the_seed():
    drawn = _drawn(HeldOut(3, IN, OUT, [1]), 20_000)  # over two draws of places
    assert [i // 10 for i in drawn] == list(range(2000))
    places = Counter(i % 10 for i in drawn)
    assert len(places) == 10
    assert max(places.values()) < 1.4 * min(places.values())
    assert drawn == _drawn(HeldOut(3, IN, OUT, [1]), 20_000)
    assert drawn != _drawn(HeldOut(3, IN, OUT, [2]), 20_000)


def test_it_goes_on_from_the_number_seen():
    whole, rest = HeldOut(3, IN, OUT, [7]), HeldOut(3, IN, OUT, [7])
    rest.seen = 10_003
    assert [i for i in _drawn(whole, 12_000) if i >= 10_003] == _drawn(rest, 12_000 - 10_003)


def test_modules_and_sessions_that_take_turns_are_all_held_out():
    micro = le.MicroLoRAConfig(IN, OUT, target_modules=("q", "v"))
    sona = le.Sona(config(micro_lora=micro, ewc_lambda=0.0))
    for i in range(300):
        x = np.zeros(IN, np.float32)
        x[i % 10] = 1.0
        for name in ("q", "v"):
            feedback = le.Feedback.from_gradient(row(i, OUT))
            assert sona.instant_adapt(x, feedback, module=name, session=i % 10).applied
    for m in sona._modules.values():
        x, _ = m.held_out.samples()
        assert len(x) == 30
        assert set(x.argmax(1)) == set(range(10))


def test_a_load_of_other_adapters_holds_nothing_of_the_former_life(tmp_path):
    sona = le.Sona(config())
    taught(sona, sessions=2, samples=50)
    sona.background()
    le.MicroLoRA(config().micro_lora).save(tmp_path)
    sona.load(tmp_path)
    assert not len(module(sona).held_out.samples()[0])
    fresh = le.Sona(config())
    fresh.load(tmp_path)
    assert sona.stats()._replace(engine=None) == fresh.stats()._replace(engine=None)
    for one in (sona, fresh):
        taught(one, sessions=1, samples=30)
    for got, want in zip(*(module(s).held_out.samples() for s in (sona, fresh)), strict=True):
        assert bits(got) == bits(want)


def test_a_target_beyond_float32_is_not_held_out():
    """It could be judged by no more, nor saved."""
    sona = le.Sona(config())
    taught(sona, sessions=1, samples=1)
    m = module(sona)
    A, B, scaling = m.pool.get(m.served.fast[0].slot)
    m.pool.set(m.served.fast[0].slot, A, np.full_like(B, 3e38), scaling)
    for i in range(20):
        feedback = le.Feedback.from_gradient(1e-9 * row(i, OUT))
        sona.instant_adapt(row(i), feedback, session=0)
    assert np.isfinite(m.held_out.samples()[1]).all()
