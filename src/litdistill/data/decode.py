"""Decoding of one image file to uint8 pixels with Pillow and NumPy alone; training and `predict` share it."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from litdistill.utils.errors import UserError

MAX_ASPECT_RATIO = 200  # an image is resized before it is cropped, which bounds the memory that this takes


def decode(file: str | Path | IO[bytes], name: str | Path, channels: int, height: int, width: int) -> np.ndarray:
    """Returns (C, H, W) uint8: gray or RGB (`channels` 1 or 3), resized to just cover H x W and center-cropped.

    For a square this equals torchvision's Resize and CenterCrop. Pixels of 16 bits are scaled to 8. Raises `UserError` with
    `name` for an image that cannot be read, that has 32-bit pixels (of unknown range), or whose sides differ more than
    `MAX_ASPECT_RATIO` times.
    """
    try:
        with Image.open(file) as opened:
            wide, tall = opened.size
            if max(wide, tall) > MAX_ASPECT_RATIO * min(wide, tall):
                raise ValueError(f"it is {wide} x {tall} pixels: crop it to the part of interest")
            image = _in_8_bits(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all raised by Pillow
        raise UserError(f"The image {name} cannot be read ({error}). Replace it, or leave it out.") from error
    fitting = (
        (width, wide) if width * tall >= height * wide else (height, tall)
    )  # target and source length of the side that fits
    size = [side * fitting[0] // fitting[1] for side in image.size]
    image = image.resize((max(size[0], width), max(size[1], height)), Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scales gray images of 16 bits to 8 bits, which Pillow's `convert` would clip at 255; returns others unchanged."""
    # Pillow before 11 opens a 16-bit PNG in mode "I", and every version a 16-bit PGM.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, of unknown range: save it in 8 or 16 bits")
    return image
