"""The deep run of Sona: the consolidated adapter trained on collected samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine.learning.factor_sums import can_be_summed
from lora_engine.learning.sona_config import SonaConfig
from lora_engine.learning.sona_module import Array, Module
from lora_engine.learning.training_samples import TrainingSample, imitation
from lora_engine.progress import Bar

FEWEST = 5  # samples, of which one is held out


class DeepResult(NamedTuple):
    """What a deep run did. quality_delta: the loss on the held-out samples before minus after,
    of the best epoch; NaN where nothing was trained, or no epoch's loss is a number. epochs:
    0 where nothing was trained. note: why nothing was, or was rejected."""

    applied: bool
    note: str
    samples_used: int
    held_out: int
    epochs: int
    quality_delta: float


class _Data(NamedTuple):
    """x [n, in], target [n, out], quality [n]."""

    x: Array
    target: Array
    quality: Array

    def of(self, rows: Array) -> _Data:
        return _Data(self.x[rows], self.target[rows], self.quality[rows])


def optimize(m: Module, config: SonaConfig, samples: Sequence[TrainingSample]) -> DeepResult:
    """``Sona.deep_optimize`` of one module; no other pass runs."""
    given = imitation(
        "Sona.deep_optimize: samples", samples, (m.in_features, m.out_features),
        config.quality_threshold,
    )  # fmt: skip
    n = len(given.x)
    if n < FEWEST:
        note = f"{n} of {len(samples)} samples can be learned from, fewer than {FEWEST}"
        return DeepResult(False, note, n, 0, 0, float("nan"))
    data = _Data(np.stack(given.x), np.stack(given.target), given.quality)
    order = np.random.default_rng(config.micro_lora.seed).permutation(n)
    held, train = data.of(order[: n // FEWEST]), data.of(order[n // FEWEST :])
    slot = m.pool.add(*m.pool.get(m.served.consolidated))
    try:
        best, gain = _train(m, config, slot, train, held)
    except BaseException:
        m.pool.remove(slot)
        raise
    if best is None:
        m.pool.remove(slot)
        note = f"rejected: {_worse(gain)}"
        return DeepResult(False, note, len(train.x), len(held.x), config.deep_epochs, gain)
    m.pool.set(slot, *best, m.scaling)
    _serve(m, slot, train)
    return DeepResult(True, "", len(train.x), len(held.x), config.deep_epochs, gain)


def _worse(gain: float) -> str:
    if np.isnan(gain):
        return "the loss on held-out samples is not a number"
    if gain == 0.0:
        return "the loss on held-out samples would be as before"
    return f"the loss on held-out samples would rise by {-gain:.4g}"


def _train(
    m: Module, config: SonaConfig, slot: int, train: _Data, held: _Data
) -> tuple[tuple[Array, Array] | None, float]:
    """(A, B) after the best epoch, None where none was better, and what the best gained."""
    if m.ewc is not None and m.fisher is not None:
        m.ewc.set(slot, *m.fisher)
    step = ops.make_step(m.pool._backend, config.deep_lr, config.max_grad_norm, ewc=m.ewc)
    rng = np.random.default_rng([config.micro_lora.seed, 1])
    before, best, gain = _loss(m, slot, held), None, np.nan
    with Bar("deep run", config.deep_epochs) as bar:
        for _ in range(config.deep_epochs):
            order = rng.permutation(len(train.x))
            for at in range(0, len(order), config.deep_batch_size):
                batch = train.of(order[at : at + config.deep_batch_size])
                m.storage.adapt_slot(batch.x, _gradient(m, slot, batch), slot, step)
            loss = _loss(m, slot, held)
            bar.advance(1, loss)
            if np.isfinite(before - loss) and not before - loss <= gain:
                gain = before - loss
                best = m.pool.get(slot)[:2] if gain > 0.0 else None
    return best, gain


def _gap(m: Module, slot: int, data: _Data) -> Array:
    delta: Array = m.storage.forward_slot(data.x, slot, None, False, False, m.out_features)
    gap: Array = delta - data.target
    return gap


def _gradient(m: Module, slot: int, data: _Data) -> Array:
    gradient: Array = _gap(m, slot, data) * data.quality[:, None]
    return gradient


def _loss(m: Module, slot: int, data: _Data) -> float:
    """Mean of q/2 ‖delta - target‖²."""
    gap = _gap(m, slot, data)
    squares = np.einsum("ij,ij->i", gap, gap, dtype=np.float64)
    return float(data.quality @ squares) / (2 * len(data.x))


def _serve(m: Module, slot: int, train: _Data) -> None:
    grad = _gradient(m, slot, train)
    fits = can_be_summed(train.x) & can_be_summed(grad)
    n = int(np.count_nonzero(fits))
    u, v = (total / max(n, 1) for total in ops.lora_fisher_factors(train.x[fits], grad[fits]))
    with m.lock:
        m.forget()
        m.previous = (m.served._replace(fast={}, frozen={}), m.fisher, m.samples)
        m.served = m.served._replace(consolidated=slot)
        m.take_fisher(u, v, n, slot)
