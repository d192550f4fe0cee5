"""Distilled, alone and fine-tuned, side by side, on real pictures in folders: writes docs/photos.md.

    python scripts/photos.py write data_files/photos                     writes the folders of pictures
    python scripts/photos.py run data_files/photos cifar10-20 bccd       trains three seeds of each technique
    python scripts/photos.py table cifar10-20 bccd                       writes docs/photos.md from the finished runs

The pictures are CIFAR-10 as JPEG files, of which few a class are trained on, and blood cells, cut out of the photographs of
BCCD by their boxes. `--bccd` names BCCD's archive where its commit cannot be downloaded.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from litdistill.utils.command_line import literal
from litdistill.utils.units import spread

PER_CLASS = (20, 100, 500)
TEST_PER_CLASS = 100
UNLABELLED = (500, 900)  # of each class: images that no folder above trains on
# All students take 750 steps of 32 pictures. One view_seed: the teacher is asked once for the runs of all seeds.
STUDENT = (
    "experiment=photos/cpu",
    "data.epoch_size=1600",
    "trainer.max_epochs=15",
    "min_steps=750",
    "data.view_seed=0",
)
ONLY = {  # techniques that are tried on some pictures alone
    "unlabelled": ("cifar10-20", "cifar10-100", "cifar10-500"),
    "learned statistics": ("cifar10-20",),
}
TECHNIQUES = {
    "alone": (*STUDENT, "method=supervised", "teacher=null"),
    "distilled": (*STUDENT, "method=kd"),
    "unlabelled": (*STUDENT, "method=kd", "data.unlabelled={unlabelled}"),
    "fine-tuned": ("experiment=photos/fine_tuned_cpu",),
    "learned statistics": ("experiment=photos/fine_tuned_cpu", "student.statistics=learned"),
}
WORDS = {
    "alone": "ConvNet on the labels alone",
    "distilled": "the same ConvNet, distilled",
    "unlabelled": "the same ConvNet, distilled with unlabelled pictures",
    "fine-tuned": "EfficientNet-Lite0, fine-tuned",
    "learned statistics": "EfficientNet-Lite0, fine-tuned with learned statistics",
}


def write_cifar10(folder: Path, root: Path) -> None:
    """Writes `cifar10-<n>/train|test/<class>/*.jpg`: the first n images of each class of the official training set, and the
    first hundred of each class of the official test set; and `cifar10-unlabelled`, 4,000 others of the training set."""
    from litdistill.data.sources import load

    source = load("cifar10", root)
    for per_class in PER_CLASS:
        for split, images, count in (("train", source.train, per_class), ("test", source.test, TEST_PER_CLASS)):
            for label, name in enumerate(source.classes):
                place = folder / f"cifar10-{per_class}" / split / name
                place.mkdir(parents=True, exist_ok=True)
                for i in (images.targets == label).nonzero().flatten()[:count].tolist():
                    pixels = images.images[i].permute(1, 2, 0).contiguous().numpy()
                    Image.fromarray(pixels).save(place / f"{i:05d}.jpg", quality=95)
    place = folder / "cifar10-unlabelled"
    place.mkdir(exist_ok=True)
    for label in range(len(source.classes)):
        for i in (source.train.targets == label).nonzero().flatten()[slice(*UNLABELLED)].tolist():
            pixels = source.train.images[i].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).save(place / f"{i:05d}.jpg", quality=95)


def write_bccd(folder: Path, files: Mapping[str, bytes]) -> Counter[str]:
    """Writes `bccd/train|test/<kind of cell>/*.jpg`, squares around the boxes, by the official split (its validation images
    are trained on); returns how many of each, and of the boxes left out for having no area inside the photograph."""
    written = Counter[str]()
    for split, lists in (("train", ("train", "val")), ("test", ("test",))):
        for name in (line for part in lists for line in files[f"ImageSets/Main/{part}.txt"].decode().split()):
            photograph = Image.open(io.BytesIO(files[f"JPEGImages/{name}.jpg"])).convert("RGB")
            for i, cell in enumerate(ET.fromstring(files[f"Annotations/{name}.xml"]).iter("object")):
                kind = cell.findtext("name", "")
                left, top, right, bottom = (
                    int(cell.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "ymin", "xmax", "ymax")
                )
                box = (max(0, left), max(0, top), min(photograph.width, right), min(photograph.height, bottom))
                if box[2] <= box[0] or box[3] <= box[1]:
                    written["left out"] += 1
                    continue
                place = folder / "bccd" / split / kind
                place.mkdir(parents=True, exist_ok=True)
                photograph.crop(square(box, *photograph.size)).save(place / f"{name}_{i:02d}.jpg", quality=95)
                written[f"{split}/{kind}"] += 1
    return written


def square(box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """Returns the square around a box (left, top, right, bottom), cut off where the photograph ends."""
    left, top, right, bottom = box
    half, x, y = max(right - left, bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
    return (
        round(max(0, x - half)),
        round(max(0, y - half)),
        round(min(width, x + half)),
        round(min(height, y + half)),
    )


def write(folder: Path, root: Path, bccd: Path | None) -> None:
    """Writes all folders of pictures."""
    from litdistill.data.archives import BLOOD_CELLS
    from litdistill.data.fetch import archived

    write_cifar10(folder, root)
    counts = write_bccd(folder, archived("bccd", BLOOD_CELLS, bccd or root))
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def commands(folder: Path, pictures: str, runs: Path) -> list[list[str]]:
    """Returns the arguments of `litdistill train` for each technique on one folder of pictures."""
    shared = [
        f"data.root={literal(str(folder / pictures))}",
        f"name={pictures}",
        f"runs={literal(str(runs))}",
        "seed=0,1,2",
    ]
    unlabelled = literal(str(folder / "cifar10-unlabelled"))
    return [
        [*(option.format(unlabelled=unlabelled) for option in options), f"technique={name}", *shared]
        for name, options in TECHNIQUES.items()
        if pictures in ONLY.get(name, (pictures,))
    ]


def run(folder: Path, pictures: Sequence[str], runs: Path) -> None:
    """Trains three seeds of each technique, with one thread and lowered priority."""
    for name in pictures:
        for arguments in commands(folder, name, runs):
            command = [sys.executable, "-m", "litdistill", "train", "-m", *arguments]
            subprocess.run(
                command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.nice(10)
            )


def table(summaries: Sequence[dict[str, Any]], pictures: Sequence[str]) -> list[str]:
    """Returns the rows of the table in Markdown: mean ± standard deviation over seeds of the test accuracy."""
    lines = [
        "| pictures | trained on | tested on | network | parameters | test accuracy %, last epoch | best epoch | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in pictures:
        found = defaultdict(list)
        for summary in summaries:
            if summary["experiment"] == name:
                found[summary["technique"]].append(summary)
        for technique, words in WORDS.items():
            rows = found.get(technique, [])
            if not rows and name not in ONLY.get(technique, (name,)):
                continue
            if not rows:
                lines.append(f"| {name} | | | {words} | | not run | | |")
                continue
            data, student = rows[0]["data"], rows[0]["student"]
            best, last = ([100 * row["student"]["test"]["accuracy"][k] for row in rows] for k in ("best", "last"))
            sizes = f"{data['train'] + data['val']:,} | {data['test']:,}"
            seeds = ", ".join(str(seed) for seed in sorted(row["seed"] for row in rows))
            lines.append(
                f"| {name} | {sizes} | {words} | {student['params']:,} | {spread(last)} | {spread(best)} | {seeds} |"
            )
    return lines


def write_table(runs: Path, pictures: Sequence[str], page: Path) -> None:
    """Writes the page of results from the summaries of finished runs."""
    from litdistill.report.tables import summaries

    found = summaries([runs / name for name in pictures])
    listed = "\n".join(
        shlex.join(["litdistill", "train", "-m", *arguments])
        for name in pictures
        for arguments in commands(Path("pictures"), name, Path("runs"))
    )
    page.write_text(
        TEXT.format(table="\n".join(table(found, pictures)), commands=listed, pictures=" ".join(pictures)),
        encoding="utf-8",
    )
    print(page.read_text(encoding="utf-8"))


TEXT = """# Photos: distilled, alone, fine-tuned

