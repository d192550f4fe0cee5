"""Attacks on classifiers in a ball of the maximum norm, and the accuracy that is left under them.

Images are floats from 0 to 1, (N, C, H, W); epsilon is the ball's radius, the largest change of a pixel on that scale. Attacks
return images of the same shape, inside the ball and from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from litdistill.distillation.adversarial import ascend
from litdistill.utils.errors import UserError

Logits = Callable[[Tensor], Tensor]  # images -> logits (N, classes), differentiable but for `square`
Attack = Callable[[Logits, Tensor, Tensor, float], Tensor]  # (logits_of, images, targets, epsilon) -> images


def excess(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns m = log Σ exp(other logits) - label's logit of each sample, (N,).

    The cross-entropy is log(1 + exp m): it rises with m, and its gradient is sigmoid(m) times that of m. So an attack on either
    takes the same steps, but the cross-entropy's gradient underflows to zero for a confident network, which would then appear
    robust (gradient masking).
    """
    others = logits.masked_fill(F.one_hot(targets, logits.shape[1]).bool(), float("-inf")).logsumexp(1)
    return others - logits.gather(1, targets[:, None])[:, 0]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each sample, (N,): what attacks are usually written with."""
    return F.cross_entropy(logits, targets, reduction="none")


Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, targets) -> what is ascended, (N,)


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the largest other logit minus the label's, (N,): above 0 where the sample is misclassified."""
    others = logits.masked_fill(F.one_hot(targets, logits.shape[1]).bool(), float("-inf"))
    return others.amax(1) - logits.gather(1, targets[:, None])[:, 0]


