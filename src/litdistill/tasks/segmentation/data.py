"""Pictures with masks: scenes of digits that need no download, and a user's own folders.

    litdistill train experiment=segmentation/digit_scenes
    litdistill train data=masks data.root=streets data.size=[256,512] task=segmentation net@student=fcn_slim

A folder of one's own holds `images/` and `masks/`, whose files have the same names but for the suffix. Both may have the
folders `train/`, `val/` and `test/`. A mask is a PNG of one channel, gray or of a palette, whose values are the classes, 255
where a pixel does not count.
"""

from __future__ import annotations

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
from litdistill.data.decode import extensions, formats, letterbox, sides
from litdistill.data.sources import DIGITS
from litdistill.data.tensors import TEST_SEED, TEST_SHARE, VAL_SEED, TensorData, TensorSource, TensorSplit
from litdistill.tasks.detection.annotated import check_memory, first_names, refuse
from litdistill.tasks.detection.scenes import TESTED, check_options, compose
from litdistill.tasks.segmentation.metrics import IGNORED, MOST
from litdistill.utils.errors import UserError
from litdistill.utils.modality import Modality
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
LONGEST = 8192  # pixels of a side of `data.size`
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
        root: the folder. size: the side, or height and width, into which pictures and masks are fitted as a whole (bilinear;
            nearest), at the left and top; None: as they are, all of one size.
        classes: their names, from 0 on; None: `class 0`, … up to the largest in a mask.
        unlabelled: whether pictures to train on may lack a mask; their labels are then −1, and the teacher alone says what is
            there.
        options: those of `TensorData`.

    Raises `UserError` for files that do not fit, with how many and the first of their names.
    """
    shape = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
    if shape is not None and (len(shape) != 2 or not all(type(n) is int and 1 <= n <= LONGEST for n in shape)):
        raise UserError(f"data.size={size} must be a number of pixels, or height and width, up to {LONGEST} each.")
    names = None if classes is None else (classes,) if isinstance(classes, str) else tuple(map(str, classes))
    if names is not None and len(set(names)) < max(len(names), 2):
        raise UserError(f"data.classes={list(names)} must be the names of two classes at least, each once.")
    read = functools.partial(_read_folder, root, shape, names, unlabelled, options.get("val_size", 0.1))
    return TensorData(read, Path(root or "masks").name, "segmentation", standardize=True, **options)


class Files(NamedTuple):
    """The pictures of a split in the order of their names, and the mask of each; None where there is none."""

    pictures: list[Path]
    masks: list[Path | None]


def _read_folder(
    place: str | Path | None,
    size: tuple[int, ...] | None,
    names: tuple[str, ...] | None,
    unlabelled: bool,
    val_size: float,
) -> TensorSource:
    if place is None:
        raise UserError("data=masks needs the folder that holds images/ and masks/: data.root=<folder>.")
    root = Path(place)
    splits = find_files(root, unlabelled)
    height, width = size or _common_size(splits.values())
    check_memory(sum(len(files.pictures) for files in splits.values()), (height, width))
    read = {split: _read(files, height, width) for split, files in splits.items()}
    for split, found in read.items():
        if not bool(((found.targets != IGNORED) & (found.targets != NO_LABEL)).any()):
            raise UserError(
                f"No pixel of the masks in {root} ({split}) has a class: all are {IGNORED}, or there is no mask."
            )
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
        log.warning("Masks without a picture, left out: %d (%s).", len(lonely), _few(lonely))
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
    return first_names([path.name for path in paths])


def _common_size(splits: Collection[Files]) -> tuple[int, int]:
    """Returns the height and width of all pictures. Raises `UserError` for pictures of several sizes."""
    found = Counter(size for files in splits for path in files.pictures if (size := sides(path)) is not None)
    if len(found) > 1:
        shown = ", ".join(f"{count} of {wide}x{tall}" for (wide, tall), count in found.most_common(3))
        raise UserError(f"Pictures are of {len(found)} sizes ({shown}): set data.size=[height,width].")
    if not found:
        raise UserError(f"None of the pictures can be read, such as {next(iter(splits)).pictures[0]}. Replace them.")
    wide, tall = next(iter(found))
    return tall, wide


def _read(files: Files, height: int, width: int) -> TensorSplit:
    """Returns pictures and masks fitted into H x W; what is beside the picture does not count. Raises `UserError` for masks of
    another size than their picture."""
    inputs = np.empty((len(files.pictures), 3, height, width), np.uint8)
    targets = np.full((len(files.pictures), height, width), NO_LABEL, np.int64)
    wrong: list[str] = []
    broken: dict[str, UserError] = {}
    for i, (path, file) in enumerate(zip(files.pictures, files.masks, strict=True)):
        try:
            mask = None if file is None else open_mask(file)
            picture = letterbox(path, one_line(path), 3, height, width, None if mask is None else mask.size)
        except UserError as error:
            broken[path.name] = error
            continue
        inputs[i] = picture.pixels
        if mask is None:
            continue
        if mask.size != picture.sides:
            sizes = [f"{wide}x{tall}" for wide, tall in (mask.size, picture.sides)]
            wrong.append(f"{one_line(file)} is {sizes[0]}, and its picture {sizes[1]}")
            continue
        wide, tall = picture.inside
        targets[i] = IGNORED
        targets[i, :tall, :wide] = np.asarray(mask.resize((wide, tall), Image.Resampling.NEAREST))
    refuse(broken)
    if wrong:
        raise UserError(
            f"{quantity(len(wrong), 'mask')} of {len(files.masks)} have another size than their picture: {wrong[0]}. Draw them "
            "at the size of the picture, or resize both."
        )
    return TensorSplit(torch.from_numpy(inputs), torch.from_numpy(targets))


def open_mask(path: Path) -> Image.Image:
    """Returns a mask whose pixels are its classes. Raises `UserError` for a file that holds none."""
    try:
        with Image.open(path, formats=formats()) as opened:
            opened.load()
            image, kind = opened.copy(), opened.format
            if image.mode == "I" and int(np.asarray(image).min()) < 0:
                raise ValueError("it holds numbers below 0")
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        raise UserError(
            f"The mask {one_line(path)} cannot be read ({' '.join(str(error).split())}). Replace it."
        ) from error
    lossy = kind in ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
    if lossy or image.mode not in ("1", "L", "P", "I;16", "I"):
        what = f"a {kind}" if lossy else f"a picture of colors ({image.mode})"
        raise UserError(
            f"{one_line(path)} is {what}, and a mask is a PNG of one channel, gray or of a palette, whose values are the "
            "classes."
        )
    return image


def _check_classes(splits: Mapping[str, Files], read: Mapping[str, TensorSplit], names: Sequence[str]) -> None:
    """Raises `UserError` for masks with a class that has no name."""
    wrong: list[str] = []
    for split, files in splits.items():
        beyond = torch.where(read[split].targets == IGNORED, 0, read[split].targets).flatten(1).amax(1)
        wrong += [f"{files.pictures[i].stem} ({int(beyond[i])})" for i in range(len(beyond)) if beyond[i] >= len(names)]
    if wrong:
        raise UserError(
            f"{quantity(len(wrong), 'mask')} hold a class beyond the {len(names)} of data.classes, which count from 0: "
            f"{first_names(wrong)}. Name all; {IGNORED} is for pixels that do not count."
        )
    if len(names) > MOST:
        raise UserError(f"There are {len(names)} classes, and a mask has {MOST} at most, 0 to {MOST - 1}.")
