"""Attacks and corruptions against what they are defined as, temperature scaling against a search of its own."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from litdistill.evaluation import attacks, robustness
from litdistill.evaluation.calibration import BOUNDS, fit_temperature

torch.set_num_threads(1)


def images(n: int = 6, channels: int = 1, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def network(channels: int = 1, side: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def seen(net: nn.Module):
    """As a network normalizes that takes images from 0 to 1: to floats of about one."""
    return lambda x: net((255 * x - 120) / 70)


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_fgsm_is_a_step_along_the_sign_of_the_gradient_in_float64():
    net, x, y = network(), images(), torch.arange(6) % 4
    attacked = robustness.attacked(attacks.fgsm, seen(net), x, y, 9)
    exact = network().double()
    there = x.double().requires_grad_()
    loss = -exact((there - 120) / 70).log_softmax(1)[range(6), y].mean()
    (gradient,) = torch.autograd.grad(loss, there)
    assert (gradient.abs() > 1e-9).all()  # where it is zero, rounding would decide
    expected = (x.double() + 9 * gradient.sign()).clamp(0, 255)
    assert torch.equal(attacked.double(), expected)


def test_a_gradient_that_float32_rounds_to_zero_is_followed_nonetheless():
    """A network that is surer than float32 can say: its loss is zero there, and so is its gradient."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    net[1].weight.copy_(torch.stack([torch.ones(64), -torch.ones(64)]) / 10)
    net[1].bias.zero_()
    x, y = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8), torch.tensor([0])
    shallow = lambda v: net(17 * v)  # noqa: E731
    there = (x / 255).requires_grad_()
    F.cross_entropy(shallow(there), y).backward()
    assert (there.grad == 0).all()
    attacked = robustness.attacked(attacks.fgsm, shallow, x, y, 8)
    assert (attacked == 192).all()  # away from what speaks for the label


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 999), st.sampled_from([1, 3]))
def test_attacks_stay_in_the_ball_and_give_whole_levels(epsilon, steps, seed, channels):
    net, x, y = network(channels), images(5, channels, seed=seed), torch.arange(5) % 4
    for attack in (
        attacks.fgsm,
        partial(attacks.pgd, steps=steps, seed=seed),
        partial(attacks.square, queries=steps + 1),
    ):
        changed = robustness.attacked(attack, seen(net), x, y, epsilon)
        assert changed.dtype == torch.uint8  # so that none leaves 0 to 255 ...
        assert (changed.int() - x.int()).abs().max() <= epsilon  # ... by wrapping around either


