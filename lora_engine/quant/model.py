"""quantize: the linear layers of a torch model in 4 bits a weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from lora_engine.progress import Bar
from lora_engine.quant import checkpoint
from lora_engine.quant.bitsandbytes_layer import beside, from_linear4bit, is_linear4bit
from lora_engine.quant.linear import NF4Linear, check_compute

Module = torch.nn.Module
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# These read the weights of their layers themselves, where they do not call them.
_READ_WEIGHTS = (torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention)


class QuantizeReport(NamedTuple):
    """What ``quantize`` made. Bytes are of all parameters and buffers of the model."""

    layers: tuple[str, ...]  # paths of the layers that are NF4Linear now
    kept: dict[str, str]  # paths of linear layers that are as they were, and why
    bytes_before: int
    bytes_after: int


class _Site(NamedTuple):
    """A layer and all places where the model has it."""

    path: str
    layer: Module
    places: list[tuple[Module, str]]  # parent, name in it


def quantize(
    model: Module,
    *,
    skip: Iterable[str] | None = None,
    blocksize: int = 64,
    double_quant: bool = False,
    compute: str | None = None,
) -> QuantizeReport:
    """Puts the weights of a model's linear layers into NF4, in place (QLoRA: Dettmers et al. 2023).

    Every torch.nn.Linear and transformers' Conv1D becomes an ``NF4Linear``, and so does
    bitsandbytes' Linear4bit, which keeps its bytes. skip: paths of modules, or their ends
    ("lm_head", "pooler.dense"), whose layers stay as they are; None: what transformers leaves to
    bitsandbytes' 4-bit loading, that is the output head, the last module, what must be float32;
    of a model of another kind, "lm_head". A weight that is tied to another module's is
    always kept, and so are layers inside torch's own MultiheadAttention and
    TransformerEncoderLayer, which do not call them. Embeddings are untouched.

    blocksize, double_quant: as ``nf4_quantize``. compute: as ``nf4_linear``, of each layer.
    A transformers model's config is given the quantization_config under which ``save_pretrained``
    writes a bitsandbytes checkpoint. One layer at a time is converted and its float weight let
    go, so the model never takes more memory than before, but for one layer. All layers are checked
    before the first is touched; only an interrupt leaves some done, each of them whole.

    Raises TypeError, ValueError (naming the layer: dtype, size, NaN or Inf, meta, hooks; adapters
    already there; nothing to quantise), FormatError (a Linear4bit in fp4).
    """
    _check_arguments(model, blocksize, compute)
    sites, kept = _sites(model, _skipped(model, skip))
    if not sites:
        raise ValueError(f"quantize: model: expected a linear layer, got none but {kept or 'none'}")
    for site in sites:
        _check(site)
    before = _bytes(model)
    layers = tuple(site.path for site in sites)
    with Bar("quantize", len(sites)) as bar:
        while sites:
            site = sites.pop(0)
            if is_linear4bit(site.layer):
                made = from_linear4bit(site.layer, site.path)
            else:
                made = NF4Linear.from_linear(site.layer, blocksize, double_quant, compute)
            for parent, name in site.places:
                parent._modules[name] = made
            del site
            bar.advance(1)
    _describe(model, list(kept), compute)
    return QuantizeReport(layers, kept, before, _bytes(model))


# ---- which layers ----


def is_conv1d(module: Module) -> bool:
    """Whether it is transformers' Conv1D; without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: Module) -> bool:
    return type(module) is torch.nn.Linear or is_conv1d(module) or is_linear4bit(module)


def _skipped(model: Module, skip: Iterable[str] | None) -> list[str]:
    if isinstance(skip, str):
        raise TypeError(f"quantize: skip: expected paths, got the text {skip!r}: put it in a list")
    if skip is not None:
        return list(skip)
    if not hasattr(model, "get_output_embeddings"):
        return ["lm_head"]
    from transformers.quantizers.base import get_keys_to_not_convert

    strict = getattr(model, "_keep_in_fp32_modules_strict", None)
    whole = [*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(strict or ())]
    return [*get_keys_to_not_convert(model), *whole]


def _named_in(path: str, skip: list[str]) -> bool:
    """Whether the path, or that of a module around it, is or ends with one of these."""
    parts = path.split(".")
    around = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(f".{outer}".endswith(f".{name}") for outer in around for name in skip)


