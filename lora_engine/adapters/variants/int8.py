"""Int8LoRA: an adapter kept in a quarter of the bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_engine import ops

Bytes = NDArray[np.int8]
Floats = NDArray[np.float32]


def _quantized(rows: Any, name: str) -> tuple[Bytes, Floats]:
    """int8 [r, n] and scales [r]: round(row / scale), scale = max|row| / 127."""
    values = np.asarray(rows, np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"Int8LoRA: {name}: expected a finite matrix, got {values.shape}")
    scales = np.abs(values).max(axis=1, initial=0) / np.float32(127)
    divisor = np.where(scales > 0, scales, np.float32(1))
    return np.rint(values / divisor[:, None]).astype(np.int8), scales


class Int8LoRA(NamedTuple):
    """A and B in int8 with a float32 scale a direction: absmax quantisation, symmetric
    (as Dettmers et al. 2022, arXiv:2208.07339, by rows).

    A [r, in], A_scales [r]; B as Bᵀ [r, out], B_scales [r]. Each element is off by at most half
    its row's scale, e_A = A_scales / 2, so an element of the delta's matrix by at most
    |s| sum_k (|B_ik| e_Ak + e_Bk |A_kj| + e_Bk e_Ak). It serves; to learn, dequantize.
    """

    A: Bytes
    A_scales: Floats
    B: Bytes
    B_scales: Floats
    scaling: float

    @classmethod
    def from_weights(cls, A: Any, B: Any, scaling: float) -> Int8LoRA:
        """Of A [r, in], B [out, r]. Raises ValueError (shapes, NaN or Inf)."""
        a, b = _quantized(A, "A"), _quantized(np.asarray(B).T, "B")
        if len(a[0]) != len(b[0]):
            raise ValueError(
                f"Int8LoRA: B: expected shape [out, {len(a[0])}], got [out, {len(b[0])}]"
            )
        return cls(*a, *b, float(scaling))

    @property
    def nbytes(self) -> int:
        """r (in + out + 8)."""
        return self.A.nbytes + self.B.nbytes + self.A_scales.nbytes + self.B_scales.nbytes

    def dequantize(self) -> tuple[Floats, Floats, float]:
        """(A [r, in], B [out, r], scaling), float32, as ``AdapterPool.add`` takes them."""
        return (
            self.A_scales[:, None] * self.A.astype(np.float32),
            (self.B_scales[:, None] * self.B.astype(np.float32)).T,
            self.scaling,
        )

    def forward(self, x: Any, out: Any = None, accumulate: bool = False) -> Any:
        """``lora_delta`` with the dequantised weights, which are made for the call."""
        A, B, scaling = self.dequantize()
        if not isinstance(x, np.ndarray):
            import torch

            A, B = (torch.from_numpy(m).to(x.device) for m in (A, B))  # type: ignore[assignment]
        return ops.lora_delta(x, A, B, scaling, out, accumulate)