def test_pgd_ends_where_a_step_by_step_ascent_in_numpy_ends():
    """The same start, the same gradient by hand: of a linear classifier's loss it is (softmax - onehot) @ weights."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 64))
    x, y, epsilon, steps = images(4), torch.tensor([0, 1, 2, 0]), 12, 5
    net = lambda v: v.flatten(1) @ torch.from_numpy(weights.T).float()  # noqa: E731
    found = robustness.attacked(partial(attacks.pgd, steps=steps, seed=3), net, x, y, epsilon)
    clean = x.flatten(1).double().numpy()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)).flatten(1).double().numpy()
    low, high = np.maximum(clean - epsilon, 0), np.minimum(clean + epsilon, 255)
    v = np.clip(clean + epsilon * (2 * noise - 1), low, high)
    for _ in range(steps):
        logits = v / 255 @ weights.T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        gradient = (p - np.eye(3)[y]) @ weights
        v = np.clip(v + 2.5 * epsilon / steps * np.sign(gradient), low, high)
    difference = np.abs(found.flatten(1).double().numpy() - v)
    assert difference.max() <= 0.5 + 1e-3  # rounded to whole levels


def test_pgd_finds_at_least_the_loss_that_fgsm_finds_on_a_curved_network():
    net, x, y = network(), images(64), torch.arange(64) % 4
    loss = lambda v: F.cross_entropy(seen(net)(v / 255), y).item()  # noqa: E731
    clean, (one, many) = (
        loss(x),
        (loss(robustness.attacked(attack, seen(net), x, y, 16)) for attack in robustness.STRENGTHS["quick"].values()),
    )
    assert clean < one <= many * 1.001


def test_attacked_in_batches_is_attacked_at_once():
    net, x, y = network(), images(7), torch.arange(7) % 4
    whole = robustness.attacked(attacks.fgsm, seen(net), x, y, 5)
    assert torch.equal(robustness.attacked(attacks.fgsm, seen(net), x, y, 5, batch=3), whole)


def test_the_page_counts_an_image_where_it_is_right_as_it_is_and_under_each_attack(monkeypatch):
    """Of a network that knows an image by its first pixel: 0 to 3 at 0, 10, 20 and 30 levels."""
    steps = torch.tensor([0.0, 10.0, 20.0, 30.0])
    predict = lambda v: -(v[:, 0, 0, :1].float() - steps).abs()  # noqa: E731
    x = torch.tensor([0, 10, 20, 31], dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    y = torch.tensor([0, 1, 2, 0])  # the last is misclassified as it is
    moved = {"up": lambda f, v, t, e: v + e * (v < 0.05), "down": lambda f, v, t, e: v - e * (v > 0.07) * 1.5}
    monkeypatch.setitem(robustness.STRENGTHS, "quick", moved)
    found = robustness.under_attacks(predict, lambda v: v, x, y, [4, 20], "quick")
    assert found == {"up": [0.75, 0.75, 0.25], "down": [0.75, 0.5, 0.5], robustness.ALL: [0.75, 0.5, 0.0]}


def test_strong_attacks_are_those_that_robust_accuracy_is_measured_with():
    assert robustness.STRENGTHS["strong"] is attacks.ATTACKS


# -- corruptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (4, 3, 20, 12)])
def test_a_corruption_gives_images_of_that_kind_and_the_same_ones_again(name, shape):
    corrupt, x = robustness.CORRUPTIONS[name], images(*shape)
    before, state = x.clone(), torch.get_rng_state()
    for severity in robustness.SEVERITIES:
        changed = corrupt(x, severity)
        assert changed.shape == x.shape
        assert changed.dtype == torch.uint8
        assert torch.equal(changed, corrupt(x, severity))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)  # a report changes no training


@pytest.mark.parametrize("name", [n for n in robustness.CORRUPTIONS if n != "pixelate"])
def test_a_greater_severity_is_farther_from_the_image(name):
    """On a smooth picture; pixelation depends on where its few coarse pixels fall."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    picture = (120 + 100 * torch.sin(y / 3.0) * torch.cos(x / 2.0)).to(torch.uint8).expand(4, 1, 32, 32)
    distance = [
        (robustness.CORRUPTIONS[name](picture, s).float() - picture.float()).square().mean().item()
        for s in robustness.SEVERITIES
    ]
    assert distance[0] > 0
    assert distance == sorted(distance)


def test_noise_contrast_and_brightness_are_what_the_paper_says():
    flat = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    for severity, deviation in zip(robustness.SEVERITIES, robustness.NOISE, strict=True):
        if deviation < 0.2:  # beyond that black and white cut it off
            noisy = robustness.gaussian_noise(flat, severity).double() / 255
            assert noisy.std().item() == pytest.approx(deviation, rel=0.02)
            assert noisy.mean().item() == pytest.approx(128 / 255, abs=0.003)
    x = images(3, 3)
    mean = x.double().mean((2, 3), keepdim=True)
    expected = ((x - mean) * 0.3 + mean).clamp(0, 255)
    assert (robustness.contrast(x, 4).double() - expected).abs().max() <= 0.5001
    gray = images(3, 1)
    expected = (gray.double() + 0.3 * 255).clamp(max=255)
    assert (robustness.brightness(gray, 5).double() - expected).abs().max() <= 0.5001


