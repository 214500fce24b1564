"""A plain perceptron 64-100-10 by hand, its weights one vector, as the array ops take it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lora_engine.demo_data import Digits, Floats, Ints, loss_gradient
from lora_engine.evidence.data import CLASSES, PIXELS

HIDDEN = 100
_SHAPES = ((HIDDEN, PIXELS), (HIDDEN, 1), (CLASSES, HIDDEN), (CLASSES, 1))


class Weights:
    """``flat`` float32, and views into it: W1 [100, 64], b1 [100, 1], W2 [10, 100], b2 [10, 1]."""

    def __init__(self) -> None:
        ends = np.cumsum([rows * columns for rows, columns in _SHAPES])
        self.flat: Floats = np.zeros(ends[-1], np.float32)
        parts = np.split(self.flat, ends[:-1])
        self.W1, self.b1, self.W2, self.b2 = (
            part.reshape(shape) for part, shape in zip(parts, _SHAPES, strict=True)
        )


def new_network(rng: np.random.Generator) -> Weights:
    """Weights normal with variance 2 / inputs (He et al. 2015), biases zero."""
    net = Weights()
    for W in (net.W1, net.W2):
        W[:] = rng.standard_normal(W.shape) * (2.0 / W.shape[1]) ** 0.5
    return net


def hidden(net: Weights, x: Floats) -> Floats:
    """ReLU of the first layer, [n, 100]."""
    h: Floats = x @ net.W1.T
    h += net.b1.T
    return np.maximum(h, 0.0, out=h)


def logits(net: Weights, x: Floats) -> Floats:
    """[n, 10]."""
    return np.asarray(hidden(net, x) @ net.W2.T + net.b2.T)


def accuracy(net: Weights, digits: Digits) -> float:
    """Share of right answers."""
    return float((logits(net, digits.images).argmax(axis=1) == digits.labels).mean())


def gradient(net: Weights, x: Floats, labels: Ints, out: Weights) -> Weights:
    """Of the mean cross-entropy, by backpropagation."""
    h = hidden(net, x)
    g2 = loss_gradient(h @ net.W2.T + net.b2.T, labels) / np.float32(len(x))
    g1 = (g2 @ net.W2) * (h > 0)
    np.matmul(g2.T, h, out=out.W2)
    np.matmul(g1.T, x, out=out.W1)
    g2.sum(axis=0, out=out.b2[:, 0])
    g1.sum(axis=0, out=out.b1[:, 0])
    return out


def fisher(net: Weights, x: Floats, labels: Ints) -> Weights:
    """The mean over samples of squared per-sample gradients; never the square of a mean.

    A sample's gradient of a linear layer is g xᵀ, so its square is (g∘g)(x∘x)ᵀ, and the sum
    over samples one product of matrices of squares.
    """
    h = hidden(net, x)
    g2 = loss_gradient(h @ net.W2.T + net.b2.T, labels)
    g1 = (g2 @ net.W2) * (h > 0)
    mean = Weights()
    for g, inputs, W, b in ((g1, x, mean.W1, mean.b1), (g2, h, mean.W2, mean.b2)):
        W[:] = (g * g).T @ (inputs * inputs) / len(x)
        b[:, 0] = (g * g).mean(axis=0)
    return mean


def batches(digits: Digits, size: int, epochs: int, rng: np.random.Generator) -> Iterator[Digits]:
    """Every image once an epoch, in a new order."""
    for _ in range(epochs):
        order = rng.permutation(len(digits.labels))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield Digits(digits.images[chosen], digits.labels[chosen])
