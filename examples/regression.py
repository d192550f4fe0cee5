"""Numbers instead of classes, and a teacher that is no network: a random forest of scikit-learn teaches a small perceptron.

python examples/regression.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestRegressor
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from litdistill import LogitMSE, Regression, distill


class Forest(nn.Module):
    """Any function of the inputs can teach: here predictions (N, 1) on the scale that the student is trained on."""

    def __init__(self, forest: RandomForestRegressor, mean: float, std: float):
        super().__init__()
        self.forest, self.mean, self.std = forest, mean, std

    def forward(self, rows: Tensor) -> Tensor:
        values = torch.from_numpy(self.forest.predict(rows.cpu().numpy())).to(rows)
        return ((values - self.mean) / self.std)[:, None]


def main(out: str | Path = "runs/example_regression", max_epochs: int = 30) -> float:
    torch.manual_seed(0)
    rows, targets = load_diabetes(return_X_y=True)
    data = TensorDataset(torch.tensor(20 * rows, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32))
    train, val, test = random_split(data, [0.6, 0.2, 0.2], torch.Generator().manual_seed(0))
    x, y = train[:]
    mean, std = y.mean().item(), y.std().item()

    forest = RandomForestRegressor(min_samples_leaf=5, random_state=0).fit(x.numpy(), y.numpy())
    student = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
    task = Regression([mean], [std])  # loss and logits are standardized, metrics are in the targets' own units
    distiller = distill(
        student, Forest(forest, mean, std), DataLoader(train, 32, shuffle=True), DataLoader(val, 512), LogitMSE(), task,
        max_epochs=max_epochs, out=out, optimizer=partial(torch.optim.Adam, lr=0.01),
    )  # fmt: skip

    x, y = test[:]
    with torch.no_grad():
        error = task.decode(distiller(x))["values"][:, 0] - y
    r2 = 1 - (error.square().mean() / y.var(correction=0)).item()
    print(f"student: R² {r2:.2f}, forest: R² {forest.score(x.numpy(), y.numpy()):.2f}")
    return r2


if __name__ == "__main__":
    main()
