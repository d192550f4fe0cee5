"""Image files as pixels, the same in training and for `predict`: what Pillow alone would turn white, black or huge."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from litdistill.data.datamodule import ImageData
from litdistill.data.decode import ORIENTATION, decode, extensions, letterbox
from litdistill.data.folder import FolderFiles
from litdistill.data.streaming import Encoded
from litdistill.export.readers import read_images
from litdistill.utils.errors import UserError


def train(path, channels=1, size=8):
    return Encoded(FolderFiles([path]), size, channels, "").decode([0]).numpy()


def use(path, channels=1, size=8):
    return read_images([path], (channels, size, size))


PLACES = pytest.mark.parametrize("read", [train, use])
RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


@PLACES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (40, 25), (25, 40), (5, 7), (300, 8), (19, 8)])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_images_are_brought_to_size_as_torchvision_does(tmp_path, read, channels, size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    Image.fromarray(noise).convert("RGB").convert(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        plain = image.convert("RGB" if channels == 3 else "L")
    expected = np.asarray(Compose([Resize(8, InterpolationMode.BILINEAR), CenterCrop(8)])(plain))
    expected = expected.reshape(8, 8, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(read(tmp_path / "a.png", channels), expected[None])


@pytest.mark.parametrize("shape", [(1, 8, 20), (3, 20, 8), (1, 7, 31)])
@pytest.mark.parametrize("size", [(40, 25), (25, 40), (20, 8), (9, 9), (33, 7)])
def test_images_fill_a_shape_that_is_not_square(tmp_path, shape, size):
    Image.new("RGB", size, (200, 200, 200)).save(tmp_path / "a.png")
    images = read_images([tmp_path / "a.png"], shape)
    assert images.shape == (1, *shape)
    assert (images == 200).all()  # nothing but the image, so no border


@PLACES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "a.pgm"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path, read, channels, name):
    path = tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes())
    elif name == "big-endian.tif":
        Image.frombytes("I;16B", (8, 8), RAMP.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(RAMP).save(path)
    expected = np.broadcast_to(np.rint(RAMP / 257), (1, channels, 8, 8))
    np.testing.assert_array_equal(read(path, channels), expected)


@PLACES
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_of_32_bits_are_refused_with_what_to_do(tmp_path, read, kind):
    Image.fromarray(RAMP.astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be read .*32 bits.*save it in 8 or 16 bits"):
        read(tmp_path / "a.tif")


@PLACES
def test_an_image_that_is_all_length_is_refused_before_it_fills_the_memory(tmp_path, read):
    Image.new("L", (2001, 10)).save(tmp_path / "long.png")
    Image.new("L", (2000, 10), 7).save(tmp_path / "shorter.png")
    with pytest.raises(UserError, match=r"long\.png cannot be read .*2001 x 10 pixels: crop it"):
        read(tmp_path / "long.png")
    assert (read(tmp_path / "shorter.png") == 7).all()


# -- transparency ------------------------------------------------------------------------------------------------------

DISK = np.asarray([[0, 0, 0, 0], [0, 255, 255, 0], [0, 255, 128, 0], [0, 0, 0, 0]], np.uint8)  # opacity
ON_WHITE = [[255] * 4, [255, 0, 0, 255], [255, 0, 127, 255], [255] * 4]  # black ink of that opacity


def transparent(kind: str, path) -> list[list[int]]:
    """Saves black ink on a transparent ground that is black beneath; returns the gray values that a viewer shows."""
    opaque = np.where(DISK > 0, 0, 255).tolist()  # where there is all or nothing
    ink = Image.fromarray(np.where(DISK > 0, 0, 40).astype(np.uint8))
    if kind in ("RGBA", "LA"):
        black = Image.new(kind[:-1], (4, 4))
        black.putalpha(Image.fromarray(DISK))
        black.save(path)
        return ON_WHITE
    if kind == "P with a value for each color":  # a palette of black and black
        picture = Image.fromarray((DISK // 64).astype(np.uint8), "P")
        picture.putpalette([0] * 768)
        picture.save(path, transparency=bytes([0, 0, 128, 255]))
        return ON_WHITE
    if kind == "P":
        picture = Image.fromarray((DISK > 0).astype(np.uint8), "P")
        picture.putpalette([0] * 768)
        picture.save(path, transparency=0)
    elif kind == "I;16":
        Image.fromarray(np.where(DISK > 0, 0, 4000).astype(np.uint16)).save(path, transparency=4000)
    elif kind == "1":
        Image.fromarray(DISK > 0).convert("1").point(lambda v: 255 - v).save(path, transparency=255)
    else:
        ink.convert(kind).save(path, transparency=40 if kind == "L" else (40, 40, 40))
    return opaque


@PLACES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P with a value for each color", "L", "RGB", "I;16", "1"])
def test_transparent_pictures_are_laid_on_white(tmp_path, read, kind, channels):
    shown = transparent(kind, tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png", channels, 4), np.broadcast_to(shown, (1, channels, 4, 4)))


@PLACES
def test_a_transparent_gif_is_laid_on_white_and_its_first_frame_is_read(tmp_path, read):
    frames = [Image.fromarray(np.full((4, 4), i, np.uint8), "P") for i in (1, 2)]
    frames[0].putpixel((0, 0), 0)
    for frame in frames:
        frame.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0] + [0] * 759)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], transparency=0, disposal=2)
    (image,) = read(tmp_path / "a.gif", 3, 4)
    assert image[:, 0, 0].tolist() == [255, 255, 255]
    assert image[:, 1, 1].tolist() == [200, 0, 0]


# -- orientation -------------------------------------------------------------------------------------------------------


@PLACES
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_pictures_are_turned_upright_by_their_exif_orientation(tmp_path, read, name, orientation):
    """The reference is Pillow's own `exif_transpose`, saved without any tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    Image.fromarray(noise).resize((18, 12)).save(tmp_path / name, exif=exif, quality=95)
    with Image.open(tmp_path / name) as image:
        image.load()
        ImageOps.exif_transpose(image).save(tmp_path / "upright.bmp")
    np.testing.assert_array_equal(read(tmp_path / name, 3), read(tmp_path / "upright.bmp", 3))
    with Image.open(tmp_path / "upright.bmp") as upright:
        assert upright.size == ((12, 18) if orientation > 4 else (18, 12))


