"""What an exported detector finds in pictures, or which class each pixel is: as JSON, drawn on the picture, and in a line.

Boxes and masks are those of the picture as viewers show it, turned by its EXIF orientation, and not of the network's input,
into which it was fitted (`litdistill.data.decode.letterbox`). NumPy and Pillow suffice.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from litdistill.data.decode import Letterboxed, letterbox, upright
from litdistill.export.readers import batches
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_atomically, write_text
from litdistill.utils.manifest import BOXES, ExportMetadata
from litdistill.utils.palette import palette
from litdistill.utils.text import one_line
from litdistill.utils.units import quantity

RESULTS = "predictions.json"
SHOWN = 6  # boxes in a line
SMALLEST = 320  # pixels of the longer side of a drawing; a smaller picture is enlarged
# Of the classes in turn (Okabe & Ito 2008, told apart by the color-blind), and of their names.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
Run = Callable[[np.ndarray], np.ndarray]


def predict_pictures(
    run: Run, facts: ExportMetadata, paths: Sequence[str | Path], out: Path | None = None, score: float = 0.5
) -> list[dict[str, Any]]:
    """Returns for each picture `{"image", "width", "height"}` with `boxes` or `areas`, and draws them into `out` if given.

    `boxes`: `{"class", "index", "score", "box"}` of at least that `score`, best first; a box is x1, y1, x2, y2 in pixels.
    `areas`: `{"class", "index", "share"}` of the pixels of each class that is there, largest first. In `out`: the drawings
    (`drawn` names each), of masks also the class of each pixel as a PNG (`mask`), and all as `predictions.json`, which is
    written for the pictures that were finished also where a later one cannot be read.
    """
    channels, height, width = _shape(facts)
    if out is not None:
        _prepare(out)
    found: list[dict[str, Any]] = []
    taken: set[str] = set()
    try:
        for some in batches(paths):
            for path in some:
                fitted = letterbox(path, path, channels, height, width)
                raw = run(fitted.pixels[None])[0]
                mask: np.ndarray | None = None
                about: dict[str, Any] = {"image": str(path), "width": fitted.sides[0], "height": fitted.sides[1]}
                if facts.kind == BOXES:
                    about["boxes"] = boxes_of(raw, fitted, facts, score)
                else:
                    mask = mask_of(raw, fitted, facts)
                    about["areas"] = areas_of(mask, facts)
                if out is not None:
                    about |= _drawn(path, about, mask, out, taken)
                found.append(about)
    finally:
        if out is not None and found:
            write_text(out / RESULTS, json.dumps(found, indent=2) + "\n")
    return found


def boxes_of(rows: np.ndarray, fitted: Letterboxed, facts: ExportMetadata, score: float) -> list[dict[str, Any]]:
    """Returns the detections (K, 6) of one picture in its own pixels. Raises `UserError` for numbers that are none."""
    if not np.isfinite(rows).all():
        raise UserError(
            "The student's boxes are no finite numbers, so that it finds nothing. Its weights are damaged, or its training "
            "diverged: export another run."
        )
    rows = rows[(rows[:, 5] >= 0) & (rows[:, 4] >= score)].astype(np.float64)
    sides = np.array(fitted.sides * 2, np.float64)
    places = np.clip(rows[:, :4] * sides / np.array(fitted.inside * 2), 0, sides)
    if (rows[:, 5] >= len(facts.classes)).any():
        raise UserError(f"The file finds class {int(rows[:, 5].max())}, and its manifest names {len(facts.classes)}.")
    return [
        {
            "class": facts.classes[int(row[5])],
            "index": int(row[5]),
            "score": float(row[4]),
            "box": box.round(2).tolist(),
        }
        for row, box in zip(rows, places, strict=True)
        if box[2] > box[0] and box[3] > box[1]  # not beside the picture
    ]


def mask_of(classes: np.ndarray, fitted: Letterboxed, facts: ExportMetadata) -> np.ndarray:
    """Returns the class of each pixel of a picture (H, W) uint8 or int32, from a mask (h, w) of the network's input."""
    if classes.min() < 0 or classes.max() >= len(facts.classes):
        raise UserError(
            f"The file gives classes up to {int(classes.max())}, and its manifest names {len(facts.classes)}."
        )
    wide, tall = fitted.inside
    inner = classes[:tall, :wide].astype(np.uint8 if len(facts.classes) <= 256 else np.int32)
    return np.asarray(Image.fromarray(inner).resize(fitted.sides, Image.Resampling.NEAREST))


