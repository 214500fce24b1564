"""NF4Linear: a linear layer of a torch model whose weight stays in 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lora_engine.errors import FormatError
from lora_engine.quant import checkpoint
from lora_engine.quant.nf4 import NF4Tensor

Tensor = torch.Tensor
_COMPUTE = (None, "float32", "bfloat16")


def check_compute(op: str, compute: Any) -> None:
    """Raises ValueError."""
    if compute not in _COMPUTE:
        raise ValueError(f"{op}: compute: expected one of {_COMPUTE}, got {compute!r}")


class NF4Linear(torch.nn.Linear):
    """y = x dequant(W)ᵀ + bias (QLoRA: Dettmers et al. 2023, eq. 5), as ``ops.nf4_linear`` has it.

    x [..., in] float32, bfloat16 or float16 -> y [..., out] of x's dtype; differentiable in x and
    bias, from the packed weight. compute: "float32", "bfloat16", or None for x's own dtype
    (float32 for float16). Under autocast x is cast first, as for nn.Linear.

    A torch.nn.Linear to those who ask, so that PEFT takes it as a base layer; but ``weight`` is
    uint8 [bytes, 1], frozen.

    ``nf4`` is the matrix, which borrows ``weight``: it stays in the host's memory whatever the
    module is moved to (a GPU gets a copy at first use), and no cast touches it. The state dict has
    bitsandbytes' keys and bytes, and takes them back, of the same sizes but any block size.
    """

    nf4: NF4Tensor
    compute: str | None

    def __init__(self, nf4: NF4Tensor, bias: Tensor | None = None, compute: str | None = None):
        """nf4 [out, in], of which bytes are copied; bias [out]. Raises TypeError, ValueError."""
        if not isinstance(nf4, NF4Tensor):
            raise TypeError(f"NF4Linear: nf4: expected an NF4Tensor, got {type(nf4).__name__}")
        parts = nf4.to_bitsandbytes("weight")
        self._build({k: torch.as_tensor(_own(v)) for k, v in parts.items()}, bias, compute)

    def _build(self, parts: Mapping[str, Tensor], bias: Tensor | None, compute: Any) -> None:
        check_compute("NF4Linear", compute)
        nf4 = NF4Tensor.from_bitsandbytes(parts, "weight")
        if bias is not None and tuple(bias.shape) != nf4.shape[:1]:
            want, got = [nf4.shape[0]], list(bias.shape)
            raise ValueError(f"NF4Linear: bias: expected shape {want}, got {got}")
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = nf4.shape
        self.compute = compute
        self._hold(nf4, parts)
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_parameter("bias", bias)

    def _hold(self, nf4: NF4Tensor, parts: Mapping[str, Tensor]) -> None:
        self.nf4 = nf4
        nf4.handle  # noqa: B018  made here, not while forward is traced
        stored = parts["weight"].detach()
        self.weight = torch.nn.Parameter(stored, requires_grad=False)
        self._beside = {k: t for k, t in parts.items() if k != "weight"}

    # ---- how it is made ----

    @classmethod
    def from_linear(
        cls,
        layer: torch.nn.Module,
        blocksize: int = 64,
        double_quant: bool = False,
        compute: str | None = None,
    ) -> NF4Linear:
        """Packs a torch.nn.Linear, or transformers' Conv1D, whose weight is [in, out].

        The bias is the layer's own Parameter. Raises TypeError, ValueError, as ``nf4_quantize``.
        """
        weight = layer.weight
        assert isinstance(weight, Tensor)
        turned = not isinstance(layer, torch.nn.Linear)
        W = weight.detach().t() if turned else weight.detach()
        made = cls(NF4Tensor.from_float(W, blocksize, double_quant), layer.bias, compute)  # type: ignore[arg-type]
        return made.train(layer.training)

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], bias: Tensor | None = None, compute: str | None = None
    ) -> NF4Linear:
        """Of the tensors that bitsandbytes saves under "weight": on the CPU, borrowed."""
        made = cls.__new__(cls)
        made._build(parts, bias, compute)
        return made

    # ---- what a module does ----

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] of any dtype that the ops take; [..., out] in x's dtype. Raises what
        ``nf4_linear`` does."""
        return self.with_deltas(input)

    def with_deltas(
        self,
        x: Tensor,
        pool: Tensor | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """y, and with a pool's handle each row's delta in the same pass (``ops.nf4_linear``)."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = torch.ops.lora_engine.nf4_linear(
            x, self.nf4.handle, self.bias, pool, ids, weights, self.compute
        )
        return y

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NF4Linear:
        packed = self._parameters["weight"]
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = packed
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._beside.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        names = [name + suffix for suffix in checkpoint.ALL]
        rest = {k: v for k, v in state_dict.items() if k not in names}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [k for k in missing if k != name or name not in state_dict]
        if name not in state_dict:
            return
        borrowed = bool(local_metadata.get("assign_to_params_buffers"))
        try:
            parts = {
                k.removeprefix(prefix): t if borrowed else t.detach().cpu().clone()
                for k in names
                if (t := state_dict.get(k)) is not None
            }
            nf4 = NF4Tensor.from_bitsandbytes(parts, "weight")
        except (FormatError, TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}: {error}")
            return
        if nf4.shape != self.nf4.shape:
            error_msgs.append(
                f"{name}: expected a packed matrix {list(self.nf4.shape)}, got {list(nf4.shape)}"
            )
            return
        self._hold(nf4, parts)

    def extra_repr(self) -> str:
        """Sizes, block size and where they are, for ``print(model)``."""
        nf4 = self.nf4
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, blocksize={nf4.blocksize},"
            f" double_quant={nf4.double_quant}, compute={self.compute!r}"
        )


def _own(array: Any) -> Any:
    """A NumPy array as one that torch may take; a tensor as it is."""
    return array if isinstance(array, Tensor) else array.copy()
