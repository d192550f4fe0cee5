"""Pictures with masks: scenes of digits that need no download, and a user's own folders.

    litdistill train experiment=segmentation/digit_scenes
    litdistill train data=masks data.root=streets data.size=[256,512] task=segmentation net@student=fcn_slim

A folder of one's own holds `images/` and `masks/`, whose files have the same names but for the suffix. Both may have the
folders `train/`, `val/` and `test/`. A mask is a PNG of one channel, gray or of a palette, whose values are the classes, 255
where a pixel does not count.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.decode import ORIENTATION, decode, extensions, formats, sides
from litdistill.data.sources import DIGITS
from litdistill.data.tensors import TEST_SEED, TEST_SHARE, VAL_SEED, TensorData, TensorSource, TensorSplit
from litdistill.tasks.detection.scenes import TESTED, check_options, compose
from litdistill.tasks.segmentation.metrics import IGNORED, MOST
from litdistill.utils.errors import UserError
from litdistill.utils.modality import Modality
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
FEW = 5  # files that are named
NO_LABEL = -1


def digit_masks(count: int = 1250, size: int = 64, **options: Any) -> TensorData:
    """Returns the scenes of `litdistill.tasks.detection.scenes.digit_scenes` with their masks: the class of the digit that is
    drawn at each pixel, and `ground`.

    Args:
        count: scenes to train on, the validation set included. size: pixels of a side, 32 to 160.
        options: those of `TensorData`.
    """
    check_options(count, size)
    read = functools.partial(_read_scenes, count, size)
    return TensorData(read, "digit_scenes_masks", "segmentation", standardize=True, **options)


def _read_scenes(count: int, size: int) -> TensorSource:
    train, test = compose(count, size, "train"), compose(TESTED, size, "test")
    whole, tested = (TensorSplit(scenes.images, scenes.masks) for scenes in (train, test))
    return TensorSource(whole, tested, ("ground", *DIGITS), Modality(), geometry="mask")


def masks(
    root: str | Path | None = None,
    size: int | Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    unlabelled: bool = False,
    **options: Any,
) -> TensorData:
    """Returns pictures and masks of a user's folder; see the module docstring for its layout.

    Without a folder `test`, a fifth of the pictures with a mask are the test set, and without `val` `val_size` of the others
    the validation set, both the same for every seed.

    Args:
        root: the folder. size: the side, or height and width, to which pictures and masks are resized (bilinear; nearest);
            None: as they are, all of one size.
        classes: their names, from 0 on; None: `class 0`, … up to the largest in a mask.
        unlabelled: whether pictures to train on may lack a mask; their labels are then −1, and the teacher alone says what is
            there.
        options: those of `TensorData`.

    Raises `UserError` for files that do not fit, with how many and the first of their names.
    """
    if root is None:
        raise UserError("data=masks needs data.root, a folder that holds images/ and masks/.")
    shape = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
    if shape is not None and (len(shape) != 2 or min(shape) < 1):
        raise UserError(f"data.size={size} must be a number of pixels, or height and width.")
    names = None if classes is None else tuple(map(str, classes))
    read = functools.partial(_read_folder, Path(root), shape, names, unlabelled, options.get("val_size", 0.1))
    return TensorData(read, Path(root).name, "segmentation", standardize=True, **options)


class Files(NamedTuple):
    """The pictures of a split in the order of their names, and the mask of each; None where there is none."""

    pictures: list[Path]
    masks: list[Path | None]


def _read_folder(
    root: Path, size: tuple[int, ...] | None, names: tuple[str, ...] | None, unlabelled: bool, val_size: float
) -> TensorSource:
    splits = find_files(root, unlabelled)
    check_sizes(splits.values(), size)
    read = {split: _read(files, size) for split, files in splits.items()}
    largest = max(int(torch.where(found.targets == IGNORED, 0, found.targets).max()) for found in read.values())
    names = names or tuple(f"class {i}" for i in range(largest + 1))
    _check_classes(splits, read, names)
    train, test, validation = read["train"], read.get("test"), None
    if test is None:
        tested, rest = _held_out(train, TEST_SEED, TEST_SHARE, "test")
        train, test = train.rows(rest), train.rows(tested)
    if "val" in read:
        validation = torch.arange(len(read["val"].inputs)) + len(train.inputs)
        train = TensorSplit(*(torch.cat(pair) for pair in zip(train, read["val"], strict=True)))
    elif unlabelled:
        validation, _ = _held_out(train, VAL_SEED, val_size, "validate")
    without = int((train.targets == NO_LABEL).flatten(1).all(1).sum())
    log.info(
        "Read %s: %s of %dx%d with masks of %s to train and validate on%s, %d to test.",
        *(
            root,
            quantity(len(train.inputs) - without, "picture"),
            *train.inputs.shape[2:],
            quantity(len(names), "class"),
        ),
        f", {without} without a mask to train on" if without else "",
        len(test.inputs),
    )
    return TensorSource(train, test, names, Modality(), validation, geometry="mask")


def _held_out(found: TensorSplit, seed: int, share: float, purpose: str) -> tuple[Tensor, Tensor]:
    """Returns the ids of a share of the pictures with a mask, or so many of them, and those of all others, sorted."""
    every = torch.arange(len(found.inputs))
    ids = aug.order(seed, 0, every[(found.targets != NO_LABEL).flatten(1).any(1)])
    count = round(share * len(ids)) if share < 1 else int(share)
    if not 0 < count < len(ids):
        raise UserError(
            f"There are {quantity(len(ids), 'picture')} with a mask, of which {count} would be to {purpose}: add some, or give "
            "the folders train, val and test."
        )
    held = ids[:count].sort().values
    return held, every[~torch.isin(every, held)]


def find_files(root: Path, unlabelled: bool) -> dict[str, Files]:
    """Returns the files of each split, "train" alone where the folders have no splits. Raises `UserError` for a folder of
    another layout, and for pictures without a mask unless they are `unlabelled` ones to train on."""
    for folder in (root, root / "images", root / "masks"):
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}: data.root is one that holds images/ and masks/.")
    parts = [split for split in SPLITS if (root / "images" / split).is_dir()]
    if parts and "train" not in parts:
        raise UserError(
            f"{root / 'images'} has {' and '.join(parts)}, and no train: name the folder to train on train."
        )
    found, lonely = {}, []
    for split in parts or ["train"]:
        pictures, of_masks = (_by_stem(root / kind / (split if parts else "")) for kind in ("images", "masks"))
        if not pictures:
            raise UserError(f"{root / 'images' / (split if parts else '')} holds no picture ({', '.join(SHOWN)}, …).")
        without = [path for stem, path in pictures.items() if stem not in of_masks]
        if without and not (unlabelled and split == "train"):
            more = "" if split != "train" else ", or allow them to train on without labels (data.unlabelled=true)"
            raise UserError(
                f"{quantity(len(without), 'picture')} of {len(pictures)} in {without[0].parent} lack a mask of the same name: "
                f"{_few(without)}. Add the masks, leave the pictures out{more}."
            )
        lonely += [path for stem, path in of_masks.items() if stem not in pictures]
        found[split] = Files(list(pictures.values()), [of_masks.get(stem) for stem in pictures])
    if lonely:
        log.warning("%s no picture, and are left out: %s.", f"{quantity(len(lonely), 'mask')} have", _few(lonely))
    return found


SHOWN = (".png", ".jpg", ".webp")


def _by_stem(folder: Path) -> dict[str, Path]:
    """Returns the pictures in a folder by their names without the suffix, sorted. Raises `UserError` for two of one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.suffix.lower() not in extensions() or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path.name} have the same name but for the suffix: leave one of them out."
            )
        found[path.stem] = path
    return found


