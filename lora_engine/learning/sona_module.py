"""What Sona keeps of one target module: the consolidated adapter and the sessions' fast ones.

What a request reads is one object, ``Served``, that is never changed but replaced: a request
sees the adapters of before a consolidation or those of after it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine.adapters.exploration import Baseline
from lora_engine.adapters.micro_lora import QUALITY_MAX_NORM
from lora_engine.adapters.pool import AdapterPool
from lora_engine.learning import consolidation
from lora_engine.learning.ewc import EWC
from lora_engine.learning.factor_sums import FactorSums, can_be_summed
from lora_engine.learning.fisher_merge import merge_factors
from lora_engine.learning.held_out import HeldOut
from lora_engine.learning.sona_config import SonaConfig

Array = np.ndarray

STEPPED = (ops.APPLIED, ops.NOT_OBSERVED)  # outcomes of a step that was taken
BASELINES = 10_000  # that a module keeps: of the sessions that were rated last


class Fast:
    """A session's adapter, and what was seen of the samples that taught it."""

    __slots__ = ("inputs", "pending", "quality", "slot")

    def __init__(self, slot: int, inputs: Array) -> None:
        self.slot = slot
        self.inputs = inputs  # sum of x, where it is asked for
        self.quality = 0.0  # sum over samples
        self.pending = 0  # samples that no consolidation has seen


class Member(NamedTuple):
    """An adapter that "ensemble" keeps, with the direction of its mean input."""

    slot: int
    direction: Array
    quality: float


class Served(NamedTuple):
    """consolidated: a slot. fast, frozen: a session's adapters; a frozen one is being merged,
    and served beside the fast one until it is."""

    consolidated: int
    fast: dict[Hashable, Fast]
    frozen: dict[Hashable, Fast]
    members: tuple[Member, ...] = ()

    def shared(self) -> list[int]:
        """Slots of no single session."""
        return [self.consolidated, *(member.slot for member in self.members)]

    def slots(self) -> list[int]:
        """All of them."""
        own = [*self.fast.values(), *self.frozen.values()]
        return [*self.shared(), *[fast.slot for fast in own]]

    def slots_of(self, session: Hashable) -> list[int]:
        """Of what a session's rows add up, without the members."""
        slots = [self.consolidated]
        for adapters in (self.frozen, self.fast):
            fast = adapters.get(session)
            if fast is not None:
                slots.append(fast.slot)
        return slots


