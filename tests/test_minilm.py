"""all-MiniLM-L6-v2, real weights: in float32, bfloat16 and NF4, with adapters a row."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_models import cosine, embeddings, minilm, sentences

import lora_engine as le

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
