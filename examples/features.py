"""A method that reads features, here FitNet, on networks of one's own: python examples/features.py

Where the features are taken is found by itself, as the ends of stages, or named by submodule as here. FitNet trains a
projector from the student's width to the teacher's, which is not part of the deployed student.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill import FitNet, distill


class Net(nn.Module):
    """From images (N, 1, 12, 12) to logits (N, 2)."""

    def __init__(self, width: int):
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.high = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(2 * width, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.low(images)).amax((2, 3)))


def stripes(count: int, seed: int) -> TensorDataset:
    """Images whose stripes lie (0) or stand (1), with noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 12, 12, generator=generator) / 2
    labels = torch.randint(2, (count,), generator=generator)
    images[labels == 0, :, ::3] += 0.5
    images[labels == 1, :, :, ::3] += 0.5
    return TensorDataset(images, labels)


def main(out: str | Path = "runs/example_features", max_epochs: int = 8) -> float:
    torch.manual_seed(0)
    train = DataLoader(stripes(800, seed=0), batch_size=40, shuffle=True)
    val = DataLoader(stripes(400, seed=1), batch_size=400)
    teacher = Net(width=16)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for images, labels in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(images), labels).backward()
        optimizer.step()

    method, adam = FitNet(student_taps=["high"], teacher_taps=["high"]), partial(torch.optim.Adam, lr=0.01)
    distiller = distill(Net(4), teacher, train, val, method, max_epochs=max_epochs, out=out, optimizer=adam)
    ((images, labels),) = val
    return (distiller.deployed_student.eval()(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    print(f"student: {main():.1%}")
