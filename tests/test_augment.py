"""Augmentation and order: pure functions, against plain Python and NumPy."""

import numpy as np
import pytest
import torch

from litdistill.data import augment as aug
from litdistill.utils.errors import UserError

MASK = (1 << 64) - 1


def splitmix64(x: int) -> int:
    """The finaliser as published, with Python's unbounded integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_mix_is_the_published_finaliser():
    numbers = [0, 1, 2**63 - 1, -1, -(2**63), 123456789, -987654321]
    found = aug.splitmix64(torch.tensor(numbers))
    assert [x & MASK for x in found.tolist()] == [splitmix64(x & MASK) for x in numbers]


def test_random_bits_are_uniform_and_independent_of_streams():
    ids = torch.arange(100_000)
    codes = aug.random_bits(0, 0, ids, 1) % 25
    counts = torch.bincount(codes, minlength=25).double()
    chi2 = ((counts - 4000) ** 2 / 4000).sum()
    assert chi2 < 60  # 24 degrees of freedom: exceeded once in 10,000
    pairs = torch.bincount(codes * 2 + aug.random_bits(0, 0, ids, 2) % 2, minlength=50).double()
    assert ((pairs - 2000) ** 2 / 2000).sum() < 95  # 49 degrees of freedom
    assert (aug.random_bits(0, 0, ids, 1) >= 0).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"round": 1}, {"stream": 2}])
def test_random_bits_depend_on_everything(other):
    base = {"seed": 0, "round": 0, "stream": 1}
    ids = torch.arange(1000)
    a, b = aug.random_bits(ids=ids, **base), aug.random_bits(ids=ids, **(base | other))
    assert (a == b).sum() == 0


def test_order_is_a_permutation_that_ignores_how_its_input_is_sorted():
    ids = torch.tensor([5, 900, 17, 3, 44, 18])
    first = aug.order(3, 1, ids)
    assert sorted(first.tolist()) == sorted(ids.tolist())
    assert torch.equal(first, aug.order(3, 1, ids.flip(0)))
    assert any(not torch.equal(first, aug.order(3, epoch, ids)) for epoch in range(2, 6))


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9)])
def test_crop_is_what_numpy_pads_and_slices(mode, shape):
    crop, (_, h, w) = aug.Crop(2, mode), shape
    images = torch.randint(0, 256, (25, *shape), dtype=torch.uint8)
    found = crop.apply(images, torch.arange(25))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="constant" if mode == "zero" else "reflect")
    for code in range(25):
        top, left = divmod(code, 5)
        assert (found[code].numpy() == padded[code, :, top : top + h, left : left + w]).all()
    assert len({x.numpy().tobytes() for x in crop.apply(images[:1].expand(25, -1, -1, -1), torch.arange(25))}) == 25


def test_flip_and_cutout():
    images = torch.randint(1, 256, (2, 3, 6, 7), dtype=torch.uint8)
    flipped = aug.Flip().apply(images, torch.tensor([0, 1]))
    assert torch.equal(flipped[0], images[0])
    assert (flipped[1].numpy() == images[1].numpy()[:, :, ::-1]).all()
    cut = aug.Cutout(4, (6, 7))
    code = torch.tensor([0, 3 * 7 + 4])  # centres (0, 0) and (3, 4)
    found = cut.apply(images, code).numpy()
    expected = images.numpy().copy()
    expected[0, :, 0:2, 0:2] = 0
    expected[1, :, 1:5, 2:6] = 0
    assert (found == expected).all()


def test_views_code_all_steps_and_decode_to_the_same_images():
    steps = [aug.Crop(1), aug.Flip(), aug.Cutout(2, (8, 8))]
    images, ids = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8), torch.arange(200)
    view = aug.draw_views(steps, seed=1, round=4, ids=ids)
    expected = images
    for stream, step in enumerate(steps, start=1):
        expected = step.apply(expected, step.draw(aug.random_bits(1, 4, ids, stream)))
    assert torch.equal(aug.apply_views(steps, images, view), expected)
    assert aug.count_views(steps) == 9 * 2 * 64
    assert view.max() < 9 * 2 * 64


def test_a_wrong_padding_is_refused():
    with pytest.raises(ValueError, match="zero"):
        aug.Crop(2, "mirror")


def test_epochs_cut_an_endless_row_of_rounds():
    ids = torch.arange(50, 60)
    row = torch.cat([aug.order(7, r, ids) for r in range(5)])
    pieces = [aug.epoch_order(7, e, ids, 12) for e in range(4)]
    assert torch.equal(torch.cat([i for i, _ in pieces]), row[:48])
    assert torch.cat([r for _, r in pieces]).tolist() == [n // 10 for n in range(48)]
    whole, rounds = aug.epoch_order(7, 3, ids)
    assert torch.equal(whole, aug.order(7, 3, ids))
    assert rounds.tolist() == [3] * 10


def test_each_sample_can_have_a_round_of_its_own():
    ids, rounds = torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])
    found = aug.random_bits(1, rounds, ids, 1)
    assert found.tolist() == [int(aug.random_bits(1, int(r), i[None], 1)) for r, i in zip(rounds, ids, strict=True)]


@pytest.mark.parametrize("limit", ["TABLE", "CACHED"])
def test_steps_in_a_row_are_one_gather_however_it_is_done(limit, monkeypatch):
    """By a table of pixels, without one, and in parts: the same as NumPy's pad, slice, mirror, pad and slice."""
    steps = [aug.Crop(1), aug.Flip(), aug.Crop(2, "reflect"), aug.Cutout(3, (7, 6)), aug.Flip()]
    images, ids = torch.randint(0, 256, (300, 3, 7, 6), dtype=torch.uint8), torch.arange(300)
    views = aug.draw_views(steps, 0, 2, ids)
    found = aug.apply_views(steps, images, views)
    assert found.stride(1) == 1  # the channels are last in memory
    codes = [step.draw(aug.random_bits(0, 2, ids, stream)).tolist() for stream, step in enumerate(steps, start=1)]
    for n, x in enumerate(images.numpy()):
        first, flip, second, cut, last = (c[n] for c in codes)
        x = np.pad(x, ((0, 0), (1, 1), (1, 1)))[:, first // 3 :, first % 3 :][:, :7, :6]
        x = x[:, :, ::-1] if flip else x
        x = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect")[:, second // 5 :, second % 5 :][:, :7, :6].copy()
        top, left = cut // 6 - 1, cut % 6 - 1
        x[:, max(top, 0) : top + 3, max(left, 0) : left + 3] = 0
        x = x[:, :, ::-1] if last else x
        assert (found[n].numpy() == x).all()
    # Without a table each batch works out its pixels; a batch of too many pixels is moved in parts.
    monkeypatch.setattr(aug, limit, 0 if limit == "TABLE" else 3 * 7 * 6 * 20)
    aug._table.cache_clear()
    assert torch.equal(aug.apply_views(steps, images, views), found)
    aug._table.cache_clear()


class Brighten:
    """A continuous augmentation: the code is the bits themselves."""

    views = None

    def draw(self, bits: torch.Tensor) -> torch.Tensor:
        return bits

    def apply(self, images: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return (images * (code.double() / 2**63)[:, None, None, None]).to(torch.uint8)


@pytest.mark.parametrize("steps", [[aug.Crop(1), Brighten()], [aug.Cutout(1, (2**11, 2**11))] * 3])
def test_views_that_cannot_be_numbered_are_their_rounds(steps):
    ids, rounds = torch.arange(50), torch.arange(50) % 3
    assert aug.count_views(steps) is None
    assert torch.equal(aug.draw_views(steps, 1, rounds, ids), rounds)
    assert aug.draw_views(steps, 1, 7, ids).tolist() == [7] * 50
    images = torch.randint(1, 256, (50, 1, 6, 6), dtype=torch.uint8)
    expected = images
    for stream, step in enumerate(steps, start=1):
        expected = step.apply(expected, step.draw(aug.random_bits(1, rounds, ids, stream)))
    assert torch.equal(aug.apply_views(steps, images, rounds, seed=1, ids=ids), expected)


def test_a_reflection_needs_an_image_larger_than_its_border():
    with pytest.raises(UserError, match="more than 8 pixels"):
        aug.Crop(8, "reflect").apply(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([0]))