def _ascended(logits_of: Logits, images: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Returns the loss of each sample, (N,), and its gradient with respect to the images."""
    images = images.detach().requires_grad_()
    values = loss(logits_of(images), targets)
    if not values.requires_grad:
        raise UserError(
            "This attack follows the gradient of the logits at the images, and these have none, as those of an exported file: "
            "attack with `square`, which asks for logits alone."
        )
    (gradient,) = torch.autograd.grad(values.sum(), images)
    return values.detach(), gradient


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns noise from -1 to 1, the same on any device."""
    return 2 * torch.rand(images.shape, generator=generator).to(images) - 1


def fgsm(logits_of: Logits, images: Tensor, targets: Tensor, epsilon: float, loss: Loss = excess) -> Tensor:
    """Returns x + ε · sign of the loss's gradient at x (Goodfellow et al. 2015, arXiv 1412.6572, section 4)."""
    gradient = lambda x: _ascended(logits_of, x, targets, loss)[1]  # noqa: E731
    return ascend(gradient, images, images, epsilon, epsilon, 1)


def pgd(
    logits_of: Logits,
    images: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
    loss: Loss = excess,
) -> Tensor:
    """Projected gradient ascent (Madry et al. 2018, arXiv 1706.06083, 2.1) from `restarts` random points of the ball.

    Each moves by 2.5 ε / steps, so that any point of the ball can be reached from any other. Of the ends of a sample's ascents
    the one with the largest margin is returned.
    """
    generator = torch.Generator().manual_seed(seed)
    gradient = lambda x: _ascended(logits_of, x, targets, loss)[1]  # noqa: E731
    found: Tensor | None = None
    for _ in range(restarts):
        start = images + epsilon * _uniform(images, generator)
        end = ascend(gradient, images, start, epsilon, 2.5 * epsilon / steps, steps)
        found = end if found is None else _worse(logits_of, targets, found, end)
    assert found is not None
    return found


@torch.no_grad()
def _worse(logits_of: Logits, targets: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns of each sample the images of `a` or of `b`, with the larger margin."""
    keep = margin(logits_of(a), targets) >= margin(logits_of(b), targets)
    return torch.where(keep[:, None, None, None], a, b)


RHO, MOMENTUM = 0.75, 0.75  # of `apgd`, as published


def checkpoints(steps: int) -> list[int]:
    """Returns the steps at which `apgd` decides whether to halve its step, from 0."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(share * steps - 1e-9) for share in shares]


def apgd(
    logits_of: Logits,
    images: Tensor,
    targets: Tensor,
    epsilon: float,
    steps: int = 100,
    seed: int = 0,
    loss: Loss = excess,
) -> Tensor:
    """APGD-CE: gradient ascent with momentum, whose step is halved where it helps no more (Croce & Hein 2020, arXiv 2003.01690,
    algorithm 1). Returns the point of the highest loss; it has no parameter but the number of steps."""
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    x = (images + epsilon * _uniform(images, torch.Generator().manual_seed(seed))).clamp(low, high)
    size = images.new_full((len(images), 1, 1, 1), 2 * epsilon)
    value, gradient = _ascended(logits_of, x, targets, loss)
    before, best, best_value, best_gradient = x, x, value, gradient
    rises, marks, last = torch.zeros_like(value), checkpoints(steps), 0
    halved, best_then = torch.ones_like(value, dtype=torch.bool), value  # at the last checkpoint
    for k in range(steps):
        step = (x + size * gradient.sign()).clamp(low, high)
        moved = step if k == 0 else (x + MOMENTUM * (step - x) + (1 - MOMENTUM) * (x - before)).clamp(low, high)
        before, x, previous = x, moved, value
        value, gradient = _ascended(logits_of, x, targets, loss)
        rises += value > previous
        better = value > best_value
        best_value = torch.where(better, value, best_value)
        best, best_gradient = _chosen(better, x, best), _chosen(better, gradient, best_gradient)
        if k + 1 in marks[1:]:
            stuck = (rises < RHO * (k + 1 - last)) | (~halved & (best_then == best_value))
            size = torch.where(stuck[:, None, None, None], size / 2, size)
            x, gradient = _chosen(stuck, best, x), _chosen(stuck, best_gradient, gradient)
            value = torch.where(stuck, best_value, value)
            halved, best_then, last, rises = stuck, best_value, k + 1, torch.zeros_like(value)
    return best


def _chosen(which: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(which[:, None, None, None], a, b)


SHRINKS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: after each the squares' area halves


@torch.no_grad()
def square(
    logits_of: Logits,
    images: Tensor,
    targets: Tensor,
    epsilon: float,
    queries: int = 1000,
    area: float = 0.8,
    seed: int = 0,
) -> Tensor:
    """A black-box attack: random squares at ±ε, kept where they raise the margin (Andriushchenko et al., arXiv 1912.00049).

    It reads logits alone, so that no masked gradient withstands it. It starts at vertical stripes; the squares' share of the
    image begins at `area`, as in AutoAttack, and is halved on the published schedule. A sample that is misclassified is left as
    it is.
    """
    generator = torch.Generator().manual_seed(seed)
    count, channels, height, width = images.shape
    signs = lambda *shape: torch.randint(2, shape, generator=generator).to(images) * 2 - 1  # noqa: E731
    found = (images + epsilon * signs(count, channels, 1, width)).clamp(0, 1)
    best = margin(logits_of(found), targets)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    for i in range(1, queries):
        share = area / 2 ** sum(i / queries * 10_000 > mark for mark in SHRINKS)
        side = min(max(1, round(math.sqrt(share * height * width))), height, width)
        top, left = (torch.randint(n - side + 1, (count, 1, 1), generator=generator) for n in (height, width))
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        changed = (images + epsilon * signs(count, channels, 1, 1)).clamp(0, 1)
        open_ = best < 0
        if not open_.any():
            break
        tried = torch.where(inside[:, None].to(images.device), changed, found)[open_]
        reached = margin(logits_of(tried), targets[open_])
        better = reached > best[open_]
        found[open_] = _chosen(better, tried, found[open_])
        best[open_] = torch.where(better, reached, best[open_])
    return found


# What robust accuracy is measured with, by name.
ATTACKS: dict[str, Attack] = {
    "FGSM": fgsm,
    "PGD-20, 5 starts": partial(pgd, steps=20, restarts=5),
    "APGD-CE, 100 steps": partial(apgd, steps=100),
    "Square, 1000 queries": partial(square, queries=1000),
}


@torch.no_grad()
def withstood(logits_of: Logits, images: Tensor, targets: Tensor) -> Tensor:
    """Returns which samples are classified as their label, (N,) booleans; logits that are no numbers are not."""
    return margin(logits_of(images), targets) < 0


def robust_accuracy(
    logits_of: Logits,
    images: Tensor,
    targets: Tensor,
    epsilon: float,
    attacks: Mapping[str, Attack] | None = None,
    batch: int = 500,
) -> dict[str, float]:
    """Returns the share of samples that are classified as their label: as they are (`clean`), under each attack, and under all
    of them (`worst`). A sample that is misclassified as it is, is so under any attack."""
    attacks = ATTACKS if attacks is None else attacks
    kept: dict[str, list[Tensor]] = {name: [] for name in ("clean", *attacks, "worst")}
    for x, y in zip(images.split(batch), targets.split(batch), strict=True):
        clean = worst = withstood(logits_of, x, y)
        kept["clean"].append(clean)
        for name, attack in attacks.items():
            still = clean & withstood(logits_of, attack(logits_of, x, y, epsilon), y)
            kept[name].append(still)
            worst = worst & still
        kept["worst"].append(worst)
    return {name: torch.cat(parts).double().mean().item() for name, parts in kept.items()}
