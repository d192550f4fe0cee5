"""Images a second at 224 pixels: JPEG files by torchvision's `DataLoader` and by this project, and images in memory.

python scripts/benchmark_photos.py                                      prints a table
python scripts/benchmark_photos.py --rounds 9 --into docs/performance.md

The other side is what most people write: `ImageFolder`, `Resize`, `CenterCrop` or `RandomResizedCrop`, `ToTensor`,
`Normalize`, in a `DataLoader`. Both sides end at a normalized batch of floats. Photographs are parts of scikit-learn's
two, scaled up to a camera's sizes, quality 90.

Wall-clock time of one epoch after a first; of images in memory, which one thread augments, its processor time. All
variants in turn, every other round in reverse; the fastest round of each, since other processes share the machine, and
the median of the ratios of single rounds. One thread in this process, and so many workers beside it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as transforms
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from litdistill.benchmarks.tables import between_marks
from litdistill.data.datamodule import ImageData
from litdistill.models.preprocess import Preprocess
from litdistill.utils.allocator import keep_freed_memory

SIZE, BATCH = 224, 32
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIDES = {"500x375": (500, 375), "1600x1200": (1600, 1200)}
CROP = [{"RandomResizedCrop": {"scale": [0.35, 1]}}, "Flip"]
RECIPES: dict[str, list[Any]] = {
    "none": [],
    "shift and flip": [{"Crop": {"pad": 16}}, "Flip"],
    "random resized crop and flip": CROP,
    "random resized crop, flip, color jitter, RandAugment, erasing": [
        *CROP,
        {"ColorJitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}},
        "RandAugment",
        "RandomErasing",
    ],
}


def write_photographs(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    """Writes `count` JPEGs of this size in two classes, each a part of a photograph."""
    pictures, draw = [Image.fromarray(image) for image in load_sample_images().images], np.random.default_rng(seed)
    for i in range(count):
        picture, width = pictures[i % 2], int(draw.integers(300, 500))
        left, top = (int(draw.integers(0, side)) for side in (picture.width - width, picture.height - width * 3 // 4))
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = picture.crop((left, top, left + width, top + width * 3 // 4))
        part.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def peers(folder: Path, workers: int, steps: list[Any]) -> Callable[[], int]:
    """Returns a function that runs an epoch of torchvision's way and returns its number of images."""
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset = ImageFolder(str(folder / "train"), transforms.Compose([*steps, *last]))
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(images) for images, _ in loader)


def ours(folder: Path, workers: int, augment: list[Any], **options: Any) -> Callable[[], int]:
    """Returns a function that runs an epoch of `ImageData` and returns its number of images."""
    data = ImageData(
        "folder",
        folder,
        SIZE,
        batch_size=BATCH,
        val_size=2,
        mean=MEAN,
        std=STD,
        workers=workers,
        augment=augment,
        **options,
    )
    data.setup()
    loader, preprocess, epoch = data.train_loader(), Preprocess(MEAN, STD), iter(range(10**6))

    def run() -> int:
        loader.set_epoch(next(epoch))
        return sum(len(preprocess(data.make_batch(rows).inputs)) for rows in loader)  # type: ignore[misc, union-attr]

    return run


def measured(
    variants: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns the images a second of each round, by variant."""
    for run in variants.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            count = variants[name]()
            found[name].append(count / (clock() - start))
    return found


def from_disk(folder: Path, size: str, count: int, workers: list[int], rounds: int) -> list[str]:
    """Returns the lines of the table of JPEG files."""
    write_photographs(folder / "train", count, SIDES[size], 0)
    write_photographs(folder / "test", 4, SIDES[size], 1)
    fixed = [transforms.Resize(SIZE), transforms.CenterCrop(SIZE)]
    crop = [transforms.RandomResizedCrop(SIZE, (0.35, 1)), transforms.RandomHorizontalFlip()]
    lines = []
    for number in workers:
        rates = measured(
            {
                "peers": peers(folder, number, fixed),
                "here": ours(folder, number, [], resident=False),
                "scaled": ours(folder, number, [], resident=False, decode="scaled"),
                "peers, cropped": peers(folder, number, crop),
                "here, cropped": ours(folder, number, CROP, resident=False),
            },
            rounds,
        )
        best = {name: f"{max(values):.0f}" for name, values in rates.items()}
        pairs = (("here", "peers"), ("scaled", "peers"), ("here, cropped", "peers, cropped"))
        ratio = [f"{statistics.median(a / b for a, b in zip(rates[x], rates[y], strict=True)):.2f}" for x, y in pairs]
        lines.append(
            f"| {size} | {number} | {best['peers']} | {best['here']} ({ratio[0]}) | {best['scaled']} ({ratio[1]}) "
            f"| {best['peers, cropped']} | {best['here, cropped']} ({ratio[2]}) |"
        )
    return lines


def difference(folder: Path) -> str:
    """Returns a sentence on how far pixels of a scaled decode are from the exact ones."""
    exact, scaled = (
        ImageData("folder", folder, SIZE, val_size=2, resident=True, decode=how) for how in (None, "scaled")
    )
    ids = torch.arange(len(exact.train_targets))
    images = [data.get_batch("train", ids).inputs.int() for data in (exact, scaled)]
    gap = (images[0] - images[1]).abs().flatten()
    most = int((gap.bincount().cumsum(0) < 0.99 * len(gap)).sum())
    return f"{gap.float().mean():.2f} levels of 255 on average, 99 % of them by {most} at most"


def report(rounds: int, count: int, workers: list[int]) -> str:
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = [
        "| JPEG | workers | DataLoader, resized and cropped | here, the same pixels | here, `data.decode=scaled` "
        "| DataLoader, random resized crop, flip | here, the same on the device |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as place:
        for size in SIDES:
            lines += from_disk(Path(place, size), size, count if size == "500x375" else count // 2, workers, rounds)
        lines += [
            "",
            f"Pixels of 1600x1200 differ by {difference(Path(place, '1600x1200'))} where they are decoded scaled.",
        ]
        folder = Path(place, "500x375")
        rates = measured(
            {name: ours(folder, 0, steps, resident=True, epoch_size=640) for name, steps in RECIPES.items()},
            rounds,
            time.process_time,
        )
    lines += ["", "| images in memory, one thread | images a second |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {max(values):.0f} |" for name, values in rates.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second, beside torchvision's DataLoader.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=192, help="JPEGs of the smaller size")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--into", type=Path, help="a page whose part <!-- photos --> is written anew")
    options = parser.parse_args()
    text = report(options.rounds, options.count, options.workers)
    print(text)
    if options.into:
        options.into.write_text(between_marks(options.into.read_text(), "photos", text))


if __name__ == "__main__":
    main()
