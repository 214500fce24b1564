"""Router: which adapters a row takes, and how much of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_engine.adapters.pool import AdapterPool
from lora_engine.adapters.singular_directions import SingularDirections
from lora_engine.safetensors_file import is_torch, short

F64 = NDArray[np.float64]

_WORDS = re.compile(r"[^\W_]\w*")
_NATS_A_KEYWORD = 0.5


class RouteResult(NamedTuple):
    """ids int32 [n, k], weights float32 [n, k] for a pool's mixtures: of each row the likeliest
    first, weights summing to 1; -1 and 0 where there is none. names: the same by name, None for
    none. note: which rows took the base for want of evidence, and why."""

    ids: Any
    weights: Any
    names: list[list[str | None]]
    note: str


class _Route(NamedTuple):
    slot: int
    prototypes: F64 | None  # [p, width], of length 1
    centre: F64 | None  # [width], of length 1
    keywords: frozenset[str]
    arrow: bool


class Router:
    """Chooses for each row the top_k of its adapters, by what a row is near to.

    The evidence for an adapter is, in nats, the sum of

    - prototypes: its embeddings c_j, examples of what it is for. (cos(x, mean c) + tau log mean_j
      exp(cos(x, c_j) / tau)) / (2 tau): halfway between the nearest centroid and a mixture of
      von Mises-Fisher densities with concentration 1 / tau (Banerjee et al. 2005, eq. 4);
    - its own weights, with a pool and a slot: |cos(x, v)| / tau, v the right singular vector of
      ΔW with the largest singular value, the direction that it changes most (Arrow: Ostapenko et
      al. 2024, section 4.1), computed anew when ``pool.version`` has changed. x is then what the
      pool is given. An adapter whose delta is zero has none;
    - keywords: half a nat for each that is among the words of the row's text.

    Where others have a kind of evidence and an adapter lacks it, it has their mean. Weights are
    the softmax of the evidence over the top_k. A row without any evidence takes the base.

    temperature: tau. Defaults are from ``python -m bench.router``.
    """

    def __init__(
        self, top_k: int = 2, *, pool: AdapterPool | None = None, temperature: float = 0.05
    ) -> None:
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"Router: top_k: expected at least 1, got {top_k!r}")
        if not 0.0 < temperature < np.inf:
            raise ValueError(f"Router: temperature: expected more than 0, got {temperature!r}")
        if not isinstance(pool, (AdapterPool, type(None))):
            raise TypeError(f"Router: pool: expected an AdapterPool, got {type(pool).__name__}")
        self.top_k, self.temperature = top_k, float(temperature)
        self._directions = None if pool is None else SingularDirections(pool)
        self._width = None if pool is None else pool.in_features
        self._routes: dict[str, _Route] = {}

    def __len__(self) -> int:
        return len(self._routes)

    # ---- adapters ----

    def add(
        self,
        name: str,
        prototypes: Any = None,
        keywords: Iterable[str] = (),
        slot: int = -1,
    ) -> None:
        """Another adapter to route to.

        prototypes [p, width] or [width]: embeddings, of any length but 0. keywords: single
        words, compared without case. slot: what ``ids`` hold for it, -1: the base; whose adapter
        leaves it (``pool.remove``, an eviction by an AdapterStore) is to be removed here first, as
        a slot that is issued again is another's. With the router's pool, a slot is routed to by
        its weights too. Raises ValueError (a name twice, shape, range, NaN, no word), TypeError,
        IndexError (a slot not in use).
        """
        if not isinstance(name, str):
            raise TypeError(f"Router.add: name: expected text, got {type(name).__name__}")
        if name in self._routes:
            raise ValueError(f"Router.add: name: expected a new one, got {short(name)!r} again")
        if isinstance(keywords, str):
            raise TypeError("Router.add: keywords: expected several words, got text")
        if isinstance(slot, bool) or not hasattr(slot, "__index__"):
            raise TypeError(f"Router.add: slot: expected a whole number, got {slot!r}")
        if not -1 <= slot < 2**31:
            raise ValueError(f"Router.add: slot: expected -1 or a slot, got {slot}")
        words = [_word(keyword) for keyword in keywords]
        given = centre = None
        if prototypes is not None:
            rows = self._rows("Router.add: prototypes", prototypes)
            given, good = _directions(rows)
            if not len(rows) or not good.all():
                raise ValueError(
                    "Router.add: prototypes: expected finite rows that are not zero, got"
                    f" {len(rows)} rows of which {np.count_nonzero(~good)} are not"
                )
            (centre,), (centred,) = _directions(given.mean(axis=0, keepdims=True))
            if not centred:  # opposite ones: it is near to nothing
                centre = np.zeros_like(centre)
        arrow = self._directions is not None and slot >= 0
        if self._directions is not None and arrow:
            self._directions.of(slot)  # raises IndexError
        if given is not None:
            self._width = given.shape[1]
        self._routes[name] = _Route(int(slot), given, centre, frozenset(words), arrow)

    def remove(self, name: str) -> None:
        """Routes to it no more. Raises ValueError for a name that is not there."""
        if name not in self._routes:
            known = ", ".join(self._routes) or "none"
            raise ValueError(
                f"Router.remove: name: expected one of {short(known)}, got {short(repr(name))}"
            )
        del self._routes[name]

    def _rows(self, where: str, array: Any) -> F64:
        """[n, width] in float64. Raises ValueError, TypeError."""
        host = array.detach().float().cpu().numpy() if is_torch(array) else np.asarray(array)
        if host.dtype.kind not in "fiu":
            raise TypeError(f"{where}: expected numbers, got {host.dtype}")
        rows = np.atleast_2d(host.astype(np.float64))
        width = "width" if self._width is None else self._width
        if rows.ndim != 2 or self._width not in (None, rows.shape[1]):
            raise ValueError(f"{where}: expected shape [n, {width}], got {list(host.shape)}")
        return rows

    # ---- rows ----

    def route(self, embeddings: Any, texts: Sequence[str] | None = None) -> RouteResult:
        """Adapters and weights of each row: ``pool.forward(x, r.ids, r.weights)``.

        embeddings [n, width] or [width], NumPy or torch (ids and weights are then tensors beside
        them), in the space of the prototypes; texts: the rows' texts, for keywords. A row takes
        the base (-1) where nothing speaks for any adapter, or its embedding holds NaN or Inf.
        Raises ValueError (shape), TypeError, IndexError (a slot that was removed).
        """
        rows = self._rows("Router.route: embeddings", embeddings)
        n = len(rows)
        if isinstance(texts, str) or (texts is not None and len(texts) != n):
            got = "text" if isinstance(texts, str) else f"{len(texts)}"
            raise ValueError(f"Router.route: texts: expected {n}, one a row, got {got}")
        names = [*self._routes]
        finite = np.isfinite(rows).all(axis=1)
        evidence, found = self._evidence(rows, texts)
        found &= finite
        k = min(self.top_k, len(names))
        order = np.argsort(-evidence, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(evidence, order, axis=1)
        parts = np.exp(best - best[:, :1])
        weights = np.zeros((n, self.top_k), np.float32)
        ids = np.full((n, self.top_k), -1, np.int32)
        slots = np.array([route.slot for route in self._routes.values()], np.int32)
        if k:
            weights[found, :k] = (parts / parts.sum(axis=1, keepdims=True))[found]
            ids[found, :k] = slots[order[found]]
        chosen: list[list[str | None]] = [
            [names[j] for j in row] + [None] * (self.top_k - k) if here else [None] * self.top_k
            for row, here in zip(order.tolist(), found.tolist(), strict=True)
        ]
        note = self._note(finite, found)
        if is_torch(embeddings):
            import torch

            device = embeddings.device
            return RouteResult(
                torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device), chosen, note
            )
        return RouteResult(ids, weights, chosen, note)

    def _note(self, finite: Any, found: Any) -> str:
        if not self._routes:
            return "there is no adapter to route to: all rows take the base"
        broken = int(np.count_nonzero(~finite))
        idle = int(np.count_nonzero(finite & ~found))
        parts = [
            f"{broken} rows whose embedding holds NaN or Inf take the base" if broken else "",
            f"{idle} rows that nothing speaks for take the base" if idle else "",
        ]
        return "; ".join(part for part in parts if part)

    # ---- evidence ----

    def _evidence(self, rows: F64, texts: Sequence[str] | None) -> tuple[F64, NDArray[np.bool_]]:
        """(nats [n, adapters], rows that have any)."""
        routes = [*self._routes.values()]
        total = np.zeros((len(rows), len(routes)))
        found = np.zeros(len(rows), bool)
        directions, good = _directions(rows)
        near = [self._nearness(route, directions) for route in routes]
        along = self._alignment(routes, directions)
        for kind in (near, along):
            there = {j: values for j, values in enumerate(kind) if values is not None}
            if there:
                scores = np.stack([*there.values()], axis=1)
                mean = scores.mean(axis=1, keepdims=True)
                total += mean
                total[:, [*there]] += scores - mean
                found |= good
        if texts is not None and any(route.keywords for route in routes):
            hits = np.array([_hits(text, routes) for text in texts]).reshape(total.shape)
            total += _NATS_A_KEYWORD * hits
            found |= hits.any(axis=1)
        return total, found

    def _nearness(self, route: _Route, directions: F64) -> F64 | None:
        if route.prototypes is None or route.centre is None:
            return None
        cosines = directions @ route.prototypes.T / self.temperature
        most = cosines.max(axis=1, keepdims=True)
        mixture = most[:, 0] + np.log(np.exp(cosines - most).mean(axis=1))
        nearness: F64 = (mixture + directions @ route.centre / self.temperature) / 2.0
        return nearness

    def _alignment(self, routes: list[_Route], directions: F64) -> list[F64 | None]:
        if self._directions is None:
            return []
        found: list[F64 | None] = []
        for route in routes:
            v = self._directions.of(route.slot) if route.arrow else None
            found.append(None if v is None else np.abs(directions @ v) / self.temperature)
        return found


def _word(keyword: Any) -> str:
    if not isinstance(keyword, str):
        raise TypeError(f"Router.add: keywords: expected text, got {type(keyword).__name__}")
    word = keyword.casefold()
    if not _WORDS.fullmatch(word):
        raise ValueError(f"Router.add: keywords: expected single words, got {short(repr(keyword))}")
    return word


def _hits(text: Any, routes: list[_Route]) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"Router.route: texts: expected text, got {type(text).__name__}")
    words = frozenset(_WORDS.findall(text.casefold()))
    return [len(words & route.keywords) for route in routes]


def _directions(rows: F64) -> tuple[F64, NDArray[np.bool_]]:
    """(rows of length 1, which of them are so); zeros for zero, NaN or Inf."""
    finite = np.isfinite(rows).all(axis=1, keepdims=True)
    kept = np.where(finite, rows, 0.0)
    largest = np.abs(kept).max(axis=1, initial=0.0, keepdims=True)
    scaled = np.divide(kept, largest, out=np.zeros_like(kept), where=largest > 0)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    unit = np.divide(scaled, length, out=np.zeros_like(scaled), where=length > 0)
    return unit, np.ravel(length) > 0
