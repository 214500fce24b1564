"""What a Sona keeps over a save and a load, and files that are refused or left aside."""

from __future__ import annotations

import json
import uuid
import warnings

import numpy as np
import pytest
from helpers import bits
from helpers_files import WEIGHTS, check_refusal
from helpers_sona import IN, OUT, config, module, row, samples_of, served, taught

import lora_engine as le
from lora_engine import atomic, safetensors_file
from lora_engine.learning import checkpoint, consolidation, sona_state

FILE = sona_state.FILE
SESSIONS = (0, "a", None, -7)


def lived(folder=None, first=0, sona=None, **changes):
    """Feedback of all kinds, passes and a deep run; saved in the midst of waiting samples."""
    sona = sona or le.Sona(config(**changes))
    for i in range(first, first + 60):
        x, session = row(i), SESSIONS[i % 4]
        if i % 3:
            sona.instant_adapt(x, le.Feedback.from_target(row(i % 7, OUT)), session=session)
        else:
            delta = sona.forward(x, session=session, explore=0.3)
            quality = 1.0 / (1.0 + float(delta @ delta))
            sona.instant_adapt(x, le.Feedback.from_quality(quality), session=session)
        if i % 60 == 25:
            sona.background()
        if i % 60 == 35:
            sona.deep_optimize(samples_of(np.outer(row(1, OUT), row(2)) * 0.1, n=20))
    if folder is not None:
        sona.save(folder)
    return sona


def rejected_pass(sona):
    """Sessions learn while a pass runs that is rejected: their adapters are of both ranks."""
    with pytest.MonkeyPatch.context() as patch:
        merge = consolidation.consolidate

        def during(*args, **options):
            for session in SESSIONS[:2]:
                x, g = row(5), le.Feedback.from_gradient(row(6, OUT))
                assert sona.instant_adapt(x, g, session=session).applied
            done = merge(*args, **options)
            return done._replace(B=50 * done.B + 9)

        patch.setattr(consolidation, "consolidate", during)
        assert not sona.background().applied


def known(sona):
    """All that a Sona answers, to the bit."""
    stats = sona.stats()._replace(instant_avg_latency_us=0.0, engine=None)
    m = module(sona)
    return (
        [bits(np.float32(served(sona, s))) for s in (*SESSIONS, "new")],
        stats,
        {session: baseline.value for session, baseline in m.baselines.items() if baseline.value},
        [bits(part) for part in (*m.held_out.samples(), *(m.fisher or ()))],
        sona.should_trigger_deep(),
    )