def _few(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:FEW]) + (", …" if len(paths) > FEW else "")


def check_sizes(splits: Collection[Files], size: tuple[int, ...] | None) -> None:
    """Raises `UserError` where masks are not of their picture's size; and without `size`, for pictures of several sizes."""
    pictures = {path: _upright_size(path) for files in splits for path in files.pictures}
    pairs = [pair for files in splits for pair in zip(files.pictures, files.masks, strict=True)]
    wrong = [(p, m, own) for p, m in pairs if m is not None and (own := sides(m)) is not None and own != pictures[p]]
    if wrong:
        picture, mask, own = wrong[0]
        sizes = [f"{wide}x{tall}" for wide, tall in (own, pictures[picture])]
        raise UserError(
            f"{quantity(len(wrong), 'mask')} of {len(pairs)} have another size than their picture: {mask} is {sizes[0]}, and "
            f"{picture.name} {sizes[1]}. Draw them at the size of the picture, or resize both."
        )
    found = Counter(pictures.values())
    if size is None and len(found) > 1:
        shown = ", ".join(f"{count} of {wide}x{tall}" for (wide, tall), count in found.most_common(3))
        raise UserError(f"Pictures are of {len(found)} sizes ({shown}): set data.size=[height,width].")


def _upright_size(path: Path) -> tuple[int, int]:
    """Returns width and height of a picture that is turned upright. Raises `UserError` where it cannot be read."""
    found = sides(path)
    if found is None:
        raise UserError(f"The picture {path} cannot be read. Replace it, or leave it out.")
    with contextlib.suppress(Exception), Image.open(path, formats=formats()) as opened:
        if opened.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8):
            return found[::-1]
    return found