@PLACES
def test_a_damaged_exif_block_and_an_unknown_orientation_leave_a_picture_as_it_is(tmp_path, read):
    Image.new("RGB", (9, 6), (0, 0, 200)).save(tmp_path / "plain.png")
    for number, exif in enumerate((b"Exif\0\0MM\0*\0\0\0\x08\0", b"no exif")):
        Image.new("RGB", (9, 6), (0, 0, 200)).save(tmp_path / f"{number}.png", exif=exif)
        np.testing.assert_array_equal(read(tmp_path / f"{number}.png", 3), read(tmp_path / "plain.png", 3))
    unknown = Image.Exif()
    unknown[0x0112] = 9
    Image.new("RGB", (9, 6), (0, 0, 200)).save(tmp_path / "9.png", exif=unknown)
    np.testing.assert_array_equal(read(tmp_path / "9.png", 3), read(tmp_path / "plain.png", 3))


# -- what else may lie there -------------------------------------------------------------------------------------------


@PLACES
def test_no_program_is_run_for_a_picture(tmp_path, read, monkeypatch):
    """Pillow runs Ghostscript for PostScript, whatever a file's name."""
    Image.new("RGB", (9, 6)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program ran"))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program ran"))
    with pytest.raises(UserError, match=r"a\.png cannot be read \(it is no image of a format that is read here\)"):
        read(tmp_path / "a.png")


