"""Views of sounds: pure functions of (seed, round, id), in any batch, against NumPy."""

import numpy as np
import pytest
import torch

from litdistill.data import augment as aug
from litdistill.data.named import augmentations
from litdistill.data.sound_views import FrequencyMask, Gain, Noise, TimeMask, TimeShift, stretch, unit
from litdistill.utils.errors import UserError

VIEWS = [TimeShift(30), TimeMask(0.3), FrequencyMask(0.3), Gain(6), Noise(0.05)]
BITS = aug.random_bits(0, 0, torch.arange(4000), 1)


def noise(count: int, length: int = 400) -> torch.Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(0)) / 10


def test_a_shift_is_what_numpy_pads_and_slices():
    x, code = noise(61), torch.arange(61)
    found = TimeShift(30).apply(x, code)
    padded = np.pad(x.numpy(), ((0, 0), (30, 30)))
    for i, row in enumerate(found.numpy()):
        assert (row == padded[i, 60 - i : 460 - i]).all()
    assert torch.equal(found[30], x[30])
    assert found[60, :30].abs().max() == 0


def test_a_stretch_is_whole_and_of_every_width_and_place():
    masks = stretch(BITS, 50, 0.2)
    width, edges = masks.sum(1), (masks[:, 1:] != masks[:, :-1]).sum(1)
    assert width.bincount(minlength=11).tolist() == pytest.approx([4000 / 11] * 11, rel=0.25)
    assert width.max() == 10
    assert edges.max() == 2
    assert masks.any(0).all()


def test_a_time_mask_silences_and_a_frequency_mask_removes_a_band():
    x, bits = noise(50), BITS[:50]
    cut = TimeMask(0.3).apply(x, bits)
    hit = stretch(bits, 400, 0.3)
    assert (cut[hit] == 0).all()
    assert torch.equal(cut[~hit], x[~hit])
    banded = FrequencyMask(0.3).apply(x, bits)
    hit = stretch(bits, 201, 0.3)
    before, after = (np.fft.rfft(w.double().numpy()) for w in (x, banded))
    assert np.abs(after[hit.numpy()]).max() < 1e-5
    assert np.abs((after - before)[~hit.numpy()]).max() < 1e-5


def test_gain_and_noise_have_the_stated_spread():
    x = noise(4000, 100)
    decibels = 20 * torch.log10(Gain(6).apply(x, BITS)[:, 0] / x[:, 0])
    assert decibels.abs().max() <= 6.001
    assert float(decibels.std()) == pytest.approx(12 / 12**0.5, rel=0.03)
    added = Noise(0.05).apply(x, BITS) - x
    assert added.std(1).max() < 0.06
    assert float((added.std(1) / (0.05 * unit(BITS))).mean()) == pytest.approx(1, rel=0.02)
    flat = (added / added.std(1, keepdim=True)).double()
    assert float((flat[:, 1:] * flat[:, :-1]).mean()) == pytest.approx(0, abs=0.01)  # white
    assert float((flat[1:] * flat[:-1]).mean()) == pytest.approx(0, abs=0.01)  # and of each sample's own


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: type(v).__name__)
def test_a_view_is_a_function_of_seed_round_and_id_alone(view):
    """Not of the batch: alone, in another order and among others a sample has the same view; another round has another."""
    ids, x = torch.arange(64), noise(64)

    def seen(rows: torch.Tensor, seed: int = 3, number: int = 5) -> torch.Tensor:
        number = aug.draw_views([view], seed, number, ids[rows])
        return aug.apply_views([view], x[rows], number, seed, ids[rows])

    whole = seen(ids)
    assert whole.shape == x.shape
    assert whole.dtype == torch.float32
    order = torch.randperm(64)
    assert torch.allclose(seen(order), whole[order], atol=1e-6)
    assert torch.allclose(torch.cat([seen(i[None]) for i in ids]), whole, atol=1e-6)
    for other in (seen(ids, seed=4), seen(ids, number=6)):
        assert (other - whole).abs().amax(1).gt(1e-4).double().mean() > 0.9


def test_several_views_are_applied_in_order():
    x, ids = noise(20), torch.arange(20)
    found = aug.apply_views(VIEWS, x, aug.draw_views(VIEWS, 0, 1, ids), 0, ids)
    for stream, step in enumerate(VIEWS, 1):
        x = step.apply(x, step.draw(aug.random_bits(0, 1, ids, stream)))
    assert torch.equal(found, x)


def test_inputs_are_left_as_they_are():
    x = noise(8)
    kept = x.clone()
    for view in VIEWS:
        view.apply(x, view.draw(BITS[:8]))
    assert torch.equal(x, kept)


def test_they_are_named_in_a_config():
    shift, mask = augmentations([{"TimeShift": {"samples": 8}}, "TimeMask"])
    assert (shift.samples, mask.most) == (8, 0.2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TimeShift(-1), "samples=-1"),
        (lambda: TimeMask(0), "TimeMask: most=0"),
        (lambda: FrequencyMask(1.5), "FrequencyMask: most=1.5"),
        (lambda: Gain(-3), "decibels=-3"),
        (lambda: TimeMask().apply(torch.zeros(2, 1, 8, 8), BITS[:2]), "augmentation of sounds.*1x8x8: leave it out"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()