@pytest.mark.parametrize("changes", [
    {}, {"ewc_lambda": 0.0}, {"consolidation": "ensemble", "ensemble_size": 3}, {"held_out": 3},
], ids=str)  # fmt: skip
def test_a_resumed_sona_goes_on_to_the_same_bits(changes, tmp_path):
    sona = lived(**changes)
    if not changes:
        rejected_pass(sona)
        assert max(module(sona).pool.ranks(f.slot)[0] for f in _fast(sona)) == 4
    sona.save(tmp_path / "a")
    resumed = le.Sona(config(**changes))
    taught(resumed, sessions=1, samples=3)  # what it was is gone
    resumed.load(tmp_path / "a")
    assert known(resumed) == known(sona)
    assert sona.stats().pending_samples > 0
    resumed.save(tmp_path / "b")
    for name in (FILE, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for one in (sona, resumed):
        lived(sona=one, first=60)
        one.background()
    assert known(resumed) == known(sona)
    assert len(module(resumed).pool) <= len(module(sona).pool)


def _fast(sona):
    return module(sona).served.fast.values()


def test_a_fresh_sona_is_saved_and_loaded(tmp_path):
    le.Sona(config()).save(tmp_path / "a")
    sona = lived()
    sona.load(tmp_path / "a")
    assert known(sona) == known(le.Sona(config()))
    assert len(module(sona).pool) == 1


def test_every_module_is_kept_and_the_folder_is_an_adapters(tmp_path):
    micro = le.MicroLoRAConfig(IN, OUT, target_modules=("q", "v"), shapes={"v": (IN, 3)})
    sona = le.Sona(config(micro_lora=micro))
    for name, out in (("q", OUT), ("v", 3)):
        x = row(1)
        sona.instant_adapt(x, le.Feedback.from_target(row(2, out)), module=name, session="s")
        sona.background()
        sona.instant_adapt(x, le.Feedback.from_target(row(3, out)), module=name, session=name)
    sona.save(tmp_path)
    resumed = le.Sona(config(micro_lora=micro))
    resumed.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora = le.MicroLoRA.load(tmp_path)
    for name in ("q", "v"):
        for session in ("s", "q", "v"):
            got = resumed.forward(row(4), module=name, session=session)
            assert bits(got) == bits(sona.forward(row(4), module=name, session=session))
        assert bits(lora.forward(row(4), name)) == bits(sona.forward(row(4), module=name))


@pytest.mark.parametrize(
    "session", [("a", 1), uuid.UUID(int=1), 1.5, True, 1 << 63, "\ud800", b"a"], ids=repr
)
def test_a_session_of_another_kind_is_refused_before_anything_is_written(session, tmp_path):
    sona = lived(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    sona.instant_adapt(row(0), le.Feedback.from_target(row(1, OUT)), session=session)
    for folder in ("a", "b"):
        with pytest.raises(ValueError, match=r"^Sona.save: q: session: expected text, a whole"):
            sona.save(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert not (tmp_path / "b").exists()


def test_numbers_of_numpy_are_whole_numbers(tmp_path):
    sona = le.Sona(config())
    sona.instant_adapt(row(0), le.Feedback.from_target(row(1, OUT)), session=np.int64(3))
    sona.save(tmp_path)
    resumed = le.Sona(config())
    resumed.load(tmp_path)
    assert np.array_equal(served(resumed, 3), served(sona, 3))
    assert served(resumed, 3).any()


def test_a_save_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    sona = lived(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    lived(sona=sona, first=60)
    write = atomic.write_file

    def fails(path, data):
        if path.name == FILE:
            raise OSError("no space left")
        write(path, data)

    monkeypatch.setattr(atomic, "write_file", fails)
    with pytest.raises(OSError, match="no space left"):
        sona.save(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_state_of_other_weights_is_dropped_and_said(tmp_path):
    sona = lived(tmp_path)
    lora = sona.consolidated()
    A, B, _ = lora.weights("q")
    lora.set_weights("q", A, 2 * B)
    lora.save(tmp_path)  # keeps the file that it does not know
    resumed = le.Sona(config())
    with pytest.warns(UserWarning, match=rf"dropped: .*{FILE}: it belongs to other weights"):
        resumed.load(tmp_path)
    assert np.allclose(served(resumed, 0), 2 * served(sona, "new"), atol=1e-6)
    assert not module(resumed).served.fast
    assert resumed.stats().pending_samples == 0


def test_state_of_another_configuration_is_refused(tmp_path):
    lived(tmp_path)
    for changes, text in (
        ({"held_out": 7}, r"SonaConfig\(held_out=7\), got one of 100"),
        ({"micro_lora": le.MicroLoRAConfig(IN, OUT, rank=2, alpha=4.0, target_modules=("q",),
                                           seed=3)}, r"MicroLoRAConfig\(seed=3\), got one of 0"),
    ):  # fmt: skip
        refused(ValueError, text, tmp_path, le.Sona(config(**changes)))


def refused(kind, text, folder, sona=None):
    """The error of a load that changes nothing."""
    sona = sona or le.Sona(config())
    taught(sona, sessions=2, samples=5)
    before, used = known(sona), len(module(sona).pool)
    with pytest.raises(kind, match=text) as caught:
        sona.load(folder)
    assert known(sona) == before
    assert len(module(sona).pool) == used
    return caught


def rewritten(folder, tensors=None, sessions=None, **state):
    """The folder's file with changes, and a digest that fits them."""
    held, metadata = safetensors_file.from_bytes((folder / FILE).read_bytes(), "test")
    if sessions is not None:
        held["sessions"] = np.frombuffer(json.dumps({"q": sessions}).encode(), np.uint8)
    for name, value in (tensors or {}).items():
        held[name if name == "sessions" else f"modules.q.{name}"] = value
    held = {name: value for name, value in held.items() if value is not None}
    whole = {**json.loads(metadata[sona_state.KEY]), **state}
    whole["sha256"] = state.get("sha256", checkpoint.content_digest(held, whole))
    data = safetensors_file.to_bytes(held, sona_state.KEY, json.dumps(whole))
    (folder / FILE).write_bytes(data)


NAMES = {"fast": [*SESSIONS], "baselines": [*SESSIONS]}
NOISE = {"state": 1, "has_uint32": 0, "uinteger": 0}
ONES = np.ones((4, 2), "f4")


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("format: expected 2, got 1", {"format": 1}),
        ("sha256: expected the digest", {"sha256": "0"}),
        ("MicroLoRAConfig: expected an object", {"MicroLoRAConfig": None}),
        ("counts: expected numbers from 0", {"counts": {"instants": 1}}),
        ("counts: expected an object", {"counts": [1]}),
        ("skipped: expected numbers from 0", {"skipped": {"why": -1}}),
        ("sums: seconds: expected a number", {"sums": {"seconds": "1", "quality": 1.0}}),
        ("sums: quality: expected a number", {"sums": {"seconds": 1.0, "quality": -1.0}}),
        ("exploration: expected state", {"exploration": {}}),
        ("exploration: state: expected a number of 128", {"exploration": {**NOISE, "state": -1}}),
        ("exploration: has_uint32: expected", {"exploration": {**NOISE, "has_uint32": 2}}),
        ("sessions: expected text, got none", {"tensors": {"sessions": None}}),
        ("sessions: expected JSON", {"tensors": {"sessions": np.zeros(3, np.uint8)}}),
        ("sessions: q: expected fast and", {"sessions": {"fast": []}}),
        ("sessions: q: fast: expected texts", {"sessions": {**NAMES, "fast": [1, 1, 2, 3]}}),
        ("sessions: q: baselines: exp", {"sessions": {**NAMES, "baselines": [1.5, 2, 3, 4]}}),
        ("sessions: q: baselines: exp", {"sessions": {**NAMES, "baselines": [[], 2, 3, 4]}}),
        ("modules.q.fast_ranks: expected int64 .3., got int64 .4.",
         {"sessions": {**NAMES, "fast": [1, 2, 3]}}),
        ("modules.q.baselines: expected float64 .1.", {"sessions": {**NAMES, "baselines": [1]}}),
        ("modules.q.u: expected float32 .4, 7., got none", {"tensors": {"u": None}}),
        ("modules.q.v: expected float32 .4, 12.", {"tensors": {"v": ONES}}),
        ("modules.q.u: expected numbers of 0", {"tensors": {"u": np.full((4, OUT), -1, "f4")}}),
        ("modules.q.v: expected finite", {"tensors": {"v": np.full((4, IN), np.nan, "f4")}}),
        ("modules.q.inputs: expected finite",
         {"tensors": {"inputs": np.full((4, IN), np.inf, "f4")}}),
        ("modules.q.fast_A: expected float32 .8, 12.", {"tensors": {"fast_A": ONES}}),
        ("modules.q.fast_B: expected float32 .8, 7.", {"tensors": {"fast_B": ONES}}),
        ("modules.q.fast_ranks: expected finite numbers of at most 8",
         {"tensors": {"fast_ranks": np.full(4, 1 << 40)}}),
        ("modules.q.fast_ranks: expected ranks", {"tensors": {"fast_ranks": np.zeros(4, "i8")}}),
        ("modules.q.pending: expected numbers of 0", {"tensors": {"pending": -np.ones(4, "i8")}}),
        ("modules.q.quality: expected at most 1", {"tensors": {"quality": np.full(4, 1e6)}}),
        ("modules.q.held: expected finite numbers of at most 1",
         {"tensors": {"held": np.full(4, 2)}}),
        ("modules.q.held_u: expected float32 .4, 7.", {"tensors": {"held_u": ONES}}),
        ("modules.q.held_A: expected float32 .8, 12.", {"tensors": {"held_A": ONES}}),
        ("modules.q.baselines: expected finite numbers of at most 1",
         {"tensors": {"baselines": np.full(4, 1.5)}}),
        ("modules.q.fisher_v: expected float32 .1, 12.", {"tensors": {"fisher_v": ONES}}),
        ("modules.q.held_out_x: expected float32", {"tensors": {"held_out_x": ONES}}),
        ("modules.q.held_out_count: expected", {"tensors": {"held_out_count": np.array([-1])}}),
        ("modules.q.samples: expected", {"tensors": {"samples": np.array([np.nan])}}),
        ("modules.q.more: expected the tensors", {"tensors": {"more": ONES}}),
    ],
)  # fmt: skip
def test_content_that_does_not_fit_is_named(text, changes, kept_folder):
    rewritten(kept_folder, **changes)
    check_refusal(refused(le.FormatError, text, kept_folder), str(kept_folder / FILE))


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "a"
    lived(folder)
    return folder


@pytest.fixture
def kept_folder(whole_folder, tmp_path):
    for path in whole_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_an_unchanged_rewrite_is_taken(kept_folder):
    rewritten(kept_folder)
    sona = le.Sona(config())
    sona.load(kept_folder)
    assert sona.stats().instant_count == 60


@pytest.mark.filterwarnings("error")  # a bit of the weights' digest: dropped, and said
def test_a_cut_or_flipped_file_is_refused(kept_folder):
    data = (kept_folder / FILE).read_bytes()
    sona = le.Sona(config())
    for at in range(0, len(data), max(len(data) // 40, 1)):
        flipped = bytearray(data)
        flipped[at] ^= 1
        for broken in (data[:at], bytes(flipped)):
            (kept_folder / FILE).write_bytes(broken)
            with pytest.raises((ValueError, UserWarning)):
                sona.load(kept_folder)
    assert not served(sona).any()
    assert sona.stats().instant_count == 0
