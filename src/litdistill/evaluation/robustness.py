"""A classifier's accuracy under common corruptions and under gradient-based attacks.

All images are uint8 (N, C, H, W) with integer levels from 0 to 255, as an image file stores them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from litdistill.evaluation import attacks

SEVERITIES = (1, 2, 3, 4, 5)

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

Logits = attacks.Logits  # floats from 0 to 1 (N, C, H, W) -> logits (N, classes), differentiable


def fgsm(logits_of: Logits, images: Tensor, targets: Tensor, epsilon: int) -> Tensor:
    """`attacks.fgsm`, rounded to whole levels. `epsilon`: the largest change of any pixel, in levels of 255."""
    return levels(attacks.fgsm(logits_of, images / 255, targets, epsilon / 255))


def pgd(logits_of: Logits, images: Tensor, targets: Tensor, epsilon: int, steps: int = 10, seed: int = 0) -> Tensor:
    """`attacks.pgd` from one start, rounded to whole levels, which keeps it in the ball."""
    return levels(attacks.pgd(logits_of, images / 255, targets, epsilon / 255, steps, seed=seed))


ATTACKS = {"FGSM": fgsm, "PGD": pgd}


def attacked(
    attack: Callable[..., Tensor], logits_of: Logits, images: Tensor, targets: Tensor, epsilon: int, batch: int = 500
) -> Tensor:
    """Returns `attack` of all images, computed in batches."""
    pairs = zip(images.split(batch), targets.split(batch), strict=True)
    return torch.cat([attack(logits_of, x, y, epsilon) for x, y in pairs])


def accuracy(run: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> float:
    """Returns the fraction of uint8 images (N, C, H, W) whose highest logit of `run` is the target's."""
    return (run(images).argmax(1) == targets).double().mean().item()


def corrupted(images: Tensor, severities: Sequence[int] = SEVERITIES) -> dict[str, list[Tensor]]:
    """Returns all corruptions of the images: by name, one tensor per severity."""
    return {name: [corrupt(images, s) for s in severities] for name, corrupt in CORRUPTIONS.items()}
