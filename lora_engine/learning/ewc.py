"""EWC: Fisher information and anchors that hold adapters near what they learned."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine.adapters.config import MAX_FLOAT
from lora_engine.adapters.micro_lora import MicroLoRA
from lora_engine.adapters.pool import AdapterPool
from lora_engine.learning import host_arrays

if TYPE_CHECKING:
    from lora_engine.learning.ewc_pool import PoolEwc


# What lora_engine/evidence chooses: lambda for adapters that learn task after task (adapters.py,
# in both forms; many_users.py finds the same), gamma for a network (permuted_digits.py).
EWC_LAMBDA, GAMMA = 30.0, 0.95
FISHER_SAMPLES = 100


class ObserveResult(NamedTuple):
    """What an observe took: samples, rows left out for their gradient, and in words."""

    samples: int
    left_out: int
    note: str


class ConsolidateResult(NamedTuple):
    """consolidated: by slot or module, the samples its Fisher information is a mean over.
    unobserved: those that saw no sample since the last boundary; their records stay."""

    consolidated: dict[Any, int]
    unobserved: tuple[Any, ...]
    note: str


class EWC:
    """A penalty on leaving what adapters learned, one record a slot.

    Of an AdapterPool, whose slots are named by number, or of a MicroLoRA, by module.

    form "delta": ewc_lambda sum_ij u_i v_j (ΔW - ΔW*)_ij², the Fisher information of ΔW = s B A
    taken as u vᵀ: the same for (B G, G⁻¹ A) as for (B, A). "factor": ewc_lambda sum F (theta -
    theta*)² over A and B.

    ``observe`` takes the samples of a task: its Fisher information is a mean of per-sample
    squares, a moving average with the horizon ``fisher_samples``, corrected for its start.
    ``consolidate`` ends a task: F* <- gamma F* + F, and the weights now become the anchor
    (online EWC: Schwarz et al. 2018, section 3; in the delta form the marginals of
    gamma u* v*ᵀ + u vᵀ). Given as ``ewc=`` to ``batched_adapt`` or ``MicroLoRA.adapt``, each
    slot with a record takes the proximal step toward its anchor (Kirkpatrick et al. 2017), in
    the delta form first of B, then of A.

    A record and an average belong to the adapter they were made of: one that is added or set
    in its place has neither. Memory of a slot of rank r: its record 4 (r + 1) (in + out) bytes
    in the delta form (on a GPU 24 r² more a slice, for the solver), 8 r (in + out) in the
    factor form; while samples wait for ``consolidate``, 4 (in + out) bytes or 4 r (in + out)
    on the host, where room for up to twice as many slots may be held.

    The default ewc_lambda, of either form, is what the adapters of rank 4 of ``lora-engine demo
    --learning`` choose (evidence/adapters.py), gamma what its network does
    (evidence/permuted_digits.py), both on validation images.

    Raises ValueError for ewc_lambda < 0, gamma outside 0..1, fisher_samples < 1 or an unknown
    form.
    """

    def __init__(
        self,
        lora_or_pool: MicroLoRA | AdapterPool,
        ewc_lambda: float = EWC_LAMBDA,
        gamma: float = GAMMA,
        form: str = "delta",
        fisher_samples: int = FISHER_SAMPLES,
    ) -> None:
        self.ewc_lambda, self.gamma, self.form = float(ewc_lambda), float(gamma), form
        self.fisher_samples = operator.index(fisher_samples)
        if not 0.0 <= self.ewc_lambda <= MAX_FLOAT:
            raise ValueError(f"EWC: ewc_lambda: expected 0 or more, got {ewc_lambda}")
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"EWC: gamma: expected 0 to 1, got {gamma}")
        if self.fisher_samples < 1:
            raise ValueError(f"EWC: fisher_samples: expected at least 1, got {fisher_samples}")
        self.target = lora_or_pool
        if isinstance(self.target, MicroLoRA):
            modules = self.target._modules
            pools = dict.fromkeys(m.pool for m in modules.values())
            self._pools = {pool: self._of(pool) for pool in pools}
            self._names = {(m.pool, m.slot): name for name, m in modules.items()}
            self._where = {n: (self._pools[m.pool], m.slot) for n, m in modules.items()}
        elif isinstance(self.target, AdapterPool):
            self._pools = {self.target: self._of(self.target)}
        else:
            got = type(lora_or_pool).__name__  # type: ignore[unreachable]
            raise TypeError(f"EWC: lora_or_pool: expected a MicroLoRA or AdapterPool, got {got}")

    def _of(self, pool: AdapterPool) -> PoolEwc:
        from lora_engine.learning.ewc_pool import PoolEwc

        return PoolEwc(pool, self.ewc_lambda, self.form, self.gamma, self.fisher_samples)

    # ---- what the penalty is in a step ----

    @property
    def _storage(self) -> Any:
        if isinstance(self.target, MicroLoRA):
            raise ValueError(
                "batched_adapt: ewc: expected one made for this pool, got one of a MicroLoRA:"
                " MicroLoRA.adapt takes it"
            )
        return self._pools[self.target]._storage

    def step_of(self, pool: AdapterPool, lr: float, max_norm: float | None = None) -> Any:
        """A step under the penalty, for one of the pools that this EWC holds."""
        held = self._pools.get(pool)
        if held is None:
            raise ValueError("MicroLoRA: ewc: expected one made for this MicroLoRA, got another")
        return held.step(lr, max_norm)

    def penalty(self) -> float:
        """The penalty over all slots with a record."""
        return sum(float(held._storage.penalty()) for held in self._pools.values())

    # ---- records ----

    def _find(self, op: str, module_or_id: Any) -> tuple[PoolEwc, int]:
        if isinstance(self.target, AdapterPool):
            if type(module_or_id) is bool or not isinstance(module_or_id, Integral):
                got = f"EWC.{op}: slot: expected a whole number, got {module_or_id!r}"
                raise TypeError(got)
            return self._pools[self.target], int(module_or_id)
        if not isinstance(module_or_id, str) or module_or_id not in self._where:
            known = ", ".join(self._where)
            raise ValueError(f"EWC.{op}: module: expected one of {known}, got {module_or_id!r}")
        return self._where[module_or_id]

    def set(self, module_or_id: Any, first: Any, second: Any) -> None:
        """Records the Fisher information of a slot, and its weights now as the anchor.

        form "factor": (F_A [r, in], F_B [out, r]), what ``lora_fisher`` gives over the number
        of samples; "delta": (u [out], v [in]), what ``lora_fisher_factors`` gives over it.
        float32, not negative; lists of them with several slices (None for a missing one).
        Raises ValueError where a shape differs from the slot's.
        """
        held, slot = self._find("set", module_or_id)
        held.set(slot, first, second)

    def remove(self, module_or_id: Any) -> None:
        """Forgets a slot's record, and the samples it observed."""
        held, slot = self._find("remove", module_or_id)
        held.remove(slot)

    # ---- learning what matters ----

    def observe(self, x: Any, grad: Any, module_or_ids: Any) -> ObserveResult:
        """Takes samples of the task at hand; a row is a sample.

        x [n, in] or [in], grad = dL/dy [n, out] or [out], float32, float16 or (tensors)
        bfloat16; module_or_ids: the module, or of a pool the slot of all rows or int [n], one a
        row, -1 for none. A row whose gradient holds NaN or Inf, or whose squares leave
        float32's range, is left out and counted. n rows are what n calls with one row each
        are. The averages are on the host: tensors on a GPU are copied there, which waits.

        Raises ValueError (shape, module), TypeError (dtype), IndexError (a slot not in use).
        """
        op = "EWC.observe"
        if isinstance(self.target, AdapterPool):
            held, ids = self._pools[self.target], host_arrays.slots(op, module_or_ids)
        else:
            held, slot = self._find("observe", module_or_ids)
            ids = np.array(slot)
        rows = host_arrays.rows(op, "x", x, held.pool.in_features)
        up = host_arrays.rows(op, "grad", grad, held.pool.out_features, len(rows))
        if ids.ndim and ids.shape != (len(rows),):
            raise ValueError(f"{op}: ids: expected shape [{len(rows)}], got {list(ids.shape)}")
        taken, left_out = held.observe(rows, up, ids)
        note = f"{left_out} rows with NaN or Inf were left out" if left_out else ""
        if not taken and not note:
            note = "no adapter was named: nothing was observed"
        return ObserveResult(taken, left_out, note)

    def consolidate(self, ids: Any = None) -> ConsolidateResult:
        """A task boundary: what was observed since the last one joins the record, the weights
        now become the anchor, and the average starts anew.

        ids: slots or modules, or one; None: all that have observed or have a record. One that
        observed nothing keeps its record, anchor included. Raises IndexError (a slot not in
        use), ValueError (module), changing nothing.
        """
        wanted = self._wanted(ids)
        consolidated: dict[Any, int] = {}
        unobserved: list[Any] = []
        for pool, held in self._pools.items():
            if wanted is None or pool in wanted:
                done, idle = held.consolidate(None if wanted is None else wanted[pool])
                consolidated |= {self._name(pool, slot): n for slot, n in done.items()}
                unobserved += [self._name(pool, slot) for slot in idle]
        note = ""
        if unobserved:
            note = f"{len(unobserved)} observed no sample: their records stay as they were"
        elif not consolidated:
            note = "nothing was observed: nothing was consolidated"
        return ConsolidateResult(consolidated, tuple(unobserved), note)

    def _name(self, pool: AdapterPool, slot: int) -> Any:
        return slot if isinstance(self.target, AdapterPool) else self._names[pool, slot]

    def _wanted(self, ids: Any) -> dict[AdapterPool, list[int]] | None:
        """Slots by pool, each once; None for all."""
        if ids is None:
            return None if isinstance(self.target, AdapterPool) else self._wanted([*self._where])
        if isinstance(self.target, AdapterPool):
            found = np.unique(host_arrays.slots("EWC.consolidate", ids))
            if len(found) and found[0] < 0:
                raise IndexError("EWC.consolidate: ids: expected slots in use, got -1")
            return {self.target: found.tolist()}
        by_pool: dict[AdapterPool, list[int]] = {}
        for name in dict.fromkeys([ids] if isinstance(ids, str) else ids):
            held, slot = self._find("consolidate", name)
            by_pool.setdefault(held.pool, []).append(slot)
        return by_pool

    # ---- state ----

    def state(self) -> dict[str, np.ndarray]:
        """Records, anchors and moving averages as arrays, copies, for ``load_state``.

        Keys: form, field, slice, and slot or module, with dots between.
        """
        from lora_engine.learning import ewc_state

        return ewc_state.to_arrays(self)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Replaces everything that is kept by what ``state`` gave.

        Raises ValueError (form, shape, NaN, Inf or negative Fisher information, what is missing
        or not known), TypeError (dtype), IndexError (a slot not in use), changing nothing.
        """
        from lora_engine.learning import ewc_state

        ewc_state.from_arrays(self, state)

    # What a slot has travels with its adapter: AdapterStore.carry.

    def slot_version(self, slot: int) -> Any:
        """Differs after every change to what is kept of a slot of the pool."""
        held, slot = self._find("slot_version", slot)
        return held.version(slot)

    def slot_state(self, slot: int) -> dict[str, np.ndarray]:
        """``state`` of one slot of the pool, as that of any: for ``load_slot_state``."""
        from lora_engine.learning import ewc_state

        return ewc_state.to_slot_arrays(self, slot)

    def load_slot_state(self, slot: int, state: Mapping[str, np.ndarray]) -> None:
        """Replaces what is kept of a slot of the pool. Raises as ``load_state`` does."""
        from lora_engine.learning import ewc_state

        ewc_state.from_slot_arrays(self, slot, state)

    def save(self, file: str | os.PathLike[str]) -> None:
        """The settings and the state, as safetensors, with the digest of the weights.

        The file is replaced whole. In a MicroLoRA's folder it is kept by ``MicroLoRA.save``,
        but belongs to the weights that were saved with it. Raises OSError.
        """
        from lora_engine.learning import ewc_state

        ewc_state.save(self, file)

    @classmethod
    def load(cls, file: str | os.PathLike[str], lora_or_pool: MicroLoRA | AdapterPool) -> EWC:
        """What ``save`` wrote, for the same adapters.

        Raises FormatError for a file that is damaged or of other weights, ValueError for
        Fisher information of another shape, OSError.
        """
        from lora_engine.learning import ewc_state

        return ewc_state.load(file, lora_or_pool)
