"""EWC: Fisher information and anchors that hold adapters near what they learned."""

from __future__ import annotations

from typing import Any

from lora_engine.adapters.pool import AdapterPool


class EWC:
    """A penalty on leaving what adapters learned, one record a slot of a pool.

    form "factor": ewc_lambda sum F (theta - theta*)² over A and B, 8 bytes a weight.
    "delta": ewc_lambda sum_ij u_i v_j (ΔW - ΔW*)_ij², the Fisher information of ΔW = s B A
    taken as u vᵀ: the same for (B G, G⁻¹ A) as for (B, A), and 4 bytes a weight besides u and
    v. (Memory on a GPU: 24 r² bytes a slice more, for the solver.)

    Given as ``ewc=`` to ``batched_adapt``, each slot with a record takes the
    proximal step toward its anchor (EWC: Kirkpatrick et al. 2017), in the delta form first of
    B, then of A. A record belongs to the adapter it was made for: one that is added or set in
    its place is free of it.

    Raises ValueError for a negative ewc_lambda or another form.
    """

    def __init__(self, pool: AdapterPool, ewc_lambda: float, form: str = "factor") -> None:
        self.pool = pool
        self.ewc_lambda = float(ewc_lambda)
        self.form = form
        self._storage = pool._backend.Ewc(pool._storage, form, self.ewc_lambda)

    def set(self, slot: int, first: Any, second: Any) -> None:
        """Records the Fisher information of a slot, and its weights now as the anchor.

        form "factor": (F_A [r, in], F_B [out, r]), what ``lora_fisher`` gives over the number
        of samples; "delta": (u [out], v [in]), what ``lora_fisher_factors`` gives over it.
        float32, not negative; lists of them with several slices (None for a missing one).
        Raises ValueError where a shape differs from the slot's.
        """
        self._storage.set(slot, self.pool._slices_of(first), self.pool._slices_of(second))

    def remove(self, slot: int) -> None:
        """Forgets a slot's record."""
        self._storage.remove(slot)

    def penalty(self) -> float:
        """The penalty over all slots with a record."""
        return float(self._storage.penalty())