def _read(files: Files, size: tuple[int, ...] | None) -> TensorSplit:
    height, width = size or _upright_size(files.pictures[0])[::-1]
    inputs = np.empty((len(files.pictures), 3, height, width), np.uint8)
    targets = np.full((len(files.pictures), height, width), NO_LABEL, np.int64)
    for i, (picture, mask) in enumerate(zip(files.pictures, files.masks, strict=True)):
        inputs[i] = decode(picture, picture, 3, height, width)
        if mask is not None:
            targets[i] = read_mask(mask, height, width)
    return TensorSplit(torch.from_numpy(inputs), torch.from_numpy(targets))


def read_mask(path: Path, height: int, width: int) -> np.ndarray:
    """Returns the classes of a mask, (H, W), resized (nearest) to just cover H x W and center-cropped, as `decode` does with
    its picture. Raises `UserError` for a file that holds no classes."""
    try:
        with Image.open(path, formats=formats()) as opened:
            opened.load()
            image, kind = opened, opened.format
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        raise UserError(f"The mask {path} cannot be read ({' '.join(str(error).split())}). Replace it.") from error
    if kind in ("JPEG", "MPO", "WEBP") or image.mode not in ("1", "L", "P", "I;16", "I"):
        what = f"a {kind}" if kind in ("JPEG", "MPO", "WEBP") else f"a picture of colors ({image.mode})"
        raise UserError(
            f"{path} is {what}, and a mask is a PNG of one channel, gray or of a palette, whose values are the classes."
        )
    wide, tall = image.size
    side, length = (width, wide) if width * tall >= height * wide else (height, tall)
    scaled = [max(least, n * side // length) for n, least in zip(image.size, (width, height), strict=True)]
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    columns, rows = (
        np.minimum(((np.arange(count) + start + 0.5) * n / many).astype(np.int64), n - 1)
        for count, start, n, many in zip((width, height), (left, top), image.size, scaled, strict=True)
    )
    return np.asarray(image).astype(np.int64)[rows[:, None], columns]


def _check_classes(splits: Mapping[str, Files], read: Mapping[str, TensorSplit], names: Sequence[str]) -> None:
    """Raises `UserError` for masks with a class that has no name."""
    wrong: list[str] = []
    for split, files in splits.items():
        beyond = torch.where(read[split].targets == IGNORED, 0, read[split].targets).flatten(1).amax(1)
        wrong += [f"{files.pictures[i].stem} ({int(beyond[i])})" for i in range(len(beyond)) if beyond[i] >= len(names)]
    if wrong:
        raise UserError(
            f"{quantity(len(wrong), 'mask')} hold a class beyond the {len(names)} of data.classes, which count from 0: "
            f"{', '.join(wrong[:FEW])}{', …' * (len(wrong) > FEW)}. Name all; {IGNORED} is for pixels that do not count."
        )
    if len(names) > MOST:
        raise UserError(f"There are {len(names)} classes, and a mask has {MOST} at most, 0 to {MOST - 1}.")
