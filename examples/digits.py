"""Distils a small network from a larger one on 1,797 handwritten digits: python examples/digits.py

The student learns from few labels, and from what the teacher says of all images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill import KD, Supervised, distill


def conv_net(*widths: int) -> nn.Module:
    """From digits (N, 1, 8, 8) to logits (N, 10)."""
    layers: list[nn.Module] = []
    for before, width in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 10))


def loaders() -> tuple[DataLoader, DataLoader]:
    """Training and validation, images on the scale 0 to 1."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, val = torch.utils.data.random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256)


@torch.no_grad()
def accuracy(net: nn.Module, loader: DataLoader) -> float:
    """The share of right predictions."""
    net.eval()
    right: list[Tensor] = [net(images).argmax(1) == labels for images, labels in loader]
    return torch.cat(right).float().mean().item()


def main(out: str | Path = "runs/example_digits", max_epochs: int = 15) -> float:
    torch.manual_seed(0)
    train, val = loaders()
    learned = distill(
        conv_net(32, 64), None, train, val, method=Supervised(), max_epochs=max_epochs, out=f"{out}/teacher"
    )
    teacher = learned.deployed_student
    print(f"teacher: {accuracy(teacher, val):.1%}")
    distiller = distill(conv_net(8, 16), teacher, train, val, method=KD(), max_epochs=max_epochs, out=f"{out}/student")
    found = accuracy(distiller.deployed_student, val)
    print(f"student: {found:.1%}")
    return found


if __name__ == "__main__":
    main()
