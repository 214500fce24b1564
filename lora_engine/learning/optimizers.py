"""What an optimizer makes of a module's mean gradient before the pool takes the step.

The step itself is the pool's, theta (1 - lr weight_decay) - lr g with the proximal step of EWC
in the same pass. SGD gives it the gradient; AdamW gives it the preconditioned direction, so that
decay is decoupled, EWC acts in the plain metric and a reader sees old weights or new.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Kingma & Ba 2015, algorithm 1


def norm_of(gradient: F32) -> float:
    """‖gradient‖, summed in float64."""
    return math.sqrt(float(np.sum(np.square(gradient, dtype=np.float64))))


class Sgd:
    """theta <- theta - lr g, clipped by the pool."""

    names: tuple[str, ...] = ()  # of what a module keeps from step to step
    preconditions = False  # then clipping comes before, else it is the pool's

    def start(self, size: int) -> dict[str, F32]:
        """What a module of that many weights keeps before its first step."""
        return {}

    def direction(self, gradient: F32, kept: dict[str, F32], t: int) -> tuple[F32, dict[str, F32]]:
        """(what the pool subtracts lr times, what to keep if it did); t: steps before this."""
        return gradient, kept


class AdamW(Sgd):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2; moments: Kingma & Ba 2015):

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g², both float32, and the direction
    (m / (1 - b1^(t+1))) / (sqrt(v / (1 - b2^(t+1))) + eps), b1 = 0.9, b2 = 0.999, eps = 1e-8.
    """

    names = ("first_moment", "second_moment")
    preconditions = True

    def start(self, size: int) -> dict[str, F32]:
        return {name: np.zeros(size, np.float32) for name in self.names}

    def direction(self, gradient: F32, kept: dict[str, F32], t: int) -> tuple[F32, dict[str, F32]]:
        m = np.float32(BETA1) * kept["first_moment"] + np.float32(1.0 - BETA1) * gradient
        with np.errstate(over="ignore"):  # the pool refuses a direction that is not finite
            square = gradient * gradient
        v = np.float32(BETA2) * kept["second_moment"] + np.float32(1.0 - BETA2) * square
        root = np.sqrt(v) * np.float32(1.0 / math.sqrt(1.0 - BETA2 ** (t + 1)))
        direction = m * np.float32(1.0 / (1.0 - BETA1 ** (t + 1)))
        direction /= root + np.float32(EPSILON)
        if not np.isfinite(v).all():
            direction.fill(np.nan)  # over Inf it would be 0, and be so for ever
        return direction, {"first_moment": m, "second_moment": v}


OPTIMIZERS: dict[str, type[Sgd]] = {"sgd": Sgd, "adamw": AdamW}
