"""Image files as pixels, the same in training and for `predict`: what Pillow alone would turn white, black or huge."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from litdistill.data.folder import read_split
from litdistill.export.predict import read_images
from litdistill.utils.errors import UserError


def train(path, channels=1, size=8):
    return read_split([path], size, channels).numpy()


def use(path, channels=1, size=8):
    return read_images([path], (channels, size, size))


PLACES = pytest.mark.parametrize("read", [train, use])
RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


@PLACES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (40, 25), (25, 40), (5, 7), (300, 8), (19, 8)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
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
