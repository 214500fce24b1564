"""Singular value decompositions of sums of low-rank products, and of dense matrices cut to a rank.

All in float64, but for the dense matrix, which is read in its own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

# A direction is content where its singular value is above this part of the largest: A and B are
# kept in float32, whose rounding makes directions of about 2^-23 of it.
CONTENT = 2.0**-21
_NOISE = 1e-12  # of the largest term: what float64 leaves of terms that cancel
_PASS = 1e-6  # of the largest eigenvalue: what one pass makes orthonormal, to 1e-9
_EXACT = 512  # a dense matrix with a side of at most this is decomposed whole
_SETTLED = 1e-5  # of the energy: gained by a round of the subspace iteration at its end


class Basis(NamedTuple):
    """Q = columns @ mix, orthonormal, of the span of an X = Q @ coordinates."""

    columns: F64
    mix: F64
    coordinates: F64


class Svd(NamedTuple):
    """U diag(S) Vt, [out, k] [k] [k, in], in bases: U = left's Q @ inner_U, Vt = inner_Vt @ right's
    Qᵀ. S descends; total: the root of the sum of all S², cut off ones too."""

    left: Basis
    right: Basis
    inner_U: F64
    S: F64
    inner_Vt: F64
    total: float

    def cut(self, rank: int) -> Svd:
        """The nearest of at most that rank (Eckart and Young 1936)."""
        return self._replace(
            inner_U=self.inner_U[:, :rank], S=self.S[:rank], inner_Vt=self.inner_Vt[:rank]
        )

    @property
    def error(self) -> float:
        """‖what was cut off‖ / ‖all‖, Frobenius; 0 where there is nothing."""
        if self.total == 0:
            return 0.0
        return float(np.sqrt(max(1.0 - float(self.S @ self.S) / self.total**2, 0.0)))

    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A [k, in] = sqrt(S) Vt and B [out, k] = U sqrt(S), float32."""
        root = np.sqrt(self.S)
        B = self.left.columns @ (self.left.mix @ (self.inner_U * root))
        A = ((root[:, None] * self.inner_Vt) @ self.right.mix.T) @ self.right.columns.T
        return A.astype(np.float32), B.astype(np.float32)


def orthonormal(X: F64) -> Basis:
    """A basis of the columns of X [m, n], of directions above 1e-13 of the longest once the
    columns have length 1: a small adapter's, among large ones, are not taken for their rounding.

    From G = XᵀX, which costs matrix products where Householder's QR goes column by column. Where
    no direction is shorter than 1e-3 of the longest, X is taken for Q and L⁻ᵀ of Cholesky's
    G = L Lᵀ for the mix (CholeskyQR: Golub and Van Loan, Matrix Computations, 4th ed., 5.2.7).
    Else in passes by eigenvectors of G (SVQB: Stathopoulos and Wu 2002, SIAM J. Sci. Comput. 23).
    """
    gram = X.T @ X
    lengths = np.sqrt(np.diagonal(gram))
    lengths = np.where(lengths > 0, lengths, 1.0)
    gram /= np.outer(lengths, lengths)
    found = _triangles(gram)
    if found is not None:
        L, inverse = found
        return Basis(X, inverse.T / lengths[:, None], L.T * lengths)
    Q = _deflated(X / lengths, gram)
    return Basis(Q, np.eye(Q.shape[1]), Q.T @ X)


def _triangles(gram: F64) -> tuple[F64, F64] | None:
    """(L, L⁻¹) of gram = L Lᵀ; None where its eigenvalues may be further apart than _PASS."""
    try:
        L = np.linalg.cholesky(gram).astype(np.float64, copy=False)
        inverse = np.linalg.inv(L).astype(np.float64, copy=False)
    except np.linalg.LinAlgError:
        return None
    sums = [np.abs(M).sum(axis) for M, axis in ((inverse, 0), (inverse, 1), (gram, 0))]
    condition = np.prod([s.max(initial=0.0) for s in sums])  # ‖M‖² <= ‖M‖_1 ‖M‖_inf
    return (L, inverse) if condition * _PASS < 1 else None


