"""Bases, and singular value decompositions of sums and of dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from lora_engine.adapters import low_rank


def columns(rng, m, lengths):
    """A matrix [m, n] with these singular values."""
    n = len(lengths)
    U = np.linalg.qr(rng.standard_normal((m, n)))[0]
    V = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (U * lengths) @ V.T


@pytest.mark.parametrize(
    ("lengths", "rank"),
    [
        (np.ones(12), 12),
        (np.geomspace(1, 1e-2, 12), 12),
        (np.geomspace(1, 1e-11, 12), 12),
        (np.array([1.0, 1e-5, 1e-5, 1e-9, 0, 0]), 4),
        (np.zeros(3), 0),
    ],
    ids=["equal", "short", "graded", "deficient", "zero"],
)
def test_a_basis_spans_what_it_is_made_of(lengths, rank):
    X = columns(np.random.default_rng(0), 200, lengths) if lengths.any() else np.zeros((200, 3))
    basis = low_rank.orthonormal(X)
    Q = basis.columns @ basis.mix
    assert Q.shape == (200, rank)
    assert np.abs(Q.T @ Q - np.eye(rank)).max(initial=0) < 1e-8
    assert np.linalg.norm(Q @ basis.coordinates - X) < 1e-12


def test_more_columns_than_rows():
    X = np.random.default_rng(0).standard_normal((5, 40))
    basis = low_rank.orthonormal(X)
    Q = basis.columns @ basis.mix
    assert Q.shape == (5, 5)
    assert np.allclose(Q @ basis.coordinates, X)


def test_the_svd_of_a_sum():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((50, 9)), rng.standard_normal((70, 9))
    left[:, 3], right[:, 5] = 0, 0  # nothing in these
    left[:, 7], right[:, 7] = left[:, 1], right[:, 1]  # and the same twice
    scales = rng.standard_normal(9)
    svd = low_rank.svd_of_sum(left, right, scales)
    want = (left * scales) @ right.T
    S = np.linalg.svd(want, compute_uv=False)
    assert len(svd.S) == 6
    assert np.allclose(svd.S, S[:6])
    A, B = svd.factors()
    assert np.linalg.norm(B @ A - want) < 1e-6 * np.linalg.norm(want)
    assert svd.cut(2).error == pytest.approx(np.linalg.norm(S[2:]) / np.linalg.norm(S))


@pytest.mark.parametrize("transposed", [False, True], ids=["wide", "tall"])
def test_a_large_dense_matrix_is_cut_near_the_best(transposed):
    """Content of rank 6 in noise, as a merge by signs has it, on the iteration's side of 512."""
    rng = np.random.default_rng(0)
    M = rng.standard_normal((520, 6)) @ rng.standard_normal((6, 600)) / 20
    M = (M + rng.standard_normal(M.shape) / 6).astype(np.float32)
    M = M.T if transposed else M
    S = np.linalg.svd(M, compute_uv=False)
    svd = low_rank.svd_of_dense(M, 4)
    A, B = svd.factors()
    best = np.linalg.norm(S[4:])
    assert (A.shape, B.shape) == ((4, M.shape[1]), (M.shape[0], 4))
    assert np.linalg.norm(M - B @ A) < best * (1 + 1e-4)
    assert svd.error == pytest.approx(best / np.linalg.norm(S), rel=1e-4)