def areas_of(mask: np.ndarray, facts: ExportMetadata) -> list[dict[str, Any]]:
    """Returns the classes that are there, and their shares of the pixels, largest first."""
    counts = Counter(dict(enumerate(np.bincount(mask.ravel(), minlength=len(facts.classes)).tolist())))
    return [{"class": facts.classes[i], "index": i, "share": n / mask.size} for i, n in counts.most_common() if n]


def line(one: dict[str, Any]) -> str:
    """Returns what was found in one picture, in a line."""
    if "areas" in one:
        return ", ".join(f"{a['class']} {100 * a['share']:.1f} %" for a in one["areas"][:SHOWN])
    boxes = one["boxes"]
    if not boxes:
        return "nothing"
    said = [f"{b['class']} {b['score']:.2f} at {' '.join(f'{x:.0f}' for x in b['box'])}" for b in boxes[:SHOWN]]
    more = [f"{len(boxes) - SHOWN} more"] if len(boxes) > SHOWN else []
    return f"{quantity(len(boxes), 'box')}: " + "; ".join(said + more)


def new_folder(name: str = "predictions") -> Path:
    """Returns a folder of that name that is not there yet, numbered from the second on."""
    number = 1
    while (path := Path(name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def _shape(facts: ExportMetadata) -> tuple[int, int, int]:
    if len(facts.input_shape) != 3 or facts.input_shape[0] not in (1, 3) or max(facts.input_shape) > 8192:
        raise UserError(
            f"The student takes inputs of {facts.input_shape}; pictures are gray or RGB: run it from Python."
        )
    channels, height, width = facts.input_shape
    return channels, height, width


def _prepare(out: Path) -> None:
    if (out / RESULTS).exists():
        raise UserError(
            f"--out {one_line(out)}: there are results in it already. Name another folder, or remove {RESULTS}."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {one_line(out)} cannot be made: {error.strerror}. Name another folder.") from error


def _drawn(
    path: str | Path, about: dict[str, Any], mask: np.ndarray | None, out: Path, taken: set[str]
) -> dict[str, str]:
    """Writes the drawing of a picture, and its mask; returns their names."""
    stem = name = Path(path).stem
    number = 1
    while name in taken or (out / f"{name}.png").exists():
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    files = {"drawn": f"{name}.png"} | ({} if mask is None else {"mask": f"{name}-classes.png"})
    try:
        image = upright(path, path)
        image = _with_boxes(image, about["boxes"]) if mask is None else _with_mask(image, mask)
        images = [image] if mask is None else [image, _with_palette(mask)]
    except OSError as error:
        raise UserError(f"{one_line(path)} cannot be drawn on: {error.strerror or error}.") from error
    for file, made in zip(files.values(), images, strict=True):
        write_atomically(out / file, functools.partial(made.save, format="PNG"))
    return files


def _with_boxes(image: Image.Image, boxes: Sequence[dict[str, Any]]) -> Image.Image:
    factor = max(1, SMALLEST // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    drawing, thick = ImageDraw.Draw(image), max(1, max(image.size) // 320)
    font = ImageFont.load_default(max(10, min(image.size) // 32))
    for box in reversed(boxes):  # the best lies on top
        color, (x1, y1, x2, y2) = COLORS[box["index"] % len(COLORS)], (factor * x for x in box["box"])
        drawing.rectangle(
            (x1, y1, x2 - 1 if x2 - 1 > x1 else x1, y2 - 1 if y2 - 1 > y1 else y1), outline=color, width=thick
        )
        text = f"{box['class']} {box['score']:.2f}"
        left, top, right, bottom = drawing.textbbox((0, 0), text, font=font)
        at = min(x1, max(0, image.width - right)), y1 - bottom - 1 if y1 > bottom else y1 + thick
        drawing.rectangle((at[0] + left, at[1] + top, at[0] + right, at[1] + bottom), fill=color)
        drawing.text(at, text, fill="black", font=font)
    return image


def _with_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    colored = Image.fromarray(np.array(palette(int(mask.max()) + 1), np.uint8)[mask])
    return Image.blend(image, colored, 0.5)


def _with_palette(mask: np.ndarray) -> Image.Image:
    """Returns a mask whose pixels are its classes, and which viewers show in their colors; one of 32 bits has none."""
    image = Image.fromarray(mask)
    if image.mode == "L":
        image.putpalette([value for color in palette(256) for value in color])
    return image
