"""Decoding of one image file to uint8 pixels with Pillow and NumPy alone; training and `predict` share it."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

MAX_ASPECT_RATIO = 200  # an image is resized before it is cropped, which bounds the memory that this takes
GROUND = (255, 255, 255)  # transparent pictures are laid on white, as browsers and viewers show them
BESIDE = 114  # of 255: the gray beside a picture that is fitted in whole, about the mean of photographs

# Raster formats by Pillow's names, those that it has loaded from the start first. Pillow reads others too, and some by running
# programs: it hands PostScript to Ghostscript, whatever the file is called.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "DIB", "ICO", "CUR", "ICNS"),
    *("TGA", "PCX", "SGI", "SUN", "QOI", "DDS", "PSD", "XBM", "XPM", "MSP"),
)

# What turns a picture upright, by its EXIF orientation (tag 0x0112); 1 is upright. EXIF 2.32, 4.6.4.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that are read here; HEIF (.heic) is, where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def extensions() -> frozenset[str]:
    """Returns the extensions of image files that are read here, in lower case with their dot."""
    read = {*formats(), "MPO"}  # several JPEGs in one file, opened by the reader of JPEG
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in read)


def decode(
    file: str | Path | IO[bytes], name: str | Path, channels: int, height: int, width: int, scaled: bool = False
) -> np.ndarray:
    """Returns (C, H, W) uint8: gray or RGB (`channels` 1 or 3), resized to just cover H x W and center-cropped.

    The image is turned upright by its EXIF orientation, laid on white where it is transparent, and pixels of 16 bits are
    scaled to 8; of an animation the first frame is taken. For a square the rest equals torchvision's Resize and CenterCrop.
    `scaled`: a JPEG of twice the size or more is decoded at 1/2, 1/4 or 1/8 of it, which is faster, and then resized.
    Raises `UserError` with `name` for an image that cannot be read, that has 32-bit pixels (of unknown range), or whose sides
    differ more than `MAX_ASPECT_RATIO` times.
    """
    image = _read(file, name, channels, (height, width) if scaled else None)
    wide, tall = image.size
    fitting = (
        (width, wide) if width * tall >= height * wide else (height, tall)
    )  # target and source length of the side that fits
    size = [side * fitting[0] // fitting[1] for side in image.size]
    image = image.resize((max(size[0], width), max(size[1], height)), Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return _pixels(image.crop((left, top, left + width, top + height)))


class Letterboxed(NamedTuple):
    """A whole picture within H x W, at the top left of a gray ground."""

    pixels: np.ndarray  # (C, H, W) uint8
    inside: tuple[int, int]  # the width and height that the picture takes of it
    sides: tuple[int, int]  # its own width and height in pixels, as it was turned


def letterbox(
    file: str | Path | IO[bytes],
    name: str | Path,
    channels: int,
    height: int,
    width: int,
    stated: tuple[int, int] | None = None,
) -> Letterboxed:
    """Returns the whole picture, resized to just fit within H x W with its aspect kept; boxes are scaled by `inside / sides`.

    It is read as by `decode`. `stated`: the width and height that annotations state; a picture that has these sides as it is
    stored, and others when it is turned upright, is not turned. Raises `UserError` with `name`, as `decode` does.
    """
    image = _read(file, name, channels, None, stated)
    wide, tall = image.size
    scale = min(width / wide, height / tall)
    inside = (max(1, min(width, round(wide * scale))), max(1, min(height, round(tall * scale))))
    ground = Image.new(image.mode, (width, height), (BESIDE,) * 3 if channels == 3 else BESIDE)
    ground.paste(image.resize(inside, Image.Resampling.BILINEAR), (0, 0))
    return Letterboxed(_pixels(ground), inside, (wide, tall))


def upright(file: str | Path | IO[bytes], name: str | Path) -> Image.Image:
    """Returns the whole picture in RGB as it is, read as by `decode`."""
    return _read(file, name, 3, None)


def _read(
    file: str | Path | IO[bytes],
    name: str | Path,
    channels: int,
    smallest: tuple[int, int] | None,
    stated: tuple[int, int] | None = None,
) -> Image.Image:
    """Returns an image upright, gray or RGB. `smallest`: the height and width that a JPEG may be decoded down to."""
    try:
        with Image.open(file, formats=formats()) as opened:
            wide, tall = opened.size
            if max(wide, tall) > MAX_ASPECT_RATIO * min(wide, tall):
                raise ValueError(f"it is {wide} x {tall} pixels: crop it to the part of interest")
            if smallest is not None and opened.format in ("JPEG", "MPO"):
                opened.draft(None, (max(smallest),) * 2)  # never smaller, lying or upright
            opened.load()
            plain = _on_white(_in_8_bits(opened)).convert("RGB" if channels == 3 else "L")
            upright = _upright(plain, opened)
            return plain if stated == plain.size != upright.size else upright
    except Exception as error:  # Pillow's readers raise many kinds for a damaged file
        raise UserError(
            f"The image {one_line(name)} cannot be read ({_reason(error)}). Replace it, or leave it out."
        ) from error


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def sides(file: str | Path) -> tuple[int, int] | None:
    """Returns an image's sides in pixels, of its head alone; None where it cannot be read."""
    try:
        with Image.open(file, formats=formats()) as opened:
            return opened.size
    except Exception:  # as in `decode`, which reports them
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message names a buffer, not the file
        return "it is no image of a format that is read here"
    return " ".join(str(error).split()) or type(error).__name__


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turns the image by the EXIF orientation of its file; a damaged EXIF block turns nothing, as in viewers.

    Pillow's TIFF reader turns the image itself and drops the tag, so this comes after `load`.
    """
    turn = None
    with contextlib.suppress(Exception):
        turn = UPRIGHT.get(opened.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """Lays an image with transparency, by an alpha channel or by one color (PNG's tRNS, GIF), on white."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    ground = Image.new("RGB", image.size, GROUND)
    ground.paste(layer, mask=layer)
    return ground


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scales gray images of 16 bits to 8 bits, which Pillow's `convert` would clip at 255; returns others unchanged."""
    # Pillow before 11 opens a 16-bit PNG in mode "I", and every version a 16-bit PGM.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.asarray(image).astype(np.uint32)
        gray = ((levels + 128) // 257).astype(np.uint8)
        clear = image.info.get("transparency")  # the one level that is transparent
        return Image.fromarray(gray if clear is None else np.where(levels == clear, np.uint8(GROUND[0]), gray))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, of unknown range: save it in 8 or 16 bits")
    return image
