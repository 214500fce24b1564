"""MicroLoRA: one adapter over several modules that learns while it serves."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_engine import ops
from lora_engine.adapters import initial
from lora_engine.adapters.adapter import Adapter
from lora_engine.adapters.config import MicroLoRAConfig
from lora_engine.adapters.exploration import Baseline, Explorer, checked_sigma
from lora_engine.adapters.pending import PendingGradient
from lora_engine.adapters.pool import AdapterPool
from lora_engine.backends import chosen

if TYPE_CHECKING:
    from lora_engine.learning.ewc import EWC
    from lora_engine.learning.feedback import Feedback

QUALITY_MAX_NORM = 1.0  # of gA and gB together, in a step by quality
_APPLIED = ops.APPLIED
_new = tuple.__new__  # a third of the cost of a NamedTuple's own constructor


def _files() -> Any:
    """The reader and writer of folders, imported at first use: it takes as long as the rest."""
    from lora_engine.adapters import micro_folder

    return micro_folder


class AdaptResult(NamedTuple):
    """What an adapt did. grad_norm: of gA and gB together (mean over the rows)."""

    applied: bool
    note: str
    latency_us: float
    grad_norm: float


class _Module(PendingGradient):
    """One target module: its slot, and the gradients that wait for apply_updates."""

    def __init__(self, name: str, pool: AdapterPool, slot: int) -> None:
        super().__init__(pool._storage, slot)
        self.adapt_slot = self.storage.adapt_slot
        self.pool = pool
        self.out = pool.out_features
        self.dropout_key = zlib.crc32(name.encode())
        self.steps = 0  # adapts so far
        self.baseline = Baseline()


def _penalised(ewc: Any, m: _Module, lr: float | None, max_norm: float | None = None) -> Any:
    """A step of the module's pool under the penalty."""
    if lr is None:
        raise ValueError("MicroLoRA.adapt: ewc: expected None without lr, got an EWC")
    if not hasattr(ewc, "step_of"):
        raise TypeError(f"MicroLoRA: ewc: expected an EWC or None, got {type(ewc).__name__}")
    return ewc.step_of(m.pool, lr, max_norm)


