"""A detector from torchvision's lists of pictures and of dicts with boxes: bright squares. python examples/detector.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from litdistill import DenseKD, distill, fcos_slim


def pictures(count: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Noise with a square of one of 2 colors in each picture (3, 32, 32), its box x1, y1, x2, y2 in pixels, and its label."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for label in torch.randint(2, (count,), generator=random).tolist():
        side, x, y = (int(torch.randint(8, 15, (), generator=random)) for _ in range(3))
        picture = 0.2 * torch.randn(3, 32, 32, generator=random)
        picture[2 * label, y : y + side, x : x + side] += 1
        box = torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32)
        found.append((picture, {"boxes": box, "labels": torch.tensor([label])}))
    return found


def lists(samples: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Puts samples together as torchvision's detectors take them."""
    return [picture for picture, _ in samples], [objects for _, objects in samples]


def net(width: int) -> nn.Module:
    return fcos_slim(num_classes=2, input_shape=(3, 32, 32), width=width, fpn=32, convs=1, strides=(4, 8))


def main(out: str | Path = "runs/example_detector", max_epochs: int = 4) -> float:
    torch.manual_seed(0)
    train: DataLoader = DataLoader(pictures(320, 0), batch_size=16, shuffle=True, collate_fn=lists)  # type: ignore[arg-type]
    val: DataLoader = DataLoader(pictures(64, 1), batch_size=32, collate_fn=lists)  # type: ignore[arg-type]

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.01)

    alone = distill(
        net(16), None, train, val, task="detection", max_epochs=max_epochs, out=f"{out}/teacher", optimizer=adam
    )
    distiller = distill(
        net(8), alone.student, train, val, DenseKD(), "detection", max_epochs, f"{out}/student", optimizer=adam
    )
    found = distiller.trainer.callback_metrics["val/map"].item()
    print(f"mAP of the student {found:.1%}")
    return found


if __name__ == "__main__":
    main()
