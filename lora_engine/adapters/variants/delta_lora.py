"""Delta-LoRA: the base's weights follow the change of B A."""

from __future__ import annotations

from typing import Any

import numpy as np

_BLOCK = 1 << 20  # elements of W's change that are made at a time


def delta_lora(W: Any, before: Any, after: Any, ratio: float = 1.0) -> None:
    """W += ratio (s' B' A' - s B A), in place (Delta-LoRA: Zi et al. 2023, arXiv:2309.02411, with
    lambda = ratio): the base weights learn too, without a gradient or a state of their own.

    W [out, in], a NumPy array or torch tensor, float32 (tensors: of any float dtype). before,
    after: (A [r, in], B [out, r], scaling), as ``AdapterPool.get`` and ``MicroLoRA.weights``
    give them around a step; ranks may differ. The adapter's delta stays on top of W, as in the
    paper, so the model's output moves by (1 + ratio) times the delta's change. Written in blocks
    of rows. Raises ValueError (shapes; NaN or Inf in ratio, before or after), TypeError (dtype);
    then W is as it was.
    """
    numpy = isinstance(W, np.ndarray)
    if not numpy and not getattr(W, "is_floating_point", lambda: False)():
        raise TypeError(f"delta_lora: W: expected a float matrix, got {type(W).__name__}")
    if numpy and W.dtype != np.float32:
        raise TypeError(f"delta_lora: W: expected float32, got {W.dtype}")
    if numpy and not W.flags.writeable:
        raise ValueError("delta_lora: W: expected a writeable array, got a read-only one")
    if not np.isfinite(ratio):
        raise ValueError(f"delta_lora: ratio: expected a finite number, got {ratio!r}")
    for name, (A, B, _) in (("before", before), ("after", after)):
        if (B.shape[0], A.shape[1]) != tuple(W.shape) or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"delta_lora: {name}: expected A [r, in] and B [out, r] of W {tuple(W.shape)},"
                f" got {tuple(A.shape)} and {tuple(B.shape)}"
            )
    for name, w in (("before", before), ("after", after)):
        if not (np.isfinite(w[0]).all() and np.isfinite(w[1]).all() and np.isfinite(w[2])):
            raise ValueError(f"delta_lora: {name}: expected finite numbers, got NaN or Inf")
    A = np.concatenate([after[0], before[0]]).astype(np.float32)
    scales = np.float32(ratio * after[2]), np.float32(-ratio * before[2])
    B = np.concatenate([scales[0] * after[1], scales[1] * before[1]], axis=1).astype(np.float32)
    step = max(_BLOCK // max(W.shape[1], 1), 1)
    if not numpy:
        import torch

        W, A = W.detach(), torch.from_numpy(A).to(W.device)
        B = torch.from_numpy(B).to(W.device)
    for first in range(0, W.shape[0], step):
        rows = slice(first, first + step)
        W[rows] += B[rows] @ A
