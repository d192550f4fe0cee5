"""RandAugment in batches against torchvision's, image by image."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandAugment as Published
from torchvision.transforms.autoaugment import _apply_op

from litdistill.data import augment as aug
from litdistill.data.randaugment import CHOICES, RandAugment
from litdistill.utils.errors import UserError
from tests.pictures import pictures

EXACT = {"identity", "brightness", "posterize", "solarize", "equalize", "color", "sharpness"} | {
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
}
NAMES = {"autocontrast": "AutoContrast"}


def published(image: torch.Tensor, choice: str, magnitude: int, bins: int) -> torch.Tensor:
    """What torchvision makes of one image."""
    space = Published()._augmentation_space(bins, tuple(image.shape[1:]))
    name = choice.rstrip("+-")
    name = NAMES.get(name, "".join(part.capitalize() for part in name.split("_")))
    magnitudes, signed = space[name]
    assert signed == (choice[-1] in "+-")
    value = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    return _apply_op(image, name, -value if choice.endswith("-") else value, InterpolationMode.NEAREST, None)


def test_there_are_all_of_torchvisions_operations():
    names = {k.lower() for k in Published()._augmentation_space(31, (32, 32))}
    assert {c.rstrip("+-").replace("_", "") for c in CHOICES} == names


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 20, 33), (1, 8, 8)])
@pytest.mark.parametrize("magnitude", [0, 9, 14, 30])
def test_each_operation_is_torchvisions(shape, magnitude):
    images = pictures(4, *shape)
    augment = RandAugment(1, magnitude)
    for code, choice in enumerate(CHOICES):
        expected = torch.stack([published(x, choice, magnitude, 31) for x in images])
        found = augment.apply(images, torch.full((4,), code))
        if choice.rstrip("+-") in EXACT:
            assert torch.equal(found, expected), choice
        else:
            assert (found.int() - expected.int()).abs().max() <= 1, choice
        if magnitude == 9 and choice not in ("identity", "equalize", "autocontrast", "color+", "color-"):
            assert not torch.equal(found[0], images[0]), choice


def test_a_batch_of_chains_is_each_image_by_itself():
    augment = RandAugment(3, 9)
    images = pictures(256, 3, 16, 16).to(memory_format=torch.channels_last)
    before, code = images.clone(), augment.draw(aug.random_bits(0, 0, torch.arange(256), 1))
    found = augment.apply(images, code)
    assert torch.equal(images, before)
    one = RandAugment(1, 9)
    for x, y, number in zip(images, found, code.tolist(), strict=True):
        for i in (2, 1, 0):
            x = one.apply(x[None], torch.tensor([number // 23**i % 23]))[0]
        assert torch.equal(x, y)  # to the bit, in whatever batch


def test_the_masked_form_for_accelerators_is_the_same(monkeypatch):
    """Forced on the CPU, where the branch that selects rows is the rule."""
    augment, images = RandAugment(2, 12), pictures(64, 3, 16, 16)
    code = augment.draw(aug.random_bits(0, 0, torch.arange(64), 1))
    expected = augment.apply(images, code)

    monkeypatch.setattr(aug, "PER_IMAGE", ())
    assert torch.equal(augment.apply(images, code), expected)


def test_operations_are_drawn_equally_often_and_signs_evenly():
    augment = RandAugment(2)
    code = augment.draw(aug.random_bits(3, 0, torch.arange(280_000), 1))
    assert aug.count_views([augment]) == 23**2
    assert 0 <= code.min() <= code.max() < 23**2
    for layer in (code // 23, code % 23):
        counts = torch.bincount(layer, minlength=23).double()
        expected = torch.tensor([10_000.0 if c[-1] in "+-" else 20_000.0 for c in CHOICES])
        assert ((counts - expected) ** 2 / expected).sum() < 60  # 22 degrees of freedom: exceeded once in 50,000


@pytest.mark.parametrize("options", [{"ops": 0}, {"ops": 13}, {"magnitude": 31}, {"magnitude": -1}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match="RandAugment"):
        RandAugment(**options)