Three ways to a classifier from a folder of pictures, on real pictures, three seeds each. The page is written by
`scripts/photos.py` from the runs' summaries.

{table}

- The ConvNet (`experiment=photos/cpu`) sees pictures of 32 pixels and takes 750 steps of 32 pictures in each
  row. Its teacher is EfficientNet-Lite0 with ImageNet weights, fine-tuned on the same pictures, which sees them enlarged to
  96 pixels: the row "fine-tuned" is three such networks, and the first of them is the teacher of all students.
- `cifar10-<n>`: the first n images of each class of CIFAR-10's training set as JPEG files, and the first 100 of each class of
  its test set. Unlabelled are 4,000 others of the training set. A tenth of the pictures with labels chooses the best epoch: of
  20 a class that are 20 pictures, which choose badly, so that the last epoch comes first in the table.
- `bccd`: cells cut out of BCCD's photographs by their boxes, by the official split; its validation photographs are trained on.
  Most cells are red ones, so that a network that says nothing else is right for most.

```bash
python scripts/photos.py write pictures
python scripts/photos.py run pictures {pictures}     # which are the commands below
python scripts/photos.py table {pictures}
```

```bash
{commands}
```
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    writes, trains, tabulates = (verbs.add_parser(name) for name in ("write", "run", "table"))
    for verb in (writes, trains):
        verb.add_argument("folder", type=Path)
    writes.add_argument("--root", type=Path, default=Path("data_files"), help="where CIFAR-10 and BCCD are kept")
    writes.add_argument(
        "--bccd", type=Path, help="a copy of BCCD's repository, or its archive, instead of downloading it"
    )
    for verb in (trains, tabulates):
        verb.add_argument("pictures", nargs="+", help="cifar10-20, cifar10-100, cifar10-500, bccd")
        verb.add_argument("--runs", type=Path, default=Path("runs"))
    tabulates.add_argument("--page", type=Path, default=Path("docs/photos.md"))
    options = parser.parse_args(arguments)
    if options.verb == "write":
        write(options.folder, options.root, options.bccd)
    elif options.verb == "run":
        run(options.folder, options.pictures, options.runs)
    else:
        write_table(options.runs, options.pictures, options.page)


if __name__ == "__main__":
    main()
