"""``torch.ops.lora_engine``: the ops as torch knows them, for torch.compile and autograd.

Importing this module (or ``lora_engine.torch_ops``, or reading a ``handle``) defines them, on
CPU tensors and on a GPU's. Shapes, dtypes and errors are those of ``lora_engine.ops``.

An op is given a pool, or a packed matrix, as its ``handle``: an empty tensor whose sizes say which
it is. Every forward reads it and ``batched_adapt`` is declared to write it, which keeps a compiler
from moving a forward across an adapt, or from taking two forwards around it for one. Nothing else
of a pool is seen by a trace, neither ranks nor versions, so an adapter of a new rank compiles
nothing anew; nor does another pool, as sizes are inputs of a graph. A handle is of one process:
torch.export is refused, and a number that reached a file otherwise finds nothing in another.

Gradients: ``lora_delta`` in x, A and B; ``batched_lora_delta`` in x; ``nf4_linear`` in x and
bias. Adapters of a pool learn by ``batched_adapt``, not by a backward pass. One that was
changed between a forward and its backward pass raises RuntimeError there; on a GPU, where the
host would have to wait to know it, the gradient of its rows is NaN. With activation checkpointing
the forward that is computed again takes the adapters as they are by then: those changed between
are differentiated without a word. Whatever else requires grad is refused, and so are tangents of
forward-mode AD.

Each op has a kernel of its own under autograd's key, in place of torch.library's
register_autograd, which knows no op that writes to its arguments and takes longer where nothing
is recorded. lora_delta's on the CPU are in C++ (csrc/py_torch.cpp) where this torch has what
they need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.library import Library

from lora_engine import _C
from lora_engine.backends import backend_of, chosen

Tensor = torch.Tensor
_library = Library("lora_engine", "DEF")  # type: ignore[no-untyped-call]
defined = torch.ops.lora_engine
_modes = torch._C._len_torch_dispatch_stack  # of fake tensors, tracing, a user's own
_unseen = torch._C._disabled_torch_dispatch_impl
_any_requires_grad = torch._C._any_requires_grad


# ---- how an op is defined ----


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether no tensor is of a class that wants to see the call."""
    return all(
        type(value).__torch_dispatch__ is _unseen for value in args if isinstance(value, Tensor)
    )


def _record(call: Any, function: Any, recorded: tuple[str, ...], args: tuple[Any, ...]) -> Any:
    """An op whose arguments require grad, by its autograd.Function; ValueError for an argument
    that it gives no gradient of."""
    arguments = call._schema.arguments
    for argument, value in zip(arguments, args, strict=False):
        if isinstance(value, Tensor) and value.requires_grad and argument.name not in recorded:
            raise ValueError(
                f"{call._schema.name.split('::')[1]}: {argument.name}: expected a tensor outside"
                " autograd, got one that requires grad: wrap the call in torch.no_grad() or pass"
                " tensor.detach()"
            )
    return function.apply(*args, *(a.default_value for a in arguments[len(args) :]))


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _refuse_tangents(call: Any, args: tuple[Any, ...]) -> None:
    for argument, value in zip(call._schema.arguments, args, strict=False):
        if isinstance(value, Tensor) and _has_tangent(value):
            raise ValueError(
                f"{call._schema.name.split('::')[1]}: {argument.name}: expected a tensor without"
                " a tangent, as there is no forward-mode derivative, got a dual tensor"
            )


