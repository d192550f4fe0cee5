"""How much faster a training batch is gathered, augmented and normalized here than image by image, on one CPU thread.

python scripts/benchmark_data.py                          CIFAR-10 with crop and flip, MNIST with a shift by 2 pixels
python scripts/benchmark_data.py --rounds 15 --json data.json

The other side is what most code for distillation does: a torchvision data set, whose every image goes through PIL, in a
`DataLoader` of this process, so that all its work is counted. Process CPU time; both sides in every round, in reversed
order from round to round; medians, and quartiles of the ratios of single rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms as transforms
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from litdistill.data.augment import Crop, Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.sources import Split
from litdistill.models.preprocess import Preprocess

CASES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "CIFAR-10, crop and flip": (
        "cifar10",
        [Crop(4), Flip()],
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()],
    ),
    "MNIST, shift by 2 pixels": ("mnist", [Crop(2)], [transforms.RandomCrop(28, padding=2)]),
}


class OneByOne(Dataset[Any]):
    """As torchvision's data sets give their images."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], torch.Tensor]):
        self.images = [image.squeeze(-1).numpy() for image in split.images[:].permute(0, 2, 3, 1)]
        self.targets, self.transform = split.targets.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def augmentation_ratios(rounds: int = 9, batch_size: int = 64, root: str = "data_files") -> dict[str, dict[str, Any]]:
    """For each of `CASES`: "ratio", [lower quartile, median, upper quartile] of image by image ÷ here, and the CPU
    milliseconds of a batch on either side, "one_by_one_ms" and "here_ms". One thread, whatever the caller's number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {case: _ratio(*CASES[case], rounds, batch_size, root) for case in CASES}
    finally:
        torch.set_num_threads(threads)


def _ratio(name: str, ours: list[Any], theirs: list[Any], rounds: int, batch_size: int, root: str) -> dict[str, Any]:
    data = ImageData(name, root, val_size=5000, batch_size=batch_size, augment=ours)
    data.setup()
    assert data.mean is not None
    assert data.std is not None
    normalize, preprocess = transforms.Normalize(data.mean, data.std), Preprocess(data.mean, data.std)
    dataset = OneByOne(data.source.train, transforms.Compose([*theirs, transforms.ToTensor(), normalize]))
    loader = DataLoader(dataset, batch_size, shuffle=True)

    def here() -> Iterator[Any]:
        return (preprocess(data.get_batch(rows.split, rows.ids, rows.views).inputs) for rows in data.train_dataloader())

    sides = ((lambda: iter(loader), 20), (here, len(data.train_dataloader())))  # ours with the start of an epoch
    for make, _ in sides:
        next(make())
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            make, batches = sides[side]
            start = time.process_time()
            for _ in itertools.islice(make(), batches):
                pass
            times[side].append((time.process_time() - start) / batches)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    one_by_one, ours_ms = (1e3 * statistics.median(t) for t in times)
    return {"ratio": statistics.quantiles(ratios, n=4), "one_by_one_ms": one_by_one, "here_ms": ours_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description="Augmented batches: image by image against here.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--root", default="data_files")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = augmentation_ratios(options.rounds, options.batch_size, options.root)
    for case, row in found.items():
        low, median, high = row["ratio"]
        print(
            f"{case}: {median:.1f}x ({low:.1f} to {high:.1f}); {row['one_by_one_ms']:.2f} ms a batch image by image, "
            f"{row['here_ms']:.3f} here"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