class Module:
    """One target module. ``lock`` is held by whoever changes an adapter or ``served``."""

    def __init__(self, name: str, config: SonaConfig) -> None:
        self.name = name
        micro = config.micro_lora
        self.in_features, self.out_features = micro.shape(name)
        self.scaling, self.rank = micro.scaling, micro.rank
        self.pool = AdapterPool(self.in_features, self.out_features, seed=micro.seed)
        self.storage = self.pool._storage
        self._step_observed = getattr(self.storage, "adapt_slot_observed", None)
        self.gamma = config.ewc_gamma
        held = config.ewc_lambda > 0
        self.ewc = EWC(self.pool, config.ewc_lambda, form="delta") if held else None
        self.step, self.quality_step = (
            ops.make_step(self.pool._backend, config.instant_lr, max_norm, ewc=self.ewc)
            for max_norm in (config.max_grad_norm, min(config.max_grad_norm, QUALITY_MAX_NORM))
        )
        self.mean_inputs = config.consolidation == "ensemble"
        self._no_inputs = np.zeros(self.in_features, np.float32)  # one for all that need none
        self._no_inputs.flags.writeable = False
        self.lock = threading.Lock()
        rng = np.random.default_rng([micro.seed, *name.encode()])
        bound = 1.0 / math.sqrt(self.in_features)
        drawn = rng.uniform(-bound, bound, (self.rank, self.in_features))
        self.A = drawn.astype(np.float32)  # of every fresh adapter
        self.B = np.zeros((self.out_features, self.rank), np.float32)
        self.fisher: tuple[Array, Array] | None = None  # u* [out], v* [in], means over samples
        self.samples = 0.0  # that it stands for, gamma of them kept at each consolidation
        self.sums = FactorSums(self.in_features, self.out_features)  # of waiting samples, by slot
        self.held_out = HeldOut(
            config.held_out, self.in_features, self.out_features, [micro.seed, *name.encode()]
        )
        self.served = Served(self.pool.add(self.A, self.B, self.scaling), {}, {})
        self.baselines: dict[Hashable, Baseline] = {}
        # What was served, the Fisher information and its samples, before the last consolidation.
        self.previous: tuple[Served, tuple[Array, Array] | None, float] | None = None

    # ---- serving ----

    def forward(self, x: Any, session: Hashable, out: Any) -> Any:
        return self.forward_by(self.served, x, session, out)

    def forward_by(self, served: Served, x: Any, session: Hashable, out: Any) -> Any:
        """What a session is served, or would be."""
        slots = served.slots_of(session)
        if not served.members:
            if len(slots) == 1:
                return self.storage.forward_slot(x, slots[0], out, False, False, self.out_features)
            if isinstance(x, np.ndarray):
                ids = np.array([slots] * _rows(x), np.int32)
                return self.storage.forward(x, ids, None, out, False)
        return self._mixture(served, x, [session] * _rows(x), out)

    def forward_rows(self, x: Any, sessions: Iterable[Hashable], out: Any) -> Any:
        return self._mixture(self.served, x, list(sessions), out)

    def _mixture(self, served: Served, x: Any, sessions: list[Hashable], out: Any) -> Any:
        """What the sessions, one a row, are served."""
        if len(sessions) != _rows(x):
            raise ValueError(
                f"Sona.forward: session: expected one for each of {_rows(x)} rows,"
                f" got {len(sessions)}"
            )
        own = [served.slots_of(session) for session in sessions]
        ids = np.full((len(own), 3 + len(served.members)), -1, np.int32)
        for row, slots in zip(ids, own, strict=True):
            row[: len(slots)] = slots
        weights = None
        if served.members:
            weights = np.ones(ids.shape, np.float32)
            kept = [member.slot for member in served.members]
            means = np.stack([member.direction for member in served.members])
            rows = as_float32(x)
            _, mixed = consolidation.ensemble(rows, served.consolidated, kept, means)
            ids[:, 3:], weights[:, 3:] = kept, mixed[:, 1:]
        if isinstance(x, np.ndarray):
            return self.storage.forward(x, ids, weights, out, False)
        import torch

        of_x = [None if a is None else torch.from_numpy(a).to(x.device) for a in (ids, weights)]
        return self.storage.forward(x, *of_x, out, False)

    # ---- learning ----

    def rate(self, session: Hashable, qualities: Array) -> None:
        """Updates a session's baseline; the lock is held."""
        baseline = self.baselines.pop(session, None) or Baseline()
        baseline.update(qualities)
        self.baselines[session] = baseline  # the last one now
        if len(self.baselines) > BASELINES:
            del self.baselines[next(iter(self.baselines))]

    def _fresh(self) -> Fast:
        """An adapter for a session that has none; it adds nothing to what is served."""
        slot = self.pool.add(self.A, self.B, self.scaling)
        self.sums.begin(slot)
        self.hold(slot, self.A)
        return self.fast_of(slot)

    def fast_of(self, slot: int) -> Fast:
        """What is kept of a session's adapter, with nothing seen yet."""
        return Fast(slot, self._no_inputs.copy() if self.mean_inputs else self._no_inputs)

    def hold(self, slot: int, A: Array) -> None:
        """Has the penalty hold a session's adapter near adding nothing to what is served."""
        if self.ewc is not None and self.fisher is not None:
            u, v = self.fisher
            nothing = np.zeros((self.out_features, len(A)), np.float32)
            self.ewc._storage.restore(slot, [u], [v], [A], [nothing])

    def take_fisher(self, u: Array, v: Array, samples: int, slot: int) -> None:
        """Adds the mean factors of a task's samples to the Fisher information, and anchors the
        consolidated adapter where it is now; the lock is held."""
        old = None if self.fisher is None else tuple([part] for part in self.fisher)
        joined = merge_factors(old, ([u], [v]), self.gamma)  # type: ignore[arg-type]
        self.fisher = (joined[0][0], joined[1][0])
        self.samples = self.gamma * self.samples + samples
        if self.ewc is not None:
            self.ewc.set(slot, *self.fisher)

    def adapt(
        self, x: Any, grad: Any, session: Hashable, step: Any, observe: bool
    ) -> tuple[Fast, int, float]:
        """A step of a session's adapter: (it, outcome, norm of the gradient); the lock is held.

        observe: the sample counts for the next merge. An adapter is made for the session's first
        step, and kept if that is taken.
        """
        fast = self.served.fast.get(session)
        if fast is not None:
            outcome, norm = self._step_slot(x, grad, fast.slot, step, observe)
            return fast, outcome, norm
        fast, outcome = self._fresh(), ops.NO_ADAPTER
        try:
            outcome, norm = self._step_slot(x, grad, fast.slot, step, observe)
        finally:
            if outcome in STEPPED:
                self.served.fast[session] = fast
            else:
                self.pool.remove(fast.slot)
        return fast, outcome, norm

    def _step_slot(
        self, x: Any, grad: Any, slot: int, step: Any, observe: bool
    ) -> tuple[int, float]:
        if observe and self._step_observed is not None:
            done: tuple[int, float] = self._step_observed(
                x, grad, slot, step, self.sums.u, self.sums.v
            )
            return done
        outcome, norm = self.storage.adapt_slot(x, grad, slot, step)
        if observe and outcome == ops.APPLIED:
            both = (as_float32(rows).reshape(1, -1) for rows in (x, grad))
            if not all(can_be_summed(rows)[0] for rows in both):
                return ops.NOT_OBSERVED, norm
            self.pool._backend.lora_fisher_factors(x, grad, (self.sums.u[slot], self.sums.v[slot]))
        return outcome, norm

    def held_out_target(self, x: Any, grad: Any, session: Hashable) -> tuple[Array, Array] | None:
        """x, and where a step of 1 along the gradient would move the output; None where the
        gradient does not fit, of which the step has more to say, or that is beyond float32."""
        rows, up = as_float32(x), as_float32(grad)
        target: Array = self.forward(rows, session, None)
        if up.shape != target.shape:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            target -= up
        return (rows, target) if np.isfinite(target).all() else None

    def forgotten(self) -> list[int]:
        """Slots that were kept for a rollback alone; whoever takes them removes them."""
        if self.previous is None:
            return []
        before, self.previous = self.previous[0], None
        shared = {*before.shared()} - {*self.served.shared()}
        return [*shared, *[fast.slot for fast in before.frozen.values()]]  # which were merged

    def forget(self) -> None:
        """Frees what was kept for a rollback; the lock is held."""
        self.pool.remove_all(self.forgotten())


def as_float32(values: Any) -> Array:
    """An array or tensor of any float dtype on the host."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu()
    return np.asarray(values, np.float32)


def _rows(x: Any) -> int:
    if not hasattr(x, "ndim"):
        got = type(x).__name__
        raise TypeError(f"Sona.forward: x: expected a NumPy array or a torch tensor, got {got}")
    return x.shape[0] if x.ndim == 2 else 1
