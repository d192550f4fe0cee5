"""Any two modules, any DataLoader: networks on 2 numbers, classes that lie in rings. python examples/own_networks.py"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import make_circles
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill import KD, distill


def net(width: int) -> nn.Module:
    """From points (N, 2) to logits (N, 2)."""
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def points(count: int, seed: int) -> TensorDataset:
    """Points of two rings, and which one each is of."""
    place, ring = make_circles(count, noise=0.1, factor=0.4, random_state=seed)
    return TensorDataset(torch.tensor(place, dtype=torch.float32), torch.tensor(ring))


def train_as_usual(teacher: nn.Module, loader: DataLoader, epochs: int) -> None:
    """A teacher may come from anywhere."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(inputs), targets).backward()
            optimizer.step()


def main(out: str | Path = "runs/example_own_networks", max_epochs: int = 25) -> float:
    torch.manual_seed(0)
    train = DataLoader(points(1000, seed=0), batch_size=50, shuffle=True)
    val = DataLoader(points(500, seed=1), batch_size=500)
    teacher, student = net(64), net(8)
    train_as_usual(teacher, train, epochs=10)

    distiller = distill(student, teacher, train, val, method=KD(temperature=2.0), max_epochs=max_epochs, out=out)

    with torch.no_grad():
        ((inputs, targets),) = val
        found = (distiller.deployed_student.eval()(inputs).argmax(1) == targets).float().mean().item()
    print(f"student of {sum(p.numel() for p in student.parameters())} parameters: {found:.1%}")
    return found


if __name__ == "__main__":
    main()
