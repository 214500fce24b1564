"""all-MiniLM-L6-v2, real weights: in float32, bfloat16 and NF4, with adapters a row."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_attach import with_peft
from helpers_files import quietly
from helpers_models import cosine, embeddings, minilm, sentences

import lora_engine as le

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PAIRS = [1, 0, 3, 2, 5, 4]  # of SENTENCES: which one means the same


@pytest.fixture(scope="module")
def plain():
    model = minilm()
    with torch.no_grad():
        return model, embeddings(model, sentences())


def nearest(found):
    return (found @ found.T).fill_diagonal_(-1).argmax(1).tolist()


@torch.no_grad()
def test_the_quantised_model_keeps_the_embeddings(plain):
    model, want = plain
    assert nearest(want) == PAIRS
    packed = copy.deepcopy(model)
    report = le.quantize(packed, double_quant=True)
    assert len(report.layers) == 37  # 6 x (q, k, v, o, up, down), the pooler
    # Most of what is left is the embeddings of 30522 tokens, which stay as they are.
    words = model.embeddings.word_embeddings.weight.nbytes
    assert report.bytes_after - words < 0.16 * (report.bytes_before - words)
    got = embeddings(packed, sentences())
    assert nearest(got) == PAIRS
    assert cosine(got, want) > 0.96
    # The rounding of the weights is all there is: with the decoded ones the model says the same.
    decoded = copy.deepcopy(model)
    for path in report.layers:
        matrix = packed.get_submodule(path).nf4.to_float()
        decoded.get_submodule(path).weight.copy_(torch.from_numpy(matrix))
    assert cosine(got, embeddings(decoded, sentences())) > 1 - 1e-6


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "nf4"])
def test_bfloat16(packed, plain):
    model = copy.deepcopy(plain[0]).bfloat16()
    if packed:
        le.quantize(model)
    got = embeddings(model, sentences())
    assert nearest(got) == PAIRS
    assert cosine(got, plain[1]) > (0.96 if packed else 0.9998)


CONFIGS = {
    "a": {"r": 8, "target_modules": ["query", "value"]},
    "b": {"r": 3, "use_rslora": True, "target_modules": ["key", "output.dense"]},
}
NAMES = ["a", "__base__", "b", "b", "a", "__base__"]


def form(model, which):
    """A copy of the model in float32, bfloat16 or NF4."""
    made = copy.deepcopy(model)
    if which == "bfloat16":
        return made.bfloat16()
    if which == "nf4":
        le.quantize(made)
    return made


@torch.no_grad()
@pytest.mark.parametrize("which", ["float32", "bfloat16", "nf4"])
def test_adapters_of_peft_a_row_equal_one_model_each(which, plain, tmp_path):
    base = form(plain[0], which)
    peft = with_peft(base, CONFIGS)
    quietly(peft.save_pretrained, tmp_path)  # a folder an adapter, as PEFT writes them
    x = sentences()
    each = {"__base__": embeddings(base, x)}
    for name in CONFIGS:
        peft.set_adapter(name)
        each[name] = embeddings(peft, x)
    want = torch.stack([each[name][row] for row, name in enumerate(NAMES)])
    handle = le.attach(base, {name: tmp_path / name for name in CONFIGS})
    got = embeddings(base, x, adapter_names=NAMES)
    moved = torch.cosine_similarity(want, each["__base__"], dim=-1)
    assert moved[[0, 2, 3, 4]].max() < 0.99  # the adapters matter
    if which == "bfloat16":
        assert cosine(got, want) > 0.9995
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    # A row says what it would say if all rows had its adapter.
    for name in ("a", "__base__"):
        alone = embeddings(base, x, adapter_names=[name] * 6)
        rows = [row for row, one in enumerate(NAMES) if one == name]
        torch.testing.assert_close(got[rows], alone[rows], rtol=0, atol=1e-6)
    handle.detach()
    assert torch.equal(embeddings(base, x), each["__base__"])
