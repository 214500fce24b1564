"""EWC: Fisher information and anchors that hold adapters near what they learned."""

from __future__ import annotations

from typing import Any

from lora_engine.adapters.pool import AdapterPool


class EWC:
    """The penalty ewc_lambda sum F (theta - theta*)², one record a slot of a pool.

    Given as ``ewc=`` to ``batched_adapt``, each slot with a record takes the
    proximal step toward its anchor (EWC: Kirkpatrick et al. 2017). A record
    belongs to the adapter it was made for: one that is added or set in its
    place is free of it.

    form: "factor" keeps F and anchors of A and B, 8 bytes a weight. Raises
    NotImplementedError for "delta", ValueError for a negative ewc_lambda.
    """

    def __init__(self, pool: AdapterPool, ewc_lambda: float, form: str = "factor") -> None:
        self.pool = pool
        self.ewc_lambda = float(ewc_lambda)
        self.form = form
        self._storage = pool._backend.Ewc(pool._storage, form, self.ewc_lambda)

    def set(self, slot: int, fisher_A: Any, fisher_B: Any) -> None:
        """Records the Fisher information of a slot, and its weights now as the anchor.

        fisher_A [r, in], fisher_B [out, r]: float32, not negative, means over
        samples of squared per-sample gradients; lists of them with several
        slices. Raises ValueError where a shape differs from the slot's.
        """
        A, B = self.pool._slices_of(fisher_A), self.pool._slices_of(fisher_B)
        self._storage.set(slot, A, B)

    def remove(self, slot: int) -> None:
        """Forgets a slot's record."""
        self._storage.remove(slot)

    def penalty(self) -> float:
        """ewc_lambda sum F (theta - theta*)² over all slots with a record."""
        return float(self._storage.penalty())