class MicroLoRA:
    """An adapter for each target module of the config.

    A starts Kaiming-uniform (a = sqrt 5, as PEFT's), B at zero: a fresh adapter
    changes nothing. ``forward`` and ``adapt`` take NumPy arrays or CPU torch
    tensors, x [in] or [n, in].
    """

    def __init__(self, config: MicroLoRAConfig) -> None:
        self.config = config
        self._modules: dict[str, _Module] = {}
        self._dropout = config.dropout
        self._step: tuple[float | None, Any] = (None, None)  # the last lr, and its step
        self._quality_step: tuple[float | None, Any] = (None, None)
        self._peft_config: dict[str, Any] = {}
        self._explorer = Explorer(config.seed)
        rng = np.random.default_rng(config.seed)
        pools: dict[tuple[int, int], AdapterPool] = {}
        for name in config.target_modules:
            shape = config.shape(name)
            if shape not in pools:
                pools[shape] = AdapterPool(*shape, seed=config.seed)
            pool = pools[shape]
            slot = pool.add(*initial.weights(rng, config.rank, *shape), config.scaling)
            self._modules[name] = _Module(name, pool, slot)

    def __repr__(self) -> str:
        c = self.config
        return f"MicroLoRA(rank={c.rank}, scaling={c.scaling:g}, modules={list(c.target_modules)})"

    def _module(self, name: str) -> _Module:
        try:
            return self._modules[name]
        except KeyError:
            known = ", ".join(self._modules)
            raise ValueError(f"MicroLoRA: module: expected one of {known}, got {name!r}") from None

    # ---- serving ------------------------------------------------------------

    def forward(
        self,
        x: Any,
        module: str,
        out: Any = None,
        explore: float | None = None,
        return_trace: bool = False,
    ) -> Any:
        """The delta of a module, scaling B (A x): [out] or [n, out], in ``out`` if given.

        explore: a standard deviation; normal noise of it is added to every element, so that
        ``Feedback.from_quality`` has a direction to learn from. With return_trace the result
        is (delta, trace), to give to it; without, this thread's last trace of the module is
        kept for it.

        A torch x that requires grad, of any number of dimensions, is differentiated
        through, and the backward pass adds the adapter's gradient to what
        ``apply_updates`` applies.
        """
        m = self._modules.get(module) or self._module(module)
        if explore is not None or return_trace:
            return self._explore(x, module, out, explore, return_trace)
        if type(x) is not np.ndarray and getattr(x, "requires_grad", False):
            return self._forward_autograd(x, m, out)
        return m.storage.forward_slot(x, m.slot, out, False, False, m.out)

    def forward_add(self, x: Any, module: str, y: Any) -> Any:
        """y += delta, in place; returns y."""
        m = self._modules.get(module) or self._module(module)
        if y is None:
            raise ValueError("MicroLoRA.forward_add: y: expected an array [n, out], got none")
        return m.storage.forward_slot(x, m.slot, y, True, False, m.out)

    def _explore(
        self, x: Any, module: str, out: Any, explore: float | None, return_trace: bool
    ) -> Any:
        sigma = checked_sigma("MicroLoRA.forward", explore)
        delta, trace = self._explorer.explore(self.forward(x, module, out), module, sigma)
        if not return_trace:
            return delta
        self._explorer.take(module)
        return delta, trace

    def _forward_autograd(self, x: Any, m: _Module, out: Any) -> Any:
        import torch

        if not torch.is_grad_enabled():
            x = x.detach()
            if x.ndim <= 2 or out is not None:
                return m.storage.forward_slot(x, m.slot, out, False, False, m.out)
            rows = m.storage.forward_slot(x.flatten(0, -2), m.slot, None, False, False, m.out)
            return rows.reshape(*x.shape[:-1], m.out)
        if out is not None:
            raise ValueError("MicroLoRA.forward: out: expected None for an x that requires grad")
        from lora_engine.torch_ops import micro_lora_delta

        return micro_lora_delta(x, m, self.config.gradient_checkpointing)

    # ---- learning -----------------------------------------------------------

    def adapt(
        self,
        x: Any,
        feedback: Feedback,
        module: str,
        lr: float | None = None,
        ewc: EWC | None = None,
    ) -> AdaptResult:
        """Learns from feedback on the output of ``forward(x, module)``.

        With lr, one step at once (several rows: of their mean gradient), under the penalty of
        ``ewc`` if given; without, the gradient is kept for ``apply_updates``, which takes the
        penalty. A step that a quality has a part in is clipped to a norm of 1, here or there.
        Where the gradient holds NaN or Inf nothing changes and the result says so.
        """
        start = perf_counter()
        m = self._modules.get(module) or self._module(module)
        try:
            grad = feedback.gradient
        except AttributeError:
            got = type(feedback).__name__
            raise TypeError(f"MicroLoRA.adapt: feedback: expected a Feedback, got {got}") from None
        if grad is None:
            if feedback.quality is not None:
                return self._adapt_quality(x, feedback, module, m, lr, ewc)
            grad = feedback.output_gradient(self, x, module)
        kept, step = self._step  # read once: other threads may step with another lr
        if ewc is not None:
            step = _penalised(ewc, m, lr)
        elif lr is not None and kept != lr:
            step = self._step_of(lr)
        outcome, norm = self._take_gradient(x, grad, m, lr, step)
        if outcome == _APPLIED:
            note = ""
        else:
            note = ops.NO_ROWS if outcome == ops.NO_ADAPTER else ops.NOTES[outcome]
        latency = (perf_counter() - start) * 1e6
        return _new(AdaptResult, (outcome == _APPLIED, note, latency, norm))

    def _adapt_quality(
        self,
        x: Any,
        feedback: Feedback,
        module: str,
        m: _Module,
        lr: float | None,
        ewc: EWC | None,
    ) -> AdaptResult:
        """Learns from a quality, then updates the module's baseline."""
        start = perf_counter()
        step = self._quality_step_of(m, lr, ewc)
        grad, why = self._quality_gradient(x, feedback, module, m)
        if grad is None:
            outcome, norm = ops.NO_ADAPTER, 0.0
        else:
            outcome, norm = self._take_gradient(x, grad, m, lr, step, rated=True)
            why = ops.NOTES[outcome]
        self._rate(feedback, module, m)
        return AdaptResult(outcome == _APPLIED, why, (perf_counter() - start) * 1e6, norm)

    def _quality_gradient(
        self, x: Any, feedback: Feedback, module: str, m: _Module
    ) -> tuple[Any, str]:
        """dL/dy and "", or None and why: with this thread's last trace where nothing was given."""
        last = self._explorer.last(module) if feedback.needs_trace else None
        return feedback.quality_gradient(self, x, module, m.baseline.value, last)

    def _rate(self, feedback: Feedback, module: str, m: _Module) -> None:
        """What a quality changes once it was learned from, or found to teach nothing."""
        m.baseline.update(feedback.quality)
        if feedback.needs_trace:
            self._explorer.take(module)

    def _take_gradient(
        self, x: Any, grad: Any, m: _Module, lr: float | None, step: Any,
        rated: bool = False,
    ) -> tuple[int, float]:  # fmt: skip
        """Steps by a gradient, or keeps it where lr is None: (outcome, its norm)."""
        if self._dropout:
            x = self._dropped(x, m)
        if lr is None:
            outcome, norm, rows = m.accumulate(x, grad, rated=rated)
            norm /= max(rows, 1)
        else:
            outcome, norm = m.adapt_slot(x, grad, m.slot, step)
        m.steps += outcome == _APPLIED
        return outcome, norm

    def _quality_step_of(self, m: _Module, lr: float | None, ewc: EWC | None) -> Any:
        """A step of bounded length: noise that nothing answers to would else grow without end."""
        if ewc is not None:
            return _penalised(ewc, m, lr, QUALITY_MAX_NORM)
        kept, step = self._quality_step
        if lr is not None and kept != lr:
            step = ops.make_step(chosen(), lr, max_norm=QUALITY_MAX_NORM)
            self._quality_step = (lr, step)
        return step

    def _step_of(self, lr: float) -> Any:
        """Makes the step of a learning rate, and keeps it for the next call."""
        step = ops.make_step(chosen(), lr)
        self._step = (lr, step)
        return step

    def _dropped(self, x: Any, m: _Module) -> Any:
        """x with a mask that is a function of (seed, module, step), scaled by 1/(1-p)."""
        if not hasattr(x, "shape"):
            return x  # for the op to refuse
        keep = 1.0 - self.config.dropout
        key = [self.config.seed & 0xFFFFFFFFFFFFFFFF, (m.dropout_key << 32) ^ m.steps]
        drawn = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        mask = (drawn.random(tuple(x.shape), dtype=np.float32) < keep) * np.float32(1.0 / keep)
        if isinstance(x, np.ndarray):
            return (x * mask).astype(x.dtype, copy=False)
        import torch

        return (x * torch.from_numpy(mask)).to(x.dtype)

    def apply_updates(self, lr: float, ewc: EWC | None = None) -> AdaptResult:
        """One step with the mean of what was accumulated in every module, then cleared.

        ewc: the penalty that the step is under, one made for this MicroLoRA.
        """
        start = perf_counter()
        step = self._step_of(lr) if ewc is None else None
        applied, notes, norms = False, [], 0.0
        for name, m in self._modules.items():
            if m.refused:
                notes.append(f"{name}: {m.refused} gradients with NaN or Inf were left out")
            if m.rated:
                outcome, norm = m.apply(self._quality_step_of(m, lr, ewc))
            else:
                outcome, norm = m.apply(step or _penalised(ewc, m, lr))
            if outcome == ops.NO_ADAPTER:
                continue
            applied = applied or outcome == ops.APPLIED
            norms += norm * norm
            if ops.NOTES[outcome]:
                notes.append(f"{name}: {ops.NOTES[outcome]}")
        if not applied and not notes:
            notes.append("nothing was accumulated")
        latency = (perf_counter() - start) * 1e6
        return AdaptResult(applied, "; ".join(notes), latency, math.sqrt(norms))

    # ---- weights ------------------------------------------------------------

    def weights(self, module: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Copies of (A [r, in], B [out, r], scaling) of a module."""
        m = self._module(module)
        return m.pool.get(m.slot)

    def set_weights(self, module: str, A: Any, B: Any) -> None:
        """Replaces a module's A and B (of the config's shape and rank)."""
        m = self._module(module)
        want = ((self.config.rank, m.pool.in_features), (m.out, self.config.rank))
        for name, got, shape in (("A", A, want[0]), ("B", B, want[1])):
            if tuple(np.shape(got)) != shape:
                raise ValueError(
                    f"MicroLoRA.set_weights: {name}: expected shape {shape},"
                    f" got {tuple(np.shape(got))}"
                )
        m.pool.set(m.slot, A, B, self.config.scaling)
        m.clear()

    def _set_factors(self, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        for name, (A, B) in factors.items():
            self.set_weights(name, A, B)

    def export_weights(self) -> bytes:
        """The weights as safetensors bytes, under PEFT's key names."""
        data: bytes = _files().weights_bytes(Adapter.from_micro_lora(self))
        return data

    def import_weights(self, data: bytes) -> None:
        """Weights as ``export_weights`` gives them; what waits for apply_updates is dropped.

        Raises FormatError, changing nothing, where the bytes are damaged or hold
        other modules or shapes than the config.
        """
        self._set_factors(_files().read_factors(data, self.config, "import_weights"))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """A PEFT adapter folder, and beside it the engine's own state (steps, baselines).

        The folder is replaced whole: a kill leaves the old one or the new. Whatever
        else it holds is kept; PEFT ignores the state file. Raises OSError, and
        ValueError for the working folder, which cannot be replaced.
        """
        self._save_with(folder, {})

    def _save_with(self, folder: str | os.PathLike[str], beside: Mapping[str, bytes]) -> None:
        """beside: other files of the folder, which are replaced with it."""
        from lora_engine.adapters import peft_format

        steps = {name: m.steps for name, m in self._modules.items()}
        baselines = {name: m.baseline.value for name, m in self._modules.items()}
        known = {name: value for name, value in baselines.items() if value is not None}
        state = partial(_files().state_bytes, self.config, _files().State(steps, known))
        peft_format.save(folder, Adapter.from_micro_lora(self), state, beside)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> MicroLoRA:
        """Loads a folder that ``save`` or PEFT wrote, if its modules share one rank.

        Raises FormatError naming file and key for anything damaged, and
        FileNotFoundError. A state file that belongs to other weights is dropped
        with a warning.
        """
        from lora_engine.adapters import peft_format

        adapter, config, state = _files().load(peft_format.read_folder(folder))
        lora = cls._holding(adapter, config)
        for name, m in lora._modules.items():
            m.steps = state.steps.get(name, 0)
            m.baseline = Baseline(state.baselines.get(name))
        return lora

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> MicroLoRA:
        """A MicroLoRA with an adapter's weights.

        Raises FormatError naming what a MicroLoRA cannot hold: ranks or scalings that differ,
        embeddings, biases, modules_to_save.
        """
        return cls._holding(adapter, _files().config_of(adapter, "MicroLoRA.from_adapter"))

    @classmethod
    def _holding(cls, adapter: Adapter, config: MicroLoRAConfig) -> MicroLoRA:
        lora = cls(config)
        lora._set_factors({name: (w.A, w.B) for name, w in adapter.modules.items()})
        lora._peft_config = dict(adapter.peft_config)
        return lora
