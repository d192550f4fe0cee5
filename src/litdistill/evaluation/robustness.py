"""A classifier's accuracy under common corruptions and under gradient-based attacks.

All images are uint8 (N, C, H, W) with integer levels from 0 to 255, as an image file stores them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from litdistill.evaluation import attacks

SEVERITIES = (1, 2, 3, 4, 5)
ALL = "all at once"  # the accuracy that is left under whichever attack fools an image

# Hendrycks & Dietterich 2019 (arXiv 1903.12261), section 3, by severity. Constants are those of CIFAR-10-C; the noise is
# ImageNet-C's, since CIFAR-10-C's hardly affects digits of full contrast. Where the definitions differ:
#   brightness  is added to the value of HSV, which for gray images is the level itself;
#   pixelate    keeps at least two pixels a side, since images may be 8 pixels wide;
#   shift       follows MNIST-C's translation instead (Mu & Gilmer 2019, arXiv 1906.02337): by a fraction of the
#               side in one of four directions, filled with black.
# Camera and glass blur, weather and elastic deformations are left out.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation on the scale 0 to 1
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # sigma in pixels
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # factor around the image's mean
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)  # on the scale 0 to 1
JPEG = (80, 65, 58, 50, 40)  # quality
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)  # remaining fraction of the side
SHIFT = (0.05, 0.1, 0.15, 0.2, 0.25)  # fraction of the side


def levels(images: Tensor) -> Tensor:
    """Returns floats on the scale 0 to 1 as uint8, rounded and clipped."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def gaussian_noise(images: Tensor, severity: int) -> Tensor:
    """Adds Gaussian noise; the severity is the seed, so that every call draws the same noise."""
    noise = np.random.default_rng(severity).standard_normal(images.shape, dtype=np.float32)
    return levels(images / 255 + NOISE[severity - 1] * torch.from_numpy(noise))


def blur(images: Tensor, severity: int) -> Tensor:
    """Blurs with a Gaussian, truncated at four sigmas or at the image's size; the border is mirrored."""
    radius = min(round(4 * BLUR[severity - 1]), min(images.shape[2:]) - 1)
    return levels(gaussian_blur(images / 255, [2 * radius + 1] * 2, [BLUR[severity - 1]] * 2))


def contrast(images: Tensor, severity: int) -> Tensor:
    x = images / 255
    mean = x.mean((2, 3), keepdim=True)
    return levels((x - mean) * CONTRAST[severity - 1] + mean)


def brightness(images: Tensor, severity: int) -> Tensor:
    x = images / 255
    value = x.amax(1, keepdim=True)
    brighter = (value + BRIGHTNESS[severity - 1]).clamp(max=1)
    return levels(torch.where(value > 0, x / value.clamp(min=1e-9), 1.0) * brighter)  # keeps hue and saturation


def jpeg(images: Tensor, severity: int) -> Tensor:
    def through(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=JPEG[severity - 1])
        return Image.open(file)

    return _by_pillow(images, through)


def pixelate(images: Tensor, severity: int) -> Tensor:
    def coarse(image: Image.Image) -> Image.Image:
        small = [max(2, int(side * PIXELATE[severity - 1])) for side in image.size]
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)

    return _by_pillow(images, coarse)


def shift(images: Tensor, severity: int) -> Tensor:
    """Shifts the images of a batch by turns up, right, down and left, by one pixel at least."""
    height, width = images.shape[2:]
    moved = torch.zeros_like(images)
    for turn, (up, right) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
        dy = -up * max(1, round(SHIFT[severity - 1] * height))
        dx = right * max(1, round(SHIFT[severity - 1] * width))
        source = images[turn::4, :, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        moved[turn::4, :, max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = source
    return moved


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "Gaussian noise": gaussian_noise,
    "Gaussian blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "JPEG": jpeg,
    "pixelate": pixelate,
    "shift": shift,
}


def _by_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    changed = torch.empty_like(images)
    gray = images.shape[1] == 1
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        pixels = np.asarray(change(Image.fromarray(image[..., 0] if gray else image)))
        changed[i] = torch.from_numpy(pixels.copy()).reshape(image.shape).permute(2, 0, 1)
    return changed


# -- attacks -----------------------------------------------------------------------------------------------------------

# What the page attacks with, by name: `quick` takes 11 gradients of an image and ε, `strong` 201 and 1,000 queries.
STRENGTHS: dict[str, dict[str, attacks.Attack]] = {
    "quick": {"FGSM": attacks.fgsm, "PGD, 10 steps": partial(attacks.pgd, steps=10)},
    "strong": attacks.ATTACKS,
}


def attacked(
    attack: attacks.Attack, logits_of: attacks.Logits, images: Tensor, targets: Tensor, epsilon: int, batch: int = 500
) -> Tensor:
    """Returns `attack` of all images, computed in batches and rounded to whole levels, which keeps them in the ball.

    `epsilon`: the largest change of any pixel, in levels of 255. `logits_of` takes floats from 0 to 1.
    """
    pairs = zip(images.split(batch), targets.split(batch), strict=True)
    return torch.cat([levels(attack(logits_of, x / 255, y, epsilon / 255)) for x, y in pairs])


def correct(run: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
    """Returns of which uint8 images (N, C, H, W) the highest logit of `run` is the target's, (N,) booleans."""
    return run(images).argmax(1) == targets


def under_attacks(
    predict: Callable[[Tensor], Tensor],
    logits_of: attacks.Logits,
    images: Tensor,
    targets: Tensor,
    epsilons: Sequence[int],
    strength: str,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Returns the accuracy of `predict` as it is and at each ε, under each attack on `logits_of`, and under `ALL` at once.

    An image that is misclassified as it is, is so under any attack.
    """
    clean = correct(predict, images, targets)
    left = {name: [clean] for name in (*STRENGTHS[strength], ALL)}
    there, labels = images.to(device), targets.to(device)
    for epsilon in epsilons:
        worst = clean
        for name, attack in STRENGTHS[strength].items():
            changed = attacked(attack, logits_of, there, labels, epsilon).cpu()
            left[name].append(clean & correct(predict, changed, targets))
            worst = worst & left[name][-1]
        left[ALL].append(worst)
    return {name: [one.double().mean().item() for one in each] for name, each in left.items()}


def accuracy(run: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> float:
    """Returns the fraction of uint8 images (N, C, H, W) whose highest logit of `run` is the target's."""
    return correct(run, images, targets).double().mean().item()


def corrupted(images: Tensor, severities: Sequence[int] = SEVERITIES) -> dict[str, list[Tensor]]:
    """Returns all corruptions of the images: by name, one tensor per severity."""
    return {name: [corrupt(images, s) for s in severities] for name, corrupt in CORRUPTIONS.items()}
