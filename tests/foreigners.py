"""Plain modules and loaders of a stranger, shared by the tests of what is not of this project."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

QUIET = {"logger": False, "accelerator": "cpu"}


def mlp(width: int, inputs: int = 4, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def conv(width: int) -> nn.Module:
    """Images (N, 1, 8, 8) -> logits (N, 3)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )  # fmt: skip


def points(count: int = 96) -> tuple[Tensor, Tensor]:
    """Points (N, 4) of three classes: the largest of the first three numbers."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def teacher_of_points() -> nn.Module:
    """One that is always right, and confident."""
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.copy_(4 * torch.eye(3, 4))
        net.bias.zero_()
    return net


def loader(collate=None, count: int = 96, batch: int = 32) -> DataLoader:
    return DataLoader(TensorDataset(*points(count)), batch_size=batch, collate_fn=collate)


def once(*batch: Tensor) -> DataLoader:
    """Yields one batch."""
    return DataLoader([batch], batch_size=None)


def stacked(samples: list) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


class Named(nn.Module):
    """Takes `x` by name, and gives a dict."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}
