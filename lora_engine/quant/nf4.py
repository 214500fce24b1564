"""NF4Tensor: a matrix in 4 bits a weight, as bitsandbytes stores it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_engine import handles
from lora_engine.backends import backend_of, chosen
from lora_engine.quant import checkpoint
from lora_engine.quant.checkpoint import Parts, State
from lora_engine.safetensors_file import (
    is_torch,
    open_file,
    raw_of,
    read_header,
    read_tensor,
    to_numpy,
    to_torch,
    update_file,
)


def _check_name(op: str, name: Any) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"{op}: name: expected the name of a tensor, got {name!r}")


class NF4Tensor:
    """A matrix [rows, cols] of 4-bit NormalFloats (QLoRA: Dettmers et al. 2023, section 3).

    The flat matrix is cut into blocks, which cross rows where cols is no multiple;
    each holds 4-bit codes and its largest magnitude (absmax), in float32 or, with
    double quantisation, in 8 bits. Made by ``from_float``, ``from_bitsandbytes``
    or ``load``; immutable. Any sizes from 1 x 1 on; an empty matrix is refused.
    """

    __slots__ = ("__weakref__", "_handle", "_parts", "_state", "_storages", "_torch")

    def __init__(self, parts: Parts, state: State, torch: bool) -> None:
        self._parts, self._state, self._torch = parts, state, torch
        self._storages: dict[Any, Any] = {}
        self._handle: Any = None
        self.storage(chosen())  # refuses what does not fit

    def storage(self, backend: Any) -> Any:
        """The matrix as that backend computes with it."""
        held = self._storages.get(backend)
        if held is None:
            held = self._storages[backend] = self._made_for(backend)
        return held

    def _made_for(self, backend: Any) -> Any:
        parts, state = self._parts, self._state
        values = {s: checkpoint.numbers(parts[s]) for s in parts if s != checkpoint.WEIGHT}
        return backend.Nf4(
            parts[checkpoint.WEIGHT].data,
            state.rows,
            state.cols,
            state.blocksize,
            values[checkpoint.ABSMAX],
            values.get(checkpoint.NESTED_ABSMAX),
            values.get(checkpoint.NESTED_MAP),
            0 if state.nested_offset is None else checkpoint.NESTED_BLOCK,
            state.nested_offset or 0.0,
        )

    # ---- to and from floats ----

    @classmethod
    def from_float(cls, W: Any, blocksize: int = 64, double_quant: bool = False) -> NF4Tensor:
        """Packs W [rows, cols], float32, bfloat16 or float16, in any layout.

        blocksize: a power of two from 32 to 4096. double_quant: absmax in 8 bits.
        Raises TypeError (dtype), ValueError (shape, blocksize, NaN or Inf in W).
        """
        if not checkpoint.is_blocksize(blocksize):
            raise ValueError(
                "nf4_quantize: blocksize: expected a power of two from 32 to 4096,"
                f" got {blocksize!r}"
            )
        tensor = is_torch(W)
        if not tensor and not isinstance(W, np.ndarray):
            got = type(W).__name__
            raise TypeError(f"nf4_quantize: W: expected a NumPy array or a torch tensor, got {got}")
        shape = tuple(W.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                "nf4_quantize: W: expected a matrix of at least one row and one column,"
                f" got shape {shape}"
            )
        packed, absmax = backend_of(W).nf4_encode(W.detach() if tensor else W, blocksize)
        dtype = str(W.dtype).removeprefix("torch.")
        state = State(shape[0], shape[1], blocksize, dtype, nested_offset=None)
        return cls(*checkpoint.make_parts(packed, absmax, state, double_quant), tensor)

    def to_float(self, dtype: Any = np.float32, out: Any = None) -> Any:
        """The matrix [rows, cols]: code times absmax in float32, rounded once to the dtype.

        dtype: of NumPy or of torch (then the result is a tensor): float32, bfloat16
        or float16. out: written instead, in its own dtype. Raises TypeError, ValueError.
        """
        if out is None:
            if type(dtype).__module__ == "torch":
                import torch

                out = torch.empty(self.shape, dtype=dtype)
            else:
                out = np.empty(self.shape, dtype)
        backend = backend_of(out)
        backend.nf4_decode(self.storage(backend), out)
        return out

    # ---- bitsandbytes' keys ----

    @classmethod
    def from_bitsandbytes(cls, tensors: Any, name: str) -> NF4Tensor:
        """The matrix that bitsandbytes saved under ``name`` ("model.q_proj.weight").

        tensors: a mapping of names to NumPy arrays or CPU tensors, such as a state_dict. Contiguous
        ones are borrowed, not copied: whoever changes them later changes this matrix.
        Raises FormatError naming the key, TypeError, ValueError (device).
        """
        source = "from_bitsandbytes"
        _check_name(source, name)
        if not isinstance(tensors, Mapping):
            got = type(tensors).__name__
            raise TypeError(f"{source}: tensors: expected a mapping of names, got {got}")
        found = checkpoint.present(tensors, name, source)
        parts = {s: raw_of(tensors[name + s], f"{source}: {name}{s}") for s in found}
        where = f"{source}: {name}{checkpoint.STATE}"
        checkpoint.check_state_size(parts[checkpoint.STATE], where)
        state = checkpoint.read_state(parts[checkpoint.STATE].data.tobytes(), where)
        checkpoint.check_layout(parts, state, source, name)
        checkpoint.check_values(parts, state, source, name)
        return cls(parts, state, any(is_torch(tensors[name + s]) for s in found))

    def to_bitsandbytes(self, name: str) -> dict[str, Any]:
        """What bitsandbytes saves under ``name``: byte for byte what was read.

        Copies as torch tensors if the matrix was made from tensors or is stored as
        bfloat16, which NumPy lacks; else read-only NumPy arrays.
        """
        _check_name("to_bitsandbytes", name)
        lacking = self._parts[checkpoint.WEIGHT].dtype == "BF16"
        convert = to_torch if self._torch or lacking else to_numpy
        return {name + suffix: convert(raw) for suffix, raw in self._parts.items()}

    # ---- files ----

    @classmethod
    def load(cls, file: str | os.PathLike[str], name: str) -> NF4Tensor:
        """The matrix ``name`` of a safetensors file; of its data nothing else is read.

        Raises FormatError naming file and key, OSError.
        """
        source = os.fspath(file)
        _check_name("load", name)
        with open_file(Path(file)) as opened:
            entries = read_header(opened, source).entries
            at = {s: entries[name + s] for s in checkpoint.present(entries, name, source)}
            where = f"{source}: {name}{checkpoint.STATE}"
            checkpoint.check_state_size(at[checkpoint.STATE], where)
            json = read_tensor(opened, at[checkpoint.STATE], source)
            state = checkpoint.read_state(json.data.tobytes(), where)
            checkpoint.check_layout(at, state, source, name)
            parts = {suffix: read_tensor(opened, entry, source) for suffix, entry in at.items()}
        checkpoint.check_values(parts, state, source, name)
        return cls(parts, state, torch=False)

    def save(self, file: str | os.PathLike[str], name: str) -> None:
        """Writes the matrix as ``name`` into a safetensors file, in one step.

        Whatever else the file holds is kept, metadata too; a matrix of that name is
        replaced. Raises FormatError (a file that is no safetensors), OSError.
        """
        _check_name("save", name)
        parts = {name + suffix: raw for suffix, raw in self._parts.items()}
        update_file(file, parts, drop=[name + suffix for suffix in checkpoint.ALL])

    # ---- what it is ----

    def __deepcopy__(self, memo: Any) -> NF4Tensor:
        """Itself: it never changes."""
        return self

    @property
    def handle(self) -> Any:
        """The tensor that stands for this matrix in ``torch.ops.lora_engine``, while it lives.

        Empty, on the CPU; its sizes say whose it is, in this process. Made at first use, which
        imports torch and its compiler and defines the ops: read it once before torch.compile
        traces what uses it.
        """
        if self._handle is None:
            from lora_engine import torch_ops  # noqa: F401  defines the ops

            self._handle = handles.issue("NF4Tensor.handle", self, self.shape[0], "cpu")
        return self._handle

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols): out_features, in_features of a linear layer."""
        return self._state.rows, self._state.cols

    @property
    def dtype(self) -> str:
        """Of the matrix before it was packed: float32, bfloat16 or float16."""
        return self._state.dtype

    @property
    def blocksize(self) -> int:
        """Weights that share an absmax."""
        return self._state.blocksize

    @property
    def double_quant(self) -> bool:
        """Whether absmax is held in 8 bits."""
        return self._state.nested_offset is not None

    @property
    def nbytes(self) -> int:
        """All bytes held: codes, absmax, the maps and the JSON."""
        return sum(raw.nbytes for raw in self._parts.values())

    def __repr__(self) -> str:
        return (
            f"NF4Tensor(shape={self.shape}, blocksize={self.blocksize},"
            f" double_quant={self.double_quant}, dtype={self.dtype!r}, nbytes={self.nbytes})"
        )
