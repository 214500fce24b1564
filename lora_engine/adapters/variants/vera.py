"""VeRA: adapters that are two vectors over shared, frozen random matrices."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_engine import ops
from lora_engine.adapters.adapter import Adapter, LoraWeights
from lora_engine.adapters.micro_lora import AdaptResult

Array = NDArray[np.float32]


class VeraVectors(NamedTuple):
    """A module's own: b [out], d [r], float32, and its number of inputs."""

    b: Array
    d: Array
    in_features: int


def projections(rank: int, in_features: int, out_features: int, key: int = 0) -> tuple[Any, Any]:
    """A [rank, in] and B [out, rank], Kaiming-uniform, as PEFT draws them from
    ``projection_prng_key`` (with torch's generator: needs torch)."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(key)
    drawn = []
    for rows, columns in ((rank, in_features), (out_features, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        drawn.append(torch.empty(rows, columns).uniform_(-bound, bound, generator=generator))
    return drawn[0].numpy(), drawn[1].numpy()


def _rows(op: str, name: str, value: Any, width: int) -> NDArray[np.float32]:
    """A vector or matrix of NumPy or torch as float32 [n, width]."""
    if not isinstance(value, np.ndarray) and hasattr(value, "detach"):
        value = value.detach().float().cpu().numpy()
    rows = np.atleast_2d(np.asarray(value, np.float32))
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{op}: {name}: expected shape [n, {width}], got {list(np.shape(value))}")
    return rows


class Vera:
    """The delta of a row x is b ∘ (B (d ∘ (A x))) (Kopiczko et al. 2024, arXiv:2310.11454, eq. 2).

    A [r, in], B [out, r] are shared by all modules and frozen; a module that is smaller takes
    A's first columns and B's first rows. Trained are b [out] and d [r] of each module: out + r
    numbers where LoRA has r (in + out).

    shapes: {module: (in, out)}. A, B: default ``projections`` of the largest sizes. d starts at
    d_initial, b at zero: a fresh adapter changes nothing. Raises ValueError.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int = 256,
        *,
        d_initial: float = 0.1,
        projection_prng_key: int = 0,
        A: Any = None,
        B: Any = None,
    ) -> None:
        if not shapes or rank < 1:
            raise ValueError(
                f"Vera: expected modules and a rank of at least 1, got {shapes}, {rank}"
            )
        if (A is None) != (B is None):
            raise ValueError("Vera: A, B: expected both or neither, got one")
        largest = (max(s[0] for s in shapes.values()), max(s[1] for s in shapes.values()))
        if A is None:
            A, B = projections(rank, *largest, projection_prng_key)
        self.A = np.array(A, np.float32)
        self.B = np.array(B, np.float32)
        for name, matrix, rows, columns in (
            ("A", self.A, rank, largest[0]),
            ("B", self.B, largest[1], rank),
        ):
            fits = matrix.ndim == 2 and matrix.shape[0] >= rows and matrix.shape[1] >= columns
            if not fits or not np.isfinite(matrix).all():
                raise ValueError(
                    f"Vera: {name}: expected finite numbers of at least [{rows}, {columns}],"
                    f" got {list(matrix.shape)}"
                )
        self.rank = rank
        self.d_initial = float(d_initial)
        self.projection_prng_key = projection_prng_key
        self.peft_config: dict[str, Any] = {}
        self.modules = {
            name: VeraVectors(np.zeros(n_out, np.float32), np.full(rank, d_initial, "f4"), n_in)
            for name, (n_in, n_out) in shapes.items()
        }

    def _module(self, name: str) -> VeraVectors:
        if name not in self.modules:
            known = ", ".join(self.modules)
            raise ValueError(f"Vera: module: expected one of {known}, got {name!r}")
        return self.modules[name]

    def _shared(self, v: VeraVectors) -> tuple[Array, Array]:
        return self.A[: self.rank, : v.in_features], self.B[: len(v.b), : self.rank]

    def weights(self, module: str) -> tuple[Array, Array, float]:
        """The same delta as LoRA: (diag(d) A [r, in], diag(b) B [out, r], 1), for a pool's slot."""
        v = self._module(module)
        A, B = self._shared(v)
        return v.d[:, None] * A, v.b[:, None] * B, 1.0

    def to_adapter(self) -> Adapter:
        """The same deltas as a LoRA adapter, to attach, merge or save as one."""
        return Adapter({name: LoraWeights(*self.weights(name)) for name in self.modules})

    def set_vectors(self, module: str, b: Any, d: Any) -> None:
        """Replaces a module's b [out] and d [r]. Raises ValueError."""
        v = self._module(module)
        new = np.array(b, np.float32), np.array(d, np.float32)
        for name, got, want in (("b", new[0], v.b), ("d", new[1], v.d)):
            if got.shape != want.shape or not np.isfinite(got).all():
                raise ValueError(
                    f"Vera.set_vectors: {name}: expected finite numbers of shape {want.shape},"
                    f" got {got.shape}"
                )
        self.modules[module] = VeraVectors(*new, v.in_features)

    def forward(self, x: Any, module: str, out: Any = None) -> Any:
        """The delta of a module, [out] or [n, out], in ``out`` if given.

        Products of NumPy or torch in float32, as ``weights`` would be copies of A and B; so the
        last bits of a row may depend on its batch. Raises as ``lora_delta``.
        """
        v = self._module(module)
        A, B = self._shared(v)
        b, d = v.b, v.d
        if isinstance(x, np.ndarray):
            y = ops.lora_delta(x, A[:0], B[:, :0], 1.0, out)  # checks both; zeros
            y[...] = ((x @ A.T) * d) @ B.T * b
            return y
        import torch

        A, B, b, d = (torch.from_numpy(m).to(x.device) for m in (A, B, b, d))  # type: ignore[assignment]
        y = ops.lora_delta(x, A[:0], B[:, :0], 1.0, out)
        return y.copy_(((x.float() @ A.T) * d) @ B.T * b)

    def gradient(self, x: Any, grad: Any, module: str) -> tuple[Array, Array]:
        """(dL/db [out], dL/dd [r]), means over the rows; x [n, in], grad = dL/dy [n, out].

        With z = A x and u = B (d ∘ z): dL/db = grad ∘ u, dL/dd = z ∘ (Bᵀ (b ∘ grad)).
        """
        v = self._module(module)
        A, B = self._shared(v)
        rows = _rows("Vera.gradient", "x", x, v.in_features)
        upstream = _rows("Vera.gradient", "grad", grad, len(v.b))
        if len(rows) != len(upstream):
            raise ValueError(
                f"Vera.gradient: grad: expected {len(rows)} rows as x, got {len(upstream)}"
            )
        z = rows @ A.T
        n = max(len(rows), 1)
        g_b = np.einsum("no,no->o", upstream, (z * v.d) @ B.T) / n
        g_d = np.einsum("nr,nr->r", z, (upstream * v.b) @ B) / n
        return g_b.astype(np.float32), g_d.astype(np.float32)

    def adapt(self, x: Any, grad: Any, module: str, lr: float) -> AdaptResult:
        """One step down the mean gradient of b and d, both from the values before it.

        A step with NaN or Inf changes nothing, and the result says so.
        """
        start = perf_counter()
        g_b, g_d = self.gradient(x, grad, module)
        v = self.modules[module]
        b, d = v.b - np.float32(lr) * g_b, v.d - np.float32(lr) * g_d
        norm = math.sqrt(float(g_b @ g_b) + float(g_d @ g_d))
        if np.size(x) == 0:
            outcome = ops.NO_ADAPTER
        else:
            finite = np.isfinite(b).all() and np.isfinite(d).all()
            outcome = ops.APPLIED if finite else ops.NOT_FINITE
        if outcome == ops.APPLIED:
            self.modules[module] = VeraVectors(b, d, v.in_features)
        latency = (perf_counter() - start) * 1e6
        return AdaptResult(outcome == ops.APPLIED, ops.NOTES[outcome], latency, norm)

    def save(self, folder: str | os.PathLike[str], save_projection: bool = True) -> None:
        """A VeRA folder that PEFT loads; without the projections, A and B have to be those of
        ``projection_prng_key``. Replaced whole. Raises ValueError, OSError."""
        from lora_engine.adapters.variants.vera_format import save

        save(folder, self, save_projection)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        in_features: int | Mapping[str, int] | None = None,
    ) -> Vera:
        """A folder that ``save`` or PEFT wrote.

        in_features: of the modules, {module: in} where they differ; the files do not hold it.
        Default: that of A in the file. Needed where the file lacks A and B.
        Raises FormatError naming file and key, FileNotFoundError, ValueError.
        """
        from lora_engine.adapters.variants.vera_format import load

        return load(folder, in_features)
