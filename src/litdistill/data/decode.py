"""One image file as the pixels that a network takes, the same for training and for `predict`: Pillow and NumPy alone."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from litdistill.utils.errors import UserError

LONGEST = 200  # times as long as wide; an image is resized before it is cropped, and memory has an end


def decode(file: str | Path | IO[bytes], name: str | Path, channels: int, height: int, width: int) -> np.ndarray:
    """(C, H, W) uint8: in grey or RGB (`channels` 1 or 3), resized to just cover H x W and its centre cropped.

    For a square as torchvision's Resize and CenterCrop do. Pixels of 16 bits are scaled to 8. Raises `UserError` with
    `name` for an image that cannot be read, whose white nobody knows (numbers of 32 bits), or that is too long (`LONGEST`).
    """
    try:
        with Image.open(file) as opened:
            wide, tall = opened.size
            if max(wide, tall) > LONGEST * min(wide, tall):
                raise ValueError(f"it is {wide} x {tall} pixels: crop it to what is to be seen")
            image = _in_8_bits(opened).convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise UserError(f"The image {name} cannot be read ({error}). Replace it, or leave it out.") from error
    tight = (width, wide) if width * tall >= height * wide else (height, tall)  # the side that just fits
    size = [side * tight[0] // tight[1] for side in image.size]
    image = image.resize((max(size[0], width), max(size[1], height)), Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The image itself but for grey of more bits, which Pillow's `convert` would cut off at 255."""
    # As "I" older ones than Pillow 11 open a PNG of 16 bits, and all of them such a PGM.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, of which none is known as white: save it in 8 or 16 bits")
    return image
