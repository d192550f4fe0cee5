"""A table: gradient boosting, which is no network, teaches a small perceptron through a file of its outputs.

python examples/tabular.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_wine
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import cross_val_predict, train_test_split
from torch import nn
from torch.utils.data import DataLoader

from litdistill import KD, distill, read_outputs


def samples(rows: np.ndarray, labels: np.ndarray) -> list[dict[str, object]]:
    """A teacher in a file knows samples by their ids."""
    return [
        {"inputs": torch.tensor(row, dtype=torch.float32), "labels": int(label), "ids": i}
        for i, (row, label) in enumerate(zip(rows, labels, strict=True))
    ]


def main(out: str | Path = "runs/example_tabular", max_epochs: int = 30) -> float:
    torch.manual_seed(0)
    rows, labels = load_wine(return_X_y=True)
    x, x_test, y, y_test = train_test_split(rows, labels, test_size=0.2, stratify=labels, random_state=0)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    mean, std = x.mean(0), x.std(0)
    train, val = (samples((a - mean) / std, b) for a, b in ((x, y), (x_val, y_val)))

    boosting = HistGradientBoostingClassifier(max_iter=50, random_state=0)
    Path(out).mkdir(parents=True, exist_ok=True)
    file = Path(out) / "boosting.npz"  # each row predicted without its own label, which boosting knows by heart
    np.savez(file, probabilities=cross_val_predict(boosting, x, y, method="predict_proba"))
    student = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))
    loaders = DataLoader(train, 16, shuffle=True), DataLoader(val, 512)
    distiller = distill(
        student, read_outputs(file), *loaders, KD(), max_epochs=max_epochs, out=out,
        optimizer=partial(torch.optim.Adam, lr=0.01),
    )  # fmt: skip

    with torch.no_grad():
        found = distiller(torch.tensor((x_test - mean) / std, dtype=torch.float32)).logits.argmax(1).numpy()
    accuracy = float((found == y_test).mean())
    print(f"student: {accuracy:.1%} right, boosting: {boosting.fit(x, y).score(x_test, y_test):.1%}")
    return accuracy


if __name__ == "__main__":
    main()
