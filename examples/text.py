"""A text classifier teaches a bag of words: docstrings of Python's own library, about numbers or about networks.

python examples/text.py
"""

import importlib
import inspect
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader, random_split

from litdistill import KD, distill, read_outputs

NUMBERS = ("decimal", "fractions", "statistics", "random", "math", "cmath", "datetime", "calendar")
NETWORKS = ("socket", "ssl", "http.client", "urllib.request", "email.message", "ftplib", "smtplib", "imaplib")
ROWS, LENGTH = 4096, 48  # word vectors, into which words are hashed, and words of a text


def docstrings(names: tuple[str, ...]) -> list[str]:
    things = [x for name in names for x in vars(importlib.import_module(name)).values()]
    things += [member for x in things if inspect.isclass(x) for member in vars(x).values()]
    return sorted({text for x in things if callable(x) and (text := inspect.getdoc(x)) and len(text) > 30})


def ids(text: str) -> Tensor:
    words = [1 + zlib.crc32(word.encode()) % (ROWS - 1) for word in re.findall(r"\w+", text.lower())[:LENGTH]]
    return torch.tensor(words + [0] * (LENGTH - len(words)))


def main(out: str | Path = "runs/example_text", max_epochs: int = 15) -> float:
    torch.manual_seed(0)
    texts = (numbers := docstrings(NUMBERS)) + docstrings(NETWORKS)
    labels = [int(i >= len(numbers)) for i in range(len(texts))]
    rows = [{"inputs": ids(text), "labels": labels[i], "ids": i} for i, text in enumerate(texts)]
    train, val, test = random_split(rows, [0.5, 0.2, 0.3], torch.Generator().manual_seed(0))
    teacher = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10))
    teacher.fit([texts[i] for i in train.indices], [labels[i] for i in train.indices])
    (told := Path(out) / "teacher.npz").parent.mkdir(parents=True, exist_ok=True)
    np.savez(told, probabilities=teacher.predict_proba(texts))  # it reads texts, and the student ids: a file teaches
    student = nn.Sequential(nn.EmbeddingBag(ROWS, 32, padding_idx=0), nn.Linear(32, 2))
    distiller = distill(
        student, read_outputs(told), DataLoader(train, 16, shuffle=True), DataLoader(val, 256), KD(temperature=2.0),
        max_epochs=max_epochs, out=out, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )  # fmt: skip
    found = distiller(torch.stack([row["inputs"] for row in test])).logits.argmax(1)
    right = sum(int(i) == row["labels"] for i, row in zip(found, test, strict=True)) / len(test)
    print(f"student: {100 * right:.1f} % of {len(test)} texts")
    return right


if __name__ == "__main__":
    main()
