"""What the demo learns on: real digits, a frozen base, and users who see digits differently.

Everything is a function of seeds, so that another process rebuilds the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FEATURES, CLASSES = 4096, 10
USERS, TUNING_USERS = 64, 20
KINDS = ("clean", "shifted", "rotated", "inverted", "scrambled")
_SIDE = 8
_PIXELS = _SIDE * _SIDE
_USERS_SEED, _TUNING_SEED, _ORDER_SEED = 1, 2, 3
_BASE_IMAGES, _STREAM_IMAGES, _HELD_OUT_IMAGES = 500, 600, 500  # the rest is for tuning


class Digits(NamedTuple):
    """images [n, 64], 0 to 1; labels [n]."""

    images: Floats
    labels: Ints


class Users(NamedTuple):
    """Each user's view of an image is matrix @ pixels + offset: linear, whatever the kind."""

    kinds: tuple[str, ...]
    matrices: Floats  # [users, 64, 64]
    offsets: Floats  # [users, 64]

    def view(self, user: int, images: Floats) -> Floats:
        """Many images as one user sees them."""
        return np.asarray(images @ self.matrices[user].T + self.offsets[user])

    def views(self, images: Floats) -> Floats:
        """The i-th image as the i-th user sees it."""
        return np.asarray(np.einsum("uij,uj->ui", self.matrices, images) + self.offsets)


class World:
    """The digits in four disjoint parts, the fixed features, and the base fitted once.

    The base is fitted on one part; users learn from the labels of another, that
    the base has not seen; settings are chosen on the third; what is reported is
    measured on the fourth, held out from all that.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._directions = (0.8 * rng.standard_normal((_PIXELS, FEATURES))).astype(np.float32)
        self._phases = rng.uniform(0.0, 2.0 * np.pi, FEATURES).astype(np.float32)
        pixels, labels = load_digits(return_X_y=True)
        images, order = (pixels / 16.0).astype(np.float32), rng.permutation(len(labels))
        ends = np.cumsum([_BASE_IMAGES, _STREAM_IMAGES, _HELD_OUT_IMAGES])
        base, self.stream, self.held_out, self.tuning = (
            Digits(images[part], labels[part]) for part in np.split(order, ends)
        )
        self._base = _fit_base(self.features(base.images), base.labels)

    def features(self, images: Floats) -> Floats:
        """[n, 4096] random cosines of the pixels, of variance 1 (Rahimi & Recht 2007)."""
        waves = images @ self._directions
        waves += self._phases
        np.cos(waves, out=waves)
        waves *= np.float32(math.sqrt(2.0))
        return waves

    def base(self, features: Floats) -> Floats:
        """The frozen classifier's logits [n, 10]."""
        return features @ self._base

    def batches(self, users: Users, rounds: int) -> Iterator[tuple[Floats, Ints]]:
        """(features, labels) of a round's images, one for each user.

        Each user has the stream in an order of its own, and no image comes
        again before all have come.
        """
        rng = np.random.default_rng(_ORDER_SEED)
        orders = np.stack([rng.permutation(len(self.stream.labels)) for _ in users.kinds])
        for turn in range(rounds):
            drawn = orders[:, turn % orders.shape[1]]
            yield self.features(users.views(self.stream.images[drawn])), self.stream.labels[drawn]


def loss_gradient(logits: Floats, labels: Ints) -> Floats:
    """dL/dy of the softmax cross-entropy: probabilities minus the label."""
    gradient: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradient /= gradient.sum(axis=1, keepdims=True)
    gradient[np.arange(len(labels)), labels] -= 1.0
    return gradient


def _fit_base(features: Floats, labels: Ints) -> Floats:
    """[4096, 10]: ridge regression onto the labels, solved exactly.

    Its outputs, about 0 to 1, times 10 are logits of a softmax that is sure of
    itself: an adapter has a real base to overcome.
    """
    targets = 10.0 * (np.eye(CLASSES)[labels] - 1.0 / CLASSES)
    gram = (features @ features.T).astype(np.float64)
    dual = np.linalg.solve(gram + 0.01 * FEATURES * np.eye(len(labels)), targets)
    return np.asarray(features.T @ dual.astype(np.float32))


def reported_users() -> Users:
    """Those whose accuracy is printed."""
    return make_users(USERS, _USERS_SEED)


def tuning_users() -> Users:
    """Others, that the learning rate is chosen on."""
    return make_users(TUNING_USERS, _TUNING_SEED)


def make_users(count: int, seed: int) -> Users:
    """Users of every kind in turn, each with a transformation of its own."""
    rng = np.random.default_rng(seed)
    kinds = tuple(KINDS[i % len(KINDS)] for i in range(count))
    views = [_make_view(kind, rng) for kind in kinds]
    matrices, offsets = zip(*views, strict=True)
    return Users(kinds, np.stack(matrices), np.stack(offsets))


def _make_view(kind: str, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(matrix, offset) of one user; drawn from a continuum, so that no two are alike."""
    matrix, offset = np.eye(_PIXELS, dtype=np.float32), np.zeros(_PIXELS, np.float32)
    if kind == "shifted":  # 1 to 2 pixels, any direction
        far, heading = rng.uniform(1.0, 2.0), rng.uniform(0.0, 2.0 * np.pi)
        return _resampled(0.0, (far * math.sin(heading), far * math.cos(heading))), offset
    if kind == "rotated":  # 30 to 90 degrees, either way
        return _resampled(rng.choice((-1.0, 1.0)) * rng.uniform(np.pi / 6, np.pi / 2)), offset
    if kind == "inverted":  # white on black, with a contrast of the user's own
        return np.float32(-rng.uniform(0.6, 1.0)) * matrix, offset + np.float32(1.0)
    if kind == "scrambled":
        return matrix[rng.permutation(_PIXELS)], offset
    return matrix, offset


def _resampled(angle: float, shift: Sequence[float] = (0.0, 0.0)) -> Floats:
    """The matrix that turns an image about its centre and moves it, interpolating bilinearly."""
    row, column = np.divmod(np.arange(_PIXELS), _SIDE)
    centre, cos, sin = (_SIDE - 1) / 2, math.cos(angle), math.sin(angle)
    from_row = cos * (row - centre) + sin * (column - centre) + centre - shift[0]
    from_column = cos * (column - centre) - sin * (row - centre) + centre - shift[1]
    near_row = np.maximum(0.0, 1.0 - np.abs(from_row[:, None] - row))
    near_column = np.maximum(0.0, 1.0 - np.abs(from_column[:, None] - column))
    return np.asarray(near_row * near_column, np.float32)