def define(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    function: Any = None,
    recorded: tuple[str, ...] = (),
    in_core: Callable[..., bool] = lambda compute, under_autograd: False,
) -> None:
    """Defines an op. function: gives the gradients of the arguments ``recorded``. in_core:
    registers kernels in C++ for the CPU, which leave to these what they do not take, or not."""
    name = _library.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    call = getattr(defined, name).default
    takes_handle = not {a.name for a in call._schema.arguments}.isdisjoint(("pool", "w"))

    def under_autograd(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(call, args)
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            return _record(call, function, recorded, args)
        if not _modes() and _are_plain(args):
            return compute(*args)  # what the dispatcher would call next
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    def shaped(*args: Any) -> Any:
        if takes_handle and torch.compiler.is_exporting():
            raise ValueError(
                f"{name}: torch.export: expected an op of tensors alone, got a handle, which is of"
                " this process only: export a function that takes the weights, with lora_delta"
            )
        tensors = [(a.name, t) for a, t in zip(call._schema.arguments, args, strict=False)
                   if isinstance(t, Tensor) and a.name != "w"]  # fmt: skip
        beside(name, tensors[0][1], **dict(tensors))
        return fake(*args)

    for device in ("CUDA",) if in_core(compute, under_autograd) else ("CUDA", "CPU"):
        _library.impl(name, compute, device)  # type: ignore[no-untyped-call]
        _library.impl(name, under_autograd, "Autograd" + device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lora_engine::{name}", shaped, lib=_library)


def beside(op: str, like: Tensor, /, **others: Tensor | None) -> None:
    """Refuses tensors on another device than the first."""
    for name, other in others.items():
        if other is not None and other.device != like.device:
            want = f"a tensor on {like.device}, beside the first"
            raise ValueError(f"{op}: {name}: expected {want}, got {other.device}")


def written(tensor: Tensor) -> None:
    """Tells autograd of a tensor that a kernel wrote to."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def wide(x: Tensor, width: Any) -> Tensor:
    """A result of x's rows."""
    return x.new_empty((*x.shape[:-1], width))


# ---- lora_delta ----


def _lora_delta(x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Any:
    return chosen(x.is_cuda).lora_delta(x, A, B, scaling, None, False)  # backend_of, inlined


def _in_core(compute: Any, under_autograd: Any) -> bool:
    """Registers the kernels of csrc/py_torch.cpp, where this torch has what they need."""
    module, aoti = torch._C.__file__, torch._C._aoti
    return _C.register_lora_delta(module, aoti, compute, under_autograd)


def _float_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a b from float32, in the dtype of ``like``."""
    return (a.float() @ b.float()).to(like.dtype)


class _LoraDelta(torch.autograd.Function):
    """dx = s (grad B) A, dA = s (grad B)ᵀ x, dB = s gradᵀ (x Aᵀ)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Any:
        ctx.save_for_backward(x, A, B)
        ctx.scaling = scaling
        return defined.lora_delta(x, A, B, scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, A, B = ctx.saved_tensors
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = defined.lora_delta(grad, B.t(), A.t(), ctx.scaling)
        rows, up = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            dA = _float_product((up.float() @ B.float()).t() * ctx.scaling, rows, A)
        if ctx.needs_input_grad[2]:
            dB = _float_product(up.t(), rows.float() @ A.float().t() * ctx.scaling, B)
        return dx, dA, dB, None


define(
    "lora_delta(Tensor x, Tensor A, Tensor B, float scaling) -> Tensor",
    _lora_delta,
    lambda x, A, B, scaling: wide(x, B.shape[0]),
    _LoraDelta,
    ("x", "A", "B"),
    _in_core,
)


# ---- Fisher information ----


def _fisher_accumulate(F: Tensor, g: Tensor, gamma: float, scale: float) -> None:
    backend_of(F).fisher_accumulate(F, g, gamma, scale)
    written(F)


def _lora_fisher(
    x: Tensor, grad: Tensor, A: Tensor, B: Tensor, scaling: float, segments: Any = None
) -> Any:
    return backend_of(x).lora_fisher(x, grad, A, B, scaling, segments, None)


def _new_sums(like: Tensor, *shapes: Any) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


define(
    "fisher_accumulate(Tensor(a!) F, Tensor g, float gamma, float scale) -> ()",
    _fisher_accumulate,
    lambda F, g, gamma, scale: None,
)
define(
    "lora_fisher(Tensor x, Tensor grad, Tensor A, Tensor B, float scaling,"
    " Tensor? segments=None) -> (Tensor, Tensor)",
    _lora_fisher,
    lambda x, grad, A, B, scaling, segments=None: _new_sums(x, A.shape, B.shape),
)
define(
    "lora_fisher_factors(Tensor x, Tensor grad) -> (Tensor, Tensor)",
    lambda x, grad: backend_of(x).lora_fisher_factors(x, grad, None),
    lambda x, grad: _new_sums(x, grad.shape[-1:], x.shape[-1:]),
)