def _deflated(X: F64, gram: F64) -> F64:
    """Q of X: each pass takes the long directions of what is left, and takes them out of it."""
    Q, rest = np.empty((len(X), 0)), X
    values, V = np.linalg.eigh(gram)
    least = 1e-26 * values[-1] if len(values) else 0.0
    while len(values) and values[-1] > least:
        kept = values > _PASS * values[-1]
        new = rest @ (V[:, kept] / np.sqrt(values[kept]))
        new -= Q @ (Q.T @ new)
        new /= np.linalg.norm(new, axis=0)
        Q = np.concatenate([Q, new], axis=1)
        rest = rest @ V[:, ~kept]
        rest -= Q @ (Q.T @ rest)
        values, V = np.linalg.eigh(rest.T @ rest)
    return Q


def svd_of_sum(left: F64, right: F64, scales: F64) -> Svd:
    """The SVD of sum_i scales[i] left[:, i] right[:, i]ᵀ: left [out, R], right [in, R].

    From Q_L (Q_Lᵀ left) diag(scales) (rightᵀ Q_R) Q_Rᵀ, O((in + out) R²); the dense matrix is
    never formed. Numerical rank: directions above CONTENT of the largest.
    """
    ours, theirs = orthonormal(left), orthonormal(right)
    lengths = [np.linalg.norm(side.coordinates, axis=0) for side in (ours, theirs)]
    sizes = np.abs(scales) * lengths[0] * lengths[1]
    core = (ours.coordinates * scales) @ theirs.coordinates.T
    U, S, Vt = np.linalg.svd(core, full_matrices=False)
    floor = max(CONTENT * S[0], _NOISE * float(sizes.max())) if len(S) else 0.0
    k = int((floor < S).sum())
    return Svd(ours, theirs, U[:, :k], S[:k], Vt[:k], float(np.linalg.norm(S)))


def svd_of_dense(M: NDArray, rank: int) -> Svd:
    """The SVD of a dense M [out, in], cut to the rank.

    Exact up to a side of 512. Above, by subspace iteration from a fixed start (Halko, Martinsson
    and Tropp 2011, SIAM Review 53, alg. 4.4) until a round adds less than 1e-5 of ‖M‖².
    """
    if min(M.shape) <= _EXACT or 4 * rank > min(M.shape):
        U, S, Vt = np.linalg.svd(M.astype(np.float64), full_matrices=False)
        unit, total = np.eye(len(S)), float(np.linalg.norm(S))
        return Svd(_given(U), _given(Vt.T), unit, S, unit, total).cut(rank)
    total = float(np.sqrt(sum(float(np.square(row, dtype=np.float64).sum()) for row in M)))
    rng = np.random.default_rng(0)
    across = rng.standard_normal((M.shape[1], rank + max(rank, 8)))
    captured = -1.0
    while True:
        right = _formed(orthonormal(across))
        left = _formed(orthonormal(_times(M, right)))
        across = _times(M.T, left)  # (leftᵀ M)ᵀ
        theirs = orthonormal(across)
        U, S, inner = np.linalg.svd(theirs.coordinates.T, full_matrices=False)
        energy = float(S[:rank] @ S[:rank])
        if energy - captured <= _SETTLED * total**2:
            return Svd(_given(left), theirs, U, S, inner, total).cut(rank)
        captured = energy


def _times(M: NDArray, X: F64) -> F64:
    """M @ X in M's dtype."""
    product: F64 = (M @ X.astype(M.dtype)).astype(np.float64)
    return product


def _given(Q: F64) -> Basis:
    """A Q that is orthonormal already."""
    unit = np.eye(Q.shape[1])
    return Basis(Q, unit, unit)


def _formed(basis: Basis) -> F64:
    return basis.columns @ basis.mix


def stacked(factors: Sequence[NDArray]) -> F64:
    """Matrices side by side by columns, in float64."""
    return np.concatenate([np.asarray(f, np.float64) for f in factors], axis=1)
