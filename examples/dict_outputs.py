"""A model that gives an object with `logits`, as Hugging Face's do, and batches that are dicts of its arguments and labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from litdistill import KD, distill


@dataclass
class ModelOutput:
    logits: Tensor  # (N, 2)
    hidden: Tensor  # (N, width)


class Classifier(nn.Module):
    """Tells from token ids (N, L) whether a sentence has more of the low half of its words or of the high."""

    def __init__(self, width: int, words: int = 20):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ModelOutput:
        hidden = (self.embedding(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return ModelOutput(self.head(hidden), hidden)


def sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Samples with inputs and labels by name, which a DataLoader puts together as a dict of batches."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(20, (count, 9), generator=generator)
    labels = (ids < 10).sum(1).lt(5).long()
    return [{"input_ids": i, "attention_mask": torch.ones(9), "labels": y} for i, y in zip(ids, labels, strict=True)]


def main(out: str | Path = "runs/example_dict_outputs", max_epochs: int = 20) -> float:
    torch.manual_seed(0)
    train: DataLoader = DataLoader(sentences(1000, seed=0), batch_size=25, shuffle=True)  # type: ignore[arg-type]
    val: DataLoader = DataLoader(sentences(500, seed=1), batch_size=500)  # type: ignore[arg-type]
    teacher, student = Classifier(width=32), Classifier(width=16)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.05)
    for batch in [*train, *train]:
        optimizer.zero_grad()
        labels = batch.pop("labels")
        nn.functional.cross_entropy(teacher(**batch).logits, labels).backward()
        optimizer.step()
    distiller = distill(student, teacher, train, val, method=KD(), max_epochs=max_epochs, out=out)
    (batch,) = val
    labels = batch.pop("labels")
    return (distiller.deployed_student.eval()(**batch).logits.argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    print(f"student: {main():.1%}")
