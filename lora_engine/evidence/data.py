"""Digits in three parts, and the pixel permutations that make tasks of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

from lora_engine.demo_data import Digits, Ints

PIXELS, CLASSES = 64, 10
_TRAIN, _VALIDATION = 1300, 260  # of 1797; validation is the end of the training part


class Task(NamedTuple):
    """One view of the digits: what is learned from, and what is counted on."""

    train: Digits
    test: Digits


def split(seed: int, validating: bool) -> Task:
    """1300 images to learn from and 497 to count on, in an order of the seed's own.

    validating: the same without the 497: 1040 to learn from, and the other 260 to choose
    settings on.
    """
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = (pixels[order] / 16.0).astype(np.float32), labels[order]
    end = _TRAIN - _VALIDATION if validating else _TRAIN
    stop = _TRAIN if validating else len(labels)
    return Task(Digits(images[:end], labels[:end]), Digits(images[end:stop], labels[end:stop]))


def permuted(task: Task, order: Ints) -> Task:
    """The task with its pixels in another order."""
    train, test = task
    return Task(
        Digits(np.ascontiguousarray(train.images[:, order]), train.labels),
        Digits(np.ascontiguousarray(test.images[:, order]), test.labels),
    )


def partial_permutation(count: int, rng: np.random.Generator) -> Ints:
    """An order of the pixels in which ``count`` of them changed places and the rest did not."""
    order, moved = np.arange(PIXELS), rng.choice(PIXELS, count, replace=False)
    order[moved] = moved[rng.permutation(count)]
    return order
