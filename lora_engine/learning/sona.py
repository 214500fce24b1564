"""Sona: adapters that learn at three speeds, from requests, in the background and deeply.

After the three loops of the RuvLLM fine-tuning guide. What a session is served is the
consolidated adapter plus its own fast one; feedback changes the fast one at once; every
``background_interval_ms`` the fast ones are merged into the consolidated one and forgotten;
``deep_optimize`` trains the consolidated one on collected samples.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Hashable, Sequence
from time import monotonic, perf_counter
from typing import Any, NamedTuple

from lora_engine import ops
from lora_engine.adapters.config import MicroLoRAConfig
from lora_engine.adapters.exploration import Explorer, checked_sigma
from lora_engine.adapters.micro_lora import AdaptResult, MicroLoRA
from lora_engine.counters import Counters, counters
from lora_engine.learning import background, deep
from lora_engine.learning.background import BackgroundResult
from lora_engine.learning.deep import DeepResult
from lora_engine.learning.feedback import Feedback
from lora_engine.learning.sona_config import SonaConfig
from lora_engine.learning.sona_module import STEPPED, Fast, Module, as_float32
from lora_engine.learning.training_samples import TrainingSample

log = logging.getLogger(__name__)
_new = tuple.__new__

LEFT_OUT = "max_pending_samples are waiting: learned, left out of the merge"
TOO_LARGE = "too large for float32 sums of squares: learned, left out of the merge"


class SonaStats(NamedTuple):
    """What a Sona did since it was made, or since what it loaded began. pending_samples: applied,
    and seen by no consolidation yet. accumulated_quality: of applied samples since the last deep
    run. background_failed: passes that raised. skipped: how many samples taught nothing, or count
    for no consolidation, by reason. engine: the counters of the C++ core, of the whole process."""

    instant_count: int
    instant_avg_latency_us: float
    background_count: int
    background_rejected: int
    background_failed: int
    deep_count: int
    deep_rejected: int
    pending_samples: int
    accumulated_quality: float
    skipped: dict[str, int]
    engine: Counters


class _SessionView:
    """A session as ``Feedback`` sees an adapter."""

    def __init__(self, module: Module, session: Hashable, config: MicroLoRAConfig) -> None:
        self.module, self.session, self.config = module, session, config

    def forward(self, x: Any, module: str) -> Any:
        return self.module.forward(x, self.session, None)


class Sona:
    """config: shapes, speeds, strategy. Arrays are NumPy's or CPU torch tensors, x [in] or
    [n, in]. Sessions are named by anything hashable; None is one of them.

    Each module keeps the baselines of the 10,000 sessions whose quality it saw last; an adapter
    is kept for a session from its first step that was taken.

    Safe to use from several threads. ``start`` runs the background pass in a thread of its
    own; as a context manager a Sona stops it at the end.
    """

    def __init__(self, config: SonaConfig | None = None) -> None:
        self.config = config = config or SonaConfig()
        self._modules = {name: Module(name, config) for name in config.micro_lora.target_modules}
        self._named: dict[str | None, Module] = dict(self._modules.items())
        if len(self._modules) == 1:
            self._named[None] = next(iter(self._modules.values()))
        self._explorer = Explorer(config.micro_lora.seed)
        self._lock = threading.Lock()  # of the counters; taken last
        self._pass_lock = threading.Lock()  # one background or deep pass at a time
        self._instants, self._seconds = 0, 0.0
        self._pending, self._quality = 0, 0.0
        self._counts: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._last_pass = monotonic()
        self._thread = background.Repeater(self.maybe_background, config.background_interval_ms)

    def __repr__(self) -> str:
        return f"Sona({self.config.consolidation!r}, modules={list(self._modules)})"

    def __enter__(self) -> Sona:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _module(self, name: str | None) -> Module:
        found = self._named.get(name)
        if found is None:
            known = ", ".join(self._modules)
            raise ValueError(f"Sona: module: expected one of {known}, got {name!r}")
        return found

    # ---- serving ------------------------------------------------------------

    def forward(
        self,
        x: Any,
        module: str | None = None,
        session: Hashable | list[Hashable] = None,
        out: Any = None,
        explore: float | None = None,
        return_trace: bool = False,
    ) -> Any:
        """What is added to the frozen module's output: [out] or [n, out], in ``out`` if given.

        session: whose; a list names one for each row. explore, return_trace: as
        ``MicroLoRA.forward``. module may be left out where there is one.
        Raises ValueError, TypeError.
        """
        m = self._module(module)
        delta = self._forward(m, x, session, out)
        if explore is None and not return_trace:
            return delta
        sigma = checked_sigma("Sona.forward", explore)
        delta, trace = self._explorer.explore(delta, m.name, sigma)
        if not return_trace:
            return delta
        self._explorer.take(m.name)
        return delta, trace

    def _forward(self, m: Module, x: Any, session: Any, out: Any) -> Any:
        for _ in range(100):
            served = m.served
            try:
                if isinstance(session, list):
                    delta = m.forward_rows(x, session, out)
                else:
                    delta = m.forward(x, session, out)
            except IndexError:
                if m.served is served:
                    raise
                continue
            if m.served is served:  # else slots may have been freed, and given to others
                return delta
        raise RuntimeError("Sona.forward: expected to end between two consolidations")

    # ---- learning: at once ----------------------------------------------------

    def instant_adapt(
        self,
        x: Any,
        feedback: Feedback,
        module: str | None = None,
        session: Hashable = None,
        quality: float | None = None,
    ) -> AdaptResult:
        """One step of the session's fast adapter, from feedback on what it was served for x.

        quality in 0..1: what the sample counts for in consolidations; default that of the
        feedback, else 1. Raises TypeError, ValueError; then nothing has changed.
        """
        start = perf_counter()
        m = self._named.get(module) or self._module(module)
        q = 1.0
        if quality is not None or type(feedback) is not Feedback or feedback.quality is not None:
            q = _quality(feedback, quality)
        held, observe, why = None, False, ""
        step = m.step if feedback.quality is None else m.quality_step
        with m.lock:
            grad, outcome, norm = feedback.gradient, ops.NO_ADAPTER, 0.0
            if grad is None:
                grad, why = self._gradient(m, x, feedback, session)
            if grad is not None:
                rows = x.shape[0] if getattr(x, "ndim", 1) == 2 else 1
                observe = self._pending + rows <= self.config.max_pending_samples
                if observe and m.held_out.is_next():
                    held = m.held_out_target(x, grad, session)
                fast, outcome, norm = m.adapt(x, grad, session, step, observe)
            if feedback.quality is not None:
                m.rate(session, feedback.quality)
                if feedback.needs_trace:
                    self._explorer.take(m.name)
            applied = outcome in STEPPED
            counts = observe and outcome == ops.APPLIED
            if counts:
                m.held_out.seen += 1
                if held is not None:
                    m.held_out.add(*held)
                if m.mean_inputs:
                    fast.inputs += as_float32(x).reshape(-1, m.in_features).sum(0)
            elif grad is not None and not applied:
                why = ops.NO_ROWS if outcome == ops.NO_ADAPTER else ops.NOTES[outcome]
            with self._lock:
                self._instants += 1
                if not applied:
                    self._skipped[why] += 1
                else:
                    self._quality += q * rows
                    if counts:
                        fast.quality += q * rows
                        fast.pending += rows
                        self._pending += rows
                    else:
                        self._skipped[TOO_LARGE if observe else LEFT_OUT] += rows
                latency = (perf_counter() - start) * 1e6
                self._seconds += latency * 1e-6
        if log.isEnabledFor(logging.DEBUG):
            log.debug("instant: %s in %.1f us", "applied" if applied else why, latency)
        return _new(AdaptResult, (applied, why, latency, norm))

    def _gradient(
        self, m: Module, x: Any, feedback: Feedback, session: Hashable
    ) -> tuple[Any, str]:
        view: Any = _SessionView(m, session, self.config.micro_lora)
        if feedback.quality is None:
            return feedback.output_gradient(view, x, m.name), ""
        last = self._explorer.last(m.name) if feedback.needs_trace else None
        baseline = m.baselines.get(session)
        value = None if baseline is None else baseline.value
        return feedback.quality_gradient(view, x, m.name, value, last)

    # ---- learning: in the background -------------------------------------------

    def maybe_background(self) -> BackgroundResult | None:
        """The background pass, where it is due: the interval has passed and enough samples wait.

        None where it is not.
        """
        waited = (monotonic() - self._last_pass) * 1e3
        if waited < self.config.background_interval_ms:
            return None
        if self._pending < self.config.background_min_samples:
            log.debug("background: %d samples wait, fewer than wanted", self._pending)
            return None
        return self.background()

    def background(self) -> BackgroundResult:
        """Merges every session's fast adapter into the consolidated one, now.

        What is served changes in one step, and only where it is no worse than before on the
        samples held out; else everything stays, and the result says so. Where nothing waits
        nothing is counted.
        """
        with self._pass_lock:
            self._last_pass = monotonic()
            count = "background_failed"
            try:
                results = [background.consolidate(m, self.config) for m in self._modules.values()]
                done = background.together(results)
                count = "background" if done.applied else "background_rejected"
            finally:
                with self._lock:
                    if count == "background_failed" or done.samples_used:
                        self._counts[count] += 1
                    self._pending = self._waiting()
        log.debug("background: %s", done)
        return done

    def rollback(self) -> bool:
        """Brings back what was served before the last consolidation, once: False if none was."""
        with self._pass_lock:
            done = [background.rollback(m) for m in self._modules.values()]
            with self._lock:
                self._pending = self._waiting()
        log.debug("rollback: %s", done)
        return any(done)

    def _waiting(self) -> int:
        """Samples that no consolidation has seen, or that one saw which was rolled back."""
        return sum(fast.pending for m in self._modules.values() for fast in _adapters(m))

    def start(self) -> None:
        """Runs ``maybe_background`` in a thread, until ``stop``. RuntimeError if one runs."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after the pass that it is in."""
        self._thread.stop()

    # ---- learning: deeply --------------------------------------------------------

    def should_trigger_deep(self) -> bool:
        """Whether the summed quality of applied samples since the last deep run is enough."""
        return self._quality >= self.config.deep_trigger_threshold

    def deep_optimize(
        self, samples: Sequence[TrainingSample], module: str | None = None
    ) -> DeepResult:
        """Trains the consolidated adapter of a module toward the samples' output_embedding.

        Samples below ``quality_threshold`` are left out, the others count by their quality
        (L = mean of q/2 ‖delta - output_embedding‖²), EWC holds what is consolidated, and a
        fifth of them is held out: a result that is worse on those is dropped, and said so.
        Raises TypeError, ValueError (shapes, NaN, quality outside 0..1), before anything changes.
        """
        m = self._module(module)
        with self._pass_lock:
            result = deep.optimize(m, self.config, samples)
            if result.epochs:  # else nothing was trained
                with self._lock:
                    self._counts["deep" if result.applied else "deep_rejected"] += 1
                    self._quality = 0.0
        log.debug("deep: %s", result)
        return result

    # ---- what it did, what it holds -------------------------------------------------

    def stats(self) -> SonaStats:
        """Counts as they are now."""
        with self._lock:
            mean = self._seconds / self._instants * 1e6 if self._instants else 0.0
            return SonaStats(
                self._instants, mean, self._counts["background"],
                self._counts["background_rejected"], self._counts["background_failed"],
                self._counts["deep"], self._counts["deep_rejected"], self._pending, self._quality,
                dict(self._skipped), counters(),
            )  # fmt: skip

    def consolidated(self) -> MicroLoRA:
        """A copy of the consolidated adapters, to save or serve elsewhere."""
        lora = MicroLoRA(self.config.micro_lora)
        for name, m in self._modules.items():
            A, B, _ = m.pool.get(m.served.consolidated)
            lora.set_weights(name, A, B)
        return lora

    def save(self, folder: str | os.PathLike[str]) -> None:
        """The consolidated adapters as a PEFT folder, and in a file beside them all else that the
        next requests depend on: sessions' adapters with what they wait with, baselines, Fisher
        information, held-out samples, counters and the noise of exploration.

        The folder is replaced whole. What ``rollback`` would bring back is not in it. Raises
        ValueError, before anything is written, for a session named by anything but text, a
        whole number of 64 bits or None; OSError.
        """
        from lora_engine.learning import sona_state

        sona_state.save(self, folder)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Goes on where ``save`` was, to the same bits. Of a folder without the engine's file it
        serves the adapters as the consolidated ones, and sessions, held-out samples and counts
        begin anew; so it does, with a warning, where that file belongs to other weights.

        Raises FormatError naming file and key, and ValueError where modules, shapes or rank, or
        the configuration that the state is of, are others than the config's; then nothing has
        changed.
        """
        from lora_engine.learning import sona_state

        sona_state.load(self, folder)


def _adapters(m: Module) -> list[Fast]:
    return [*m.served.fast.values(), *m.served.frozen.values()]


def _quality(feedback: Any, quality: Any) -> float:
    """What a sample counts for; raises TypeError, ValueError."""
    if not isinstance(feedback, Feedback):
        got = type(feedback).__name__
        raise TypeError(f"Sona.instant_adapt: feedback: expected a Feedback, got {got}")
    if quality is None:
        rated = feedback.quality
        return 1.0 if rated is None else float(rated.mean()) if len(rated) else 0.0
    try:
        q = float(quality)
    except (TypeError, ValueError):
        raise TypeError(
            f"Sona.instant_adapt: quality: expected a number, got {quality!r}"
        ) from None
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"Sona.instant_adapt: quality: expected a number in 0..1, got {q}")
    return q
