"""SGD and AdamW of a TrainingPipeline against torch's, on each backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import f64
from helpers_training import TARGET, drawn, started

import lora_engine as le


class Torch:
    """The same training by torch in float64: autograd, its clipping and its optimizers."""

    def __init__(self, lora, module: str, config: le.TrainingConfig) -> None:
        A, B, self.scaling = lora.weights(module)
        self.A, self.B = (torch.from_numpy(f64(w)).requires_grad_() for w in (A, B))
        make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[config.optimizer]
        self.config, self.decay = config, config.weight_decay
        extra = {"weight_decay": self.decay} if config.optimizer == "adamw" else {}
        self.optimizer = make([self.A, self.B], lr=config.learning_rate, **extra)

    def step(self, rows) -> float:
        """A step over rows of (x, y); the loss before it."""
        x, y = (torch.from_numpy(np.stack([f64(r[i]) for r in rows])) for i in (0, 1))
        loss = 0.5 * ((self.scaling * (x @ self.A.T) @ self.B.T - y) ** 2).sum() / len(rows)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.A, self.B], self.config.max_grad_norm)
        if self.config.optimizer == "sgd":  # torch's own decay of SGD is not decoupled
            with torch.no_grad():
                for w in (self.A, self.B):
                    w *= 1 - self.config.learning_rate * self.decay
        self.optimizer.step()
        return float(loss.detach())


def weights_gap(lora, module: str, want) -> float:
    A, B, _ = lora.weights(module)
    pairs = [(A, want.A), (B, want.B)]
    return max(
        float(np.linalg.norm(f64(w) - t.detach().numpy()) / np.linalg.norm(t.detach().numpy()))
        for w, t in pairs
    )


@pytest.mark.parametrize("max_norm", [None, 0.7], ids=["no-clip", "clip0.7"])
@pytest.mark.parametrize("decay", [0.0, 0.3], ids=lambda d: f"decay{d}")
@pytest.mark.parametrize("batch", [1, 4], ids=lambda b: f"batch{b}")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_torch(optimizer, batch, decay, max_norm, backend):
    lora, pipe = started(
        optimizer=optimizer, batch_size=batch, weight_decay=decay, max_grad_norm=max_norm,
        learning_rate=0.02,
    )  # fmt: skip
    want = Torch(lora, "q", pipe.config)
    for step in range(25):
        rows = drawn(batch, step)
        losses = [pipe.train_step(lora, x, TARGET(y), module="q").loss for x, y in rows]
        assert np.mean(losses) == pytest.approx(want.step(rows), rel=1e-4)
    assert pipe.steps("q") == 25
    # AdamW divides by the gradient's own size: where an entry is nearly 0, rounding shows.
    assert weights_gap(lora, "q", want) < (2e-4 if optimizer == "adamw" else 5e-6)