@PLACES
def test_whatever_a_reader_raises_names_the_file(tmp_path, read, monkeypatch):
    Image.new("RGB", (9, 6)).save(tmp_path / "a\n\x1b[31m.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: {}["a"])
    with pytest.raises(UserError, match=r"a\?\?\[31m\.png cannot be read \('a'\)"):
        read(tmp_path / "a\n\x1b[31m.png")


def test_common_formats_are_read():
    assert {".jpg", ".jfif", ".png", ".gif", ".webp", ".avif", ".bmp", ".tif", ".tga", ".ico", ".jp2"} <= extensions()
    assert not extensions() & {".eps", ".ps", ".pdf", ".h5", ".wmf", ".mpg", ".txt"}


def test_a_scaled_decode_is_near_the_exact_one_and_of_large_jpegs_alone(tmp_path):
    picture = Image.fromarray(load_sample_image("china.jpg"))
    for size, suffix, same in (((640, 427), "jpg", False), ((110, 90), "jpg", True), ((640, 427), "png", True)):
        path = tmp_path / f"{size[0]}.{suffix}"
        picture.resize(size).save(path, **({"quality": 95} if suffix == "jpg" else {}))
        exact, scaled = (decode(path, path, 3, 64, 64, flag).astype(int) for flag in (False, True))
        assert (exact == scaled).all() == same
        assert abs(exact - scaled).mean() < 4


def test_a_scaled_decode_is_of_training_images_and_not_of_test_images(tmp_path):
    picture = Image.fromarray(load_sample_image("flower.jpg"))
    for split in ("train", "test"):
        for name in ("a", "b"):
            for i in range(2):
                path = tmp_path / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.crop((90 * i, 0, 400 + 90 * i + 9 * (name == "a"), 400 - (split == "test"))).save(path)
    for resident in (True, False):
        options = {"image_size": 48, "val_size": 2, "resident": resident, "workers": 0}
        exact, scaled = (ImageData("folder", tmp_path, decode=how, **options) for how in (None, "scaled"))
        ids = torch.arange(4)
        assert not torch.equal(exact.get_batch("train", ids).inputs, scaled.get_batch("train", ids).inputs)
        assert torch.equal(exact.get_batch("test", ids).inputs, scaled.get_batch("test", ids).inputs)
        assert exact.identity("train") != scaled.identity("train")


# -- the whole picture ---------------------------------------------------------------------------------------------------


def stripes(width: int, height: int, exif: int | None = None, kind: str = "PNG") -> io.BytesIO:
    """A picture that is red in its left half and blue in its right half, as it is stored."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    file, options = io.BytesIO(), {}
    if exif is not None:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = exif
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("size", "target", "inside"),
    [
        ((640, 480), (96, 128), (128, 96)),
        ((200, 100), (64, 64), (64, 32)),
        ((10, 30), (60, 60), (20, 60)),
        ((199, 1), (8, 8), (8, 1)),
    ],
)
def test_a_letterboxed_picture_is_whole_and_keeps_its_aspect(size, target, inside):
    found = letterbox(stripes(*size), "x", 3, *target)
    assert (found.pixels.shape, found.pixels.dtype) == ((3, *target), np.uint8)
    assert (found.inside, found.sides) == (inside, size)
    wide, tall = inside
    assert found.pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert found.pixels[:, tall - 1, wide - 1].tolist() == [0, 0, 255]
    beside = np.ones(target, bool)
    beside[:tall, :wide] = False
    assert (found.pixels[:, beside] == 114).all()


def test_a_letterboxed_gray_picture_has_one_channel():
    assert letterbox(stripes(8, 4), "x", 1, 8, 8).pixels.shape == (1, 8, 8)


def test_a_picture_is_turned_upright_unless_its_annotation_is_of_the_stored_one():
    turned = letterbox(stripes(40, 20, 6, "JPEG"), "x", 3, 40, 40)
    assert turned.sides == (20, 40)  # a quarter to the right: red is on top
    assert turned.pixels[0, 2, 2] > 200 > 50 > turned.pixels[0, 37, 2]
    for stated, sides in (((20, 40), (20, 40)), ((40, 20), (40, 20)), ((99, 9), (20, 40))):
        assert letterbox(stripes(40, 20, 6, "JPEG"), "x", 3, 40, 40, stated).sides == sides
    assert letterbox(stripes(30, 30, 6, "JPEG"), "x", 3, 30, 30, (30, 30)).pixels[0, 2, 25] > 200  # no doubt: upright


def test_a_picture_that_cannot_be_letterboxed_is_named():
    with pytest.raises(UserError, match=r"^The image x\.jpg cannot be read"):
        letterbox(io.BytesIO(b"no picture"), "x.jpg", 3, 8, 8)