def test_brightness_is_added_to_the_value_of_hsv():
    """Against the standard library's own conversion."""
    import colorsys

    x = images(1, 3, 4, 4)
    brighter = robustness.brightness(x, 2)
    for row in range(4):
        for column in range(4):
            h, s, v = colorsys.rgb_to_hsv(*(x[0, :, row, column].double() / 255).tolist())
            expected = colorsys.hsv_to_rgb(h, s, min(v + 0.1, 1))
            assert brighter[0, :, row, column].tolist() == pytest.approx([255 * c for c in expected], abs=0.51)
    black = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert (robustness.brightness(black, 5) == round(0.3 * 255)).all()


def test_blur_is_a_gaussian():
    """A single white pixel spreads as scipy's Gaussian filter spreads it."""
    from scipy.ndimage import gaussian_filter

    x = torch.zeros(1, 1, 21, 21, dtype=torch.uint8)
    x[0, 0, 10, 10] = 255
    for severity, sigma in zip(robustness.SEVERITIES, robustness.BLUR, strict=True):
        expected = gaussian_filter(x[0, 0].double().numpy(), sigma)
        assert np.abs(robustness.blur(x, severity)[0, 0].double().numpy() - expected).max() <= 0.6


def test_shift_moves_the_images_by_turns_and_leaves_black_behind():
    x = torch.zeros(8, 1, 20, 20, dtype=torch.uint8)
    x[:, :, 10, 10] = 255
    moved = robustness.shift(x, 2)  # a tenth of 20 pixels
    places = [tuple(torch.nonzero(image[0])[0].tolist()) for image in moved]
    assert places == [(8, 10), (10, 12), (12, 10), (10, 8)] * 2
    assert all(int(image.sum()) == 255 for image in moved)
    assert torch.nonzero(robustness.shift(x[:1, :, 6:14, 6:14], 1))[0].tolist() == [0, 0, 3, 4]  # one pixel at least


def test_pixelate_averages_and_jpeg_keeps_flat_images():
    x = images(2, 1, 8, 8)
    coarse = robustness.pixelate(x, 5)  # 5 pixels a side
    assert 1 < len(coarse[0].unique()) <= 25
    assert coarse.double().mean().item() == pytest.approx(x.double().mean().item(), abs=12)
    flat = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    for severity in robustness.SEVERITIES:
        assert (robustness.jpeg(flat, severity).int() - 77).abs().max() <= 1
    tiny = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 2, 2)
    assert torch.equal(robustness.pixelate(tiny, 5), tiny)


def test_accuracy_is_the_share_of_right_classes():
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 3])]
    assert robustness.accuracy(lambda x: logits, images(5), torch.tensor([0, 1, 1, 3, 0])) == pytest.approx(3 / 5)


# -- temperature scaling -----------------------------------------------------------------------------------------------


def nll(logits: np.ndarray, targets: np.ndarray, t: float) -> float:
    z = logits / t
    return float(np.mean(np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), targets]))


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_temperature_has_the_least_nll_of_a_fine_grid(seed, scale):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 5, 300)
    logits = scale * (rng.normal(size=(300, 5)) + 1.5 * np.eye(5)[targets])
    t = fit_temperature(torch.from_numpy(logits).float(), torch.from_numpy(targets))
    grid = np.exp(np.linspace(*np.log(BOUNDS), 4001))
    values = [nll(logits, targets, g) for g in grid]
    assert nll(logits, targets, t) <= min(values) + 1e-9
    assert t == pytest.approx(grid[int(np.argmin(values))], rel=2e-3)


def test_logits_that_are_made_surer_get_that_much_more_temperature():
    torch.manual_seed(0)
    logits, targets = torch.randn(400, 6), torch.randint(6, (400,))
    logits[range(400), targets] += 2
    once = fit_temperature(logits, targets)
    assert fit_temperature(3 * logits, targets) == pytest.approx(3 * once, rel=1e-4)
    assert math.isclose(fit_temperature(once**-1 * logits, targets), 1, rel_tol=1e-4)


def test_a_validation_set_without_a_mistake_gives_a_bound_and_no_overflow():
    targets = torch.arange(20) % 4
    t = fit_temperature(100 * F.one_hot(targets, 4).float(), targets)
    assert BOUNDS[0] <= t <= BOUNDS[1]
    assert math.isfinite(nll(100 * np.eye(4)[targets.numpy()], targets.numpy(), t))