def _sites(model: Module, skip: list[str]) -> tuple[list[_Site], dict[str, str]]:
    """The layers to convert, each once, and those that are kept."""
    owners: dict[int, set[int]] = {}  # of each parameter
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(id(module))
    found: dict[int, _Site] = {}
    kept: dict[str, str] = {}
    for path, parent, name, layer in _children(model):
        if not is_linear(layer):
            continue
        if id(layer) in found:
            found[id(layer)].places.append((parent, name))
        elif _named_in(path, skip):
            kept[path] = "skipped"
        elif len(owners[id(layer._parameters.get("weight"))]) > 1:
            kept[path] = "its weight is another module's too"
        elif isinstance(parent, _READ_WEIGHTS):
            kept[path] = f"torch's {type(parent).__name__} reads its weight itself"
        else:
            found[id(layer)] = _Site(path, layer, [(parent, name)])
    return list(found.values()), kept


def _children(model: Module) -> Iterator[tuple[str, Module, str, Module]]:
    """Path, parent, name and module, of every place, though several hold one module."""
    for outer, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield (f"{outer}.{name}" if outer else name), parent, name, child


# ---- checks ----


def _check_arguments(model: Any, blocksize: Any, compute: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"quantize: model: expected a torch module, got {type(model).__name__}")
    if is_linear(model):
        raise ValueError(
            "quantize: model: expected a module with layers in it, got a layer, which cannot be"
            " replaced in place: NF4Linear.from_linear makes another"
        )
    if not checkpoint.is_blocksize(blocksize):
        raise ValueError(
            f"quantize: blocksize: expected a power of two from 32 to 4096, got {blocksize!r}"
        )
    check_compute("quantize", compute)
    check_bare("quantize", model)


def check_bare(op: str, model: Module) -> None:
    """Raises ValueError for a model with adapters, PEFT's or attached ones."""
    for path, module in model.named_modules():
        of_peft = type(module).__module__.partition(".")[0] == "peft"
        if of_peft or not {"_lora", "_lora_model"}.isdisjoint(vars(module)):
            raise ValueError(
                f"{op}: model: expected a model without adapters, got a {type(module).__name__}"
                f" with some at {path or 'the top'}: {op} first, add adapters then"
            )


def _check(site: _Site) -> None:
    """Raises ValueError, TypeError or FormatError for a layer that cannot be packed."""
    where, layer = f"quantize: {site.path}", site.layer
    hooked = any(getattr(layer, name) for name in ("_forward_hooks", "_forward_pre_hooks",
                 "_backward_hooks", "_backward_pre_hooks"))  # fmt: skip
    if hooked or "forward" in vars(layer):
        raise ValueError(f"{where}: expected a layer without hooks, which its successor would lack")
    if is_linear4bit(layer):
        from_linear4bit(layer, where)
        return
    weight = layer._parameters.get("weight")
    if type(weight) is not torch.nn.Parameter:
        raise TypeError(
            f"{where}: weight: expected a plain parameter, got {type(layer.weight).__name__}"
        )
    if weight.is_meta:
        raise ValueError(f"{where}: weight: expected numbers, got a tensor on meta")
    if weight.dtype not in _FLOATS:
        raise TypeError(
            f"{where}: weight: expected float32, bfloat16 or float16, got {weight.dtype}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{where}: weight: expected no empty matrix, got {list(weight.shape)}")
    if not bool(torch.isfinite(weight.detach().abs().max())):  # NaN is the largest of all
        raise ValueError(f"{where}: weight: expected finite numbers, got NaN or Inf")


# ---- what is said of it ----


def _bytes(model: Module) -> int:
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.nf4.nbytes - module.weight.nbytes
        elif is_linear4bit(module):
            total += sum(t.nbytes for t in beside(module).values())
    return total


def _describe(model: Any, kept: list[str], compute: str | None) -> None:
    """Gives a transformers model's config what ``save_pretrained`` is to write of it."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_file"):
        return
    conversions = getattr(model, "_weight_conversions", None)  # in from_pretrained, to be reversed
    if conversions is not None:  # but transformers 5.20 cannot reverse that of packed weights
        model._weight_conversions = [
            c
            for c in conversions
            if not any(type(op).__name__ == "Bnb4bitDeserialize" for op in _operations(c))
        ]
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = compute or str(floats[0] if floats else torch.float32)
    packed = [module.nf4 for module in model.modules() if isinstance(module, NF4Linear)]
    config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": packed[0].double_quant,
        "bnb_4bit_compute_dtype": dtype.removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
    }


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []
