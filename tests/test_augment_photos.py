"""RandomResizedCrop, RandomErasing and ColorJitter in batches against torchvision's, image by image."""

import pytest
import torch
import torchvision.transforms as published
import torchvision.transforms.functional as tv
import torchvision.transforms.v2.functional as tv2
from scipy.stats import chi2, ks_2samp

from litdistill.data import augment as aug
from litdistill.data import crops
from litdistill.data.colors import STEPS, ColorJitter
from litdistill.data.crops import RandomErasing, RandomResizedCrop
from litdistill.data.datamodule import ImageData
from litdistill.data.named import augmentations
from litdistill.utils.errors import UserError
from tests.pictures import pictures


def codes(augment: aug.Augmentation, n: int, seed: int = 0) -> torch.Tensor:
    return augment.draw(aug.random_bits(seed, 0, torch.arange(n), 1))


@pytest.mark.parametrize("shape", [(3, 40, 56), (1, 28, 28), (3, 33, 33)])
@pytest.mark.parametrize("size", [None, 24, (50, 20)])
def test_a_crop_is_torchvisions_resized_crop_of_the_same_box(shape, size):
    augment, images = RandomResizedCrop((0.1, 1), size=size), pictures(40, *shape)
    code = codes(augment, 40)
    found = augment.apply(images, code)
    boxes = torch.stack(augment.boxes(code, *shape[1:]), 1).tolist()
    out = list(augment.size or shape[1:])
    assert found.shape == (40, shape[0], *out)
    for image, box, one in zip(images, boxes, found, strict=True):
        assert torch.equal(one, tv2.resized_crop(image, *box, out, antialias=True))


@pytest.mark.parametrize("size", [(33, 29), (16, 16), (64, 50)])
def test_the_product_for_accelerators_differs_by_one_level_at_most(size):
    """Its weights, on the CPU, against torchvision's crop of floats."""
    augment, images = RandomResizedCrop((0.1, 1)), pictures(30, 3, 40, 56)
    top, left, height, width = boxes = augment.boxes(codes(augment, 30), 40, 56)
    rows, cols = crops._weights(top, height, 40, size[0]), crops._weights(left, width, 56, size[1])
    found = rows[:, None] @ images.float() @ cols[:, None].transpose(2, 3)
    in_bytes = crops.resized_crops(images, *boxes, size)
    for i, box in enumerate(torch.stack(boxes, 1).tolist()):
        assert torch.allclose(found[i], tv2.resized_crop(images[i].float(), *box, list(size)), atol=1e-3)
        assert (found[i].round() - in_bytes[i].float()).abs().max() <= 1


@pytest.mark.parametrize("options", [{}, {"scale": (0.08, 1.0), "ratio": (0.5, 1.0)}])
def test_boxes_are_distributed_as_torchvisions(options):
    augment, count = RandomResizedCrop(**options), 4000
    found = augment.boxes(codes(augment, count), 120, 160)
    torch.manual_seed(1)
    image = torch.zeros(1, 120, 160)
    draw = published.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, list(augment.scale), list(augment.ratio)) for _ in range(count)]).T
    for ours, other in zip(
        (*found, found[2] * found[3], found[3] / found[2]),
        (*theirs, theirs[2] * theirs[3], theirs[3] / theirs[2]),
        strict=True,
    ):
        assert ks_2samp(ours.numpy(), other.numpy()).pvalue > 1e-3
    top, left, height, width = found
    for start, length, whole in ((top, height, 120), (left, width, 160)):
        assert int(start.min()) == 0
        assert int((start + length)[length < whole].max()) == whole


def test_a_box_that_never_fits_is_the_middle_as_in_torchvision():
    augment = RandomResizedCrop((1.0, 1.0), (3 / 4, 4 / 3))
    found = augment.boxes(codes(augment, 50), 40, 100)
    expected = published.RandomResizedCrop.get_params(torch.zeros(1, 40, 100), [1.0, 1.0], [3 / 4, 4 / 3])
    assert {tuple(row) for row in torch.stack(found, 1).tolist()} == {tuple(expected)}


@pytest.mark.parametrize("value", [0, 7, [124, 116, 104]])
def test_erasing_is_torchvisions_erase_of_the_same_box(value):
    augment, images = RandomErasing(0.6, value=value), pictures(60, 3, 30, 44)
    code = codes(augment, 60)
    found, boxes = augment.apply(images, code), torch.stack(augment.boxes(code, 30, 44), 1).tolist()
    fill = torch.tensor(augment.value, dtype=torch.uint8).view(-1, 1, 1)
    for image, (top, left, height, width), one in zip(images, boxes, found, strict=True):
        expected = tv.erase(image, top, left, height, width, fill.expand(3, height, width)) if height else image
        assert torch.equal(one, expected)
    assert 0 < sum(height > 0 for _, _, height, _ in boxes) < 60


def test_erased_boxes_are_distributed_as_torchvisions():
    augment, count = RandomErasing(0.25, (0.02, 0.33), (0.3, 3.3)), 8000
    found = torch.stack(augment.boxes(codes(augment, count), 120, 160))
    hit = found[2] > 0
    assert abs(int(hit.sum()) - count / 4) < 4 * (count * 0.25 * 0.75) ** 0.5
    torch.manual_seed(2)
    draw = published.RandomErasing.get_params
    theirs = torch.tensor([draw(torch.zeros(1, 120, 160), (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(2000)]).T
    for ours, other in zip(found[:, hit], theirs, strict=True):
        assert ks_2samp(ours.numpy(), other.numpy()).pvalue > 1e-3
    assert not torch.stack(RandomErasing(0.0).boxes(codes(augment, 100), 9, 9)[2:]).any()
    assert RandomErasing(1.0).boxes(codes(augment, 100), 90, 90)[2].all()
    assert (
        not RandomErasing(1.0, (1.0, 1.0), (1.0, 1.0)).boxes(codes(augment, 100), 9, 9)[2].any()
    )  # the whole image never


@pytest.mark.parametrize("shape", [(3, 20, 33), (1, 16, 16)])
@pytest.mark.parametrize("hue", [0.0, 0.5])
def test_jitter_is_torchvisions_in_the_same_order(shape, hue):
    augment, images = ColorJitter(0.4, (0.2, 1.9), 0.7, hue), pictures(200, *shape)
    code, before = codes(augment, 200), images.clone()
    found, factors, order = augment.apply(images, code), augment.factors(code), augment.order(code)
    assert torch.equal(images, before)
    names = list(augment.ranges)
    for i, image in enumerate(images):
        for step in order[i].tolist():
            image = getattr(tv, f"adjust_{names[step]}")(image, float(factors[names[step]][i]))
        # torchvision turns hues by another formula, in float32: a level apart, which later steps may stretch.
        assert (found[i].int() - image.int()).abs().max() <= (8 if hue and shape[0] == 3 else 0)
    assert not torch.equal(found[2:], images[2:])


def test_a_turned_hue_is_torchvisions_to_one_level():
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = ColorJitter(hue=0.5)
    code = codes(augment, 64)
    found, factors = augment.apply(images, code), augment.factors(code)["hue"]
    expected = torch.stack([tv.adjust_hue(x, float(f)) for x, f in zip(images, factors, strict=True)])
    assert (found.int() - expected.int()).abs().max() <= 1
    assert factors.abs().max() > 0.45


def test_factors_are_uniform_and_orders_equally_likely():
    augment = ColorJitter(0.4, [0.5, 2], 1.5, 0.1)
    code = codes(augment, 24_000)
    expected = dict(zip(STEPS, [(0.6, 1.4), (0.5, 2), (0, 2.5), (-0.1, 0.1)], strict=True))
    for name, factor in augment.factors(code).items():
        low, high = expected[name]
        counts = torch.histc((factor.double() - low) / (high - low), 20, 0, 1)
        assert counts.sum() == 24_000
        assert ((counts - 1200) ** 2 / 1200).sum() < chi2.isf(1e-4, 19)
    apart = torch.corrcoef(torch.stack([*augment.factors(code).values()])) - torch.eye(4)
    assert apart.abs().max() < 0.04  # six standard deviations
    counts = torch.bincount((augment.order(code) * torch.tensor([64, 16, 4, 1])).sum(1))
    counts = counts[counts > 0].double()
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < chi2.isf(1e-4, 23)
    assert list(ColorJitter(contrast=0.1).ranges) == ["contrast"]
    images = pictures(4, 3, 8, 8)
    assert torch.equal(ColorJitter().apply(images, code[:4]), images)


def test_the_masked_form_for_accelerators_is_the_same(monkeypatch):
    """Forced on the CPU, where the branch that selects rows is the rule."""
    augment, images = ColorJitter(0.4, 0.4, 0.4, 0.1), pictures(64, 3, 16, 16)
    code = codes(augment, 64)
    expected = augment.apply(images, code)

    monkeypatch.setattr(aug, "PER_IMAGE", ())
    assert torch.equal(augment.apply(images, code), expected)


def test_names_make_the_augmentations():
    steps = augmentations(
        ["Flip", {"Crop": {"pad": 2}}, {"RandomResizedCrop": {"scale": [0.5, 1]}}, ALL[2], "RandAugment"]
    )
    assert [type(step).__name__ for step in steps] == [
        "Flip",
        "Crop",
        "RandomResizedCrop",
        "ColorJitter",
        "RandAugment",
    ]
    assert steps[1].pad == 2
    assert steps[2].scale == (0.5, 1.0)
    assert steps[3] is ALL[2]
    data = ImageData("digits", augment=["Flip", {"RandomErasing": {"p": 1.0}}])
    data.setup()
    assert data.views is None
    assert not torch.equal(
        data.get_batch("train", torch.arange(9), torch.zeros(9, dtype=torch.int64)).inputs,
        data.get_batch("train", torch.arange(9)).inputs,
    )


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            ["RandomHorizontalFlip"],
            "Write Flip for RandomHorizontalFlip. There are Crop, Flip, .*on the command line: ",
        ),
        (["flop"], "data.augment has flop, which is no augmentation. There are Crop"),
        ("Flip", "data.augment=Flip must be a list"),
        ({"Crop": {"pad": 4}}, "must be a list"),
        (["Crop"], "missing a required argument: 'pad'.*it takes Crop"),
        ([{"Crop": {"padding": 4}}], "Crop with .*it takes Crop"),
        ([{"Crop": 4}], "Crop with 4"),
        ([{"Crop": {}, "Flip": {}}], "no augmentation"),
        ([4], "no augmentation"),
        ([None], "no augmentation"),
        ([torch.nn.ReLU()], "data.augment has ReLU"),
    ],
)
def test_other_names_are_errors_that_say_how_to_write_them(steps, said):
    with pytest.raises(UserError, match=said):
        ImageData("digits", augment=steps)


ALL = [RandomResizedCrop(), aug.Flip(), ColorJitter(0.4, 0.4, 0.4, 0.1), RandomErasing()]


def test_views_are_the_same_in_any_batch_and_differ_by_round_and_seed(monkeypatch):
    images, ids = pictures(50, 3, 24, 24), torch.arange(50)
    assert aug.count_views(ALL) is None
    views = aug.draw_views(ALL, 3, 5, ids)
    whole = aug.apply_views(ALL, images, views, 3, ids)
    assert whole.dtype == torch.uint8
    for part in ids.split(7):
        assert torch.equal(aug.apply_views(ALL, images[part], views[part], 3, part), whole[part])
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(aug.apply_views(ALL, channels_last, views, 3, ids), whole)
    monkeypatch.setattr("litdistill.data.colors.CHUNK", 3 * 24 * 24 * 4)
    assert torch.equal(aug.apply_views(ALL, images, views, 3, ids), whole)
    for seed, round_ in ((3, 6), (4, 5)):
        other = aug.apply_views(ALL, images, torch.full_like(ids, round_), seed, ids)
        assert (other != whole).flatten(1).any(1).sum() > 45


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (RandomResizedCrop, {"scale": (0.5, 0.2)}),
        (RandomResizedCrop, {"scale": (0.0, 1)}),
        (RandomResizedCrop, {"ratio": (1, 2, 3)}),
        (RandomErasing, {"p": 1.5}),
        (RandomErasing, {"value": 256}),
        (ColorJitter, {"brightness": -1}),
        (ColorJitter, {"hue": 0.6}),
        (ColorJitter, {"contrast": [2, 1]}),
    ],
)
def test_impossible_options_are_refused(make, options):
    with pytest.raises(UserError, match=f"{make.__name__}: {next(iter(options))}="):
        make(**options)
