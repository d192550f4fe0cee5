"""Every loss of `litdistill.losses.named` against its formula, written here entry by entry in float64, with its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from litdistill import losses
from litdistill.losses.layouts import align
from litdistill.losses.named import LOSSES
from litdistill.utils.errors import UserError

N, C, H, W = 4, 3, 2, 5


def rows(x: Tensor) -> list[Tensor]:
    """The vector of channels of each sample and position."""
    return [v for sample in x for v in (sample.flatten(1).T if sample.ndim > 1 else sample[None])]


def mean(values) -> Tensor:
    values = list(values)
    return sum(values[1:], start=values[0]) / len(values)


def softmax(v: Tensor, t: float) -> Tensor:
    e = torch.exp(v / t - (v / t).max())
    return e / e.sum()


def divergence(q: Tensor, p: Tensor) -> Tensor:
    return sum(b * (b.log() - a.log()) for a, b in zip(q, p, strict=True))


def correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def unit(v: Tensor) -> Tensor:
    return v / (v * v).sum().sqrt()


def huber(d: Tensor, beta: float = 1.0) -> Tensor:
    return torch.where(d.abs() < beta, d * d / (2 * beta), d.abs() - beta / 2)


def channels(x: Tensor) -> list[Tensor]:
    """All values of each channel, over samples and positions."""
    return [x[:, c].reshape(-1) for c in range(x.shape[1])]


def over_rows(function):
    return lambda s, t: mean(function(a, b) for a, b in zip(rows(s), rows(t), strict=True))


def over_all(function):
    return lambda s, t: mean(function(a, b) for a, b in zip(s.flatten(), t.flatten(), strict=True))


def over_channel_maps(function):
    return lambda s, t: mean(function(a.flatten(), b.flatten()) for x, y in zip(s, t) for a, b in zip(x, y))  # noqa: B905


def matrix(x: Tensor, entry) -> Tensor:
    x = [v.flatten() for v in x]
    return torch.stack([torch.stack([entry(a, b) for b in x]) for a in x])


def by_distances(s: Tensor, t: Tensor) -> Tensor:
    def relative(x):
        d = matrix(x, lambda a, b: ((a - b) ** 2).sum().sqrt() if a is not b else a.sum() * 0)
        return d / (d.sum() / (len(x) * (len(x) - 1)))

    return huber(relative(s) - relative(t)).mean()


def by_angles(s: Tensor, t: Tensor) -> Tensor:
    def triples(x):
        x, n = x.flatten(1), len(x)
        found = [
            unit(x[j] - x[i]) @ unit(x[k] - x[i]) if i not in (j, k) else x.sum() * 0
            for i in range(n)
            for j in range(n)
            for k in range(n)
        ]
        return torch.stack(found)

    return huber(triples(s) - triples(t)).mean()


def by_neighbors(s: Tensor, t: Tensor) -> Tensor:
    def probabilities(x):
        kernel = matrix(x, lambda a, b: (unit(a) @ unit(b) + 1) / 2)
        return torch.stack([row / row.sum() for row in kernel])

    q, p = probabilities(s), probabilities(t)
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def by_similarity(s: Tensor, t: Tensor) -> Tensor:
    g = [torch.stack([unit(row) for row in matrix(x, torch.dot)]) for x in (s, t)]
    return ((g[0] - g[1]) ** 2).sum() / len(s) ** 2


def by_cosines(s: Tensor, t: Tensor) -> Tensor:
    g = [matrix(x, lambda a, b: unit(a) @ unit(b)) for x in (s, t)]
    return ((g[0] - g[1]) ** 2).sum() / len(s) ** 2


def by_gaussian(s: Tensor, t: Tensor) -> Tensor:
    series = lambda d: math.exp(-0.8) * (1 + 0.8 * d + 0.64 / 2 * d * d)  # noqa: E731
    g = [matrix(x, lambda a, b: series(unit(a) @ unit(b))) for x in (s, t)]
    return ((g[0] - g[1]) ** 2).mean()


def by_attention(s: Tensor, t: Tensor) -> Tensor:
    a = [[unit(mean(channel**2 for channel in sample).flatten()) for sample in x] for x in (s, t)]
    return mean(((x - y) ** 2).mean() for x, y in zip(*a, strict=True))


def by_mmd(s: Tensor, t: Tensor) -> Tensor:
    def kernel(x, y):
        return mean((unit(a.flatten()) @ unit(b.flatten())) ** 2 for a in x for b in y)

    return mean(kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) for x, y in zip(s, t, strict=True))


def by_channel_correlation(s: Tensor, t: Tensor) -> Tensor:
    def rows_of(sample):
        return torch.stack([unit(row) for row in matrix(sample, torch.dot)])

    return mean(((rows_of(x) - rows_of(y)) ** 2).sum() for x, y in zip(s, t, strict=True)) / s.shape[1]


def by_pyramid(s: Tensor, t: Tensor) -> Tensor:
    whole = ((s - t) ** 2).mean()
    one = ((s.mean((2, 3)) - t.mean((2, 3))) ** 2).mean()  # of 2x5 only the level of one position is smaller
    return (whole + one / 2) / 1.5


def by_gram(transposed: bool):
    def loss(s, t):
        q, p = (torch.stack([softmax(v, 4.0) for v in x]) for x in (s, t))
        a, b = (q.T, p.T) if transposed else (q, p)
        return sum(((a[i] @ a[j]) - (b[i] @ b[j])) ** 2 for i in range(len(a)) for j in range(len(a))) / len(a)

    return loss


def standardized(v: Tensor) -> Tensor:
    d = v - v.mean()
    return d / (1e-7 + ((d * d).sum() / (len(v) - 1)).sqrt())


def transformed(a: Tensor, b: Tensor) -> Tensor:
    power = softmax(b, 1.0) ** 0.2
    return power.sum() * divergence(softmax(a, 1.0), power / power.sum())


def bernoulli(a: Tensor, b: Tensor) -> Tensor:
    q, p = 1 / (1 + torch.exp(-a)), 1 / (1 + torch.exp(-b))
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


def intra(s: Tensor, t: Tensor) -> Tensor:
    q, p = (torch.stack([softmax(v, 4.0) for v in x]) for x in (s, t))
    return 16 * mean(1 - correlation(a, b) for a, b in zip(q.T, p.T, strict=True))


def by_consecutive(s: Tensor, t: Tensor) -> Tensor:
    d = (s - t).abs()
    return mean((d[i] * d[i + 1]).sum() for i in range(len(d) - 1))


FORMULAS = {
    "mse": over_all(lambda a, b: (a - b) ** 2),
    "l1": over_all(lambda a, b: (a - b).abs()),
    "smooth_l1": over_all(lambda a, b: huber(a - b)),
    "cosine": over_rows(lambda a, b: 1 - unit(a) @ unit(b)),
    "pearson": lambda s, t: mean(1 - correlation(a, b) for a, b in zip(channels(s), channels(t), strict=True)),
    "boundary": lambda s, t: torch.where(t > 0, 1 - s, 1 + s).clamp(min=0).pow(2).sum() / N,
    "partial_l2": lambda s, t: torch.where((s <= t) & (t <= 0), 0 * s, (s - t) ** 2).sum() / N,
    "log_power": lambda s, t: ((s - t).abs() ** 4).sum().log(),
    "consecutive": by_consecutive,
    "half_squared": over_rows(lambda a, b: ((a - b) ** 2).sum() / 2),
    "kl": over_rows(lambda a, b: 16 * divergence(softmax(a, 4.0), softmax(b, 4.0))),
    "soft_cross_entropy": over_rows(lambda a, b: -16 * (softmax(b, 4.0) * softmax(a, 4.0).log()).sum()),
    "pseudo_label": over_rows(lambda a, b: -softmax(a, 1.0)[b.argmax()].log()),
    "standardized_kl": over_rows(
        lambda a, b: 4 * divergence(softmax(standardized(a), 2.0), softmax(standardized(b), 2.0))
    ),
    "transformed_kl": over_rows(transformed),
    "inter_class": over_rows(lambda a, b: 16 * (1 - correlation(softmax(a, 4.0), softmax(b, 4.0)))),
    "intra_class": intra,
    "sample_gram": by_gram(False),
    "class_gram": by_gram(True),
    "binary_kl": lambda s, t: sum(bernoulli(a, b) for a, b in zip(rows(s), rows(t), strict=True)) / N,
    "kl_places": over_channel_maps(lambda a, b: 16 * divergence(softmax(a, 4.0), softmax(b, 4.0))),
    "attention": by_attention,
    "mmd": by_mmd,
    "factor": lambda s, t: mean(
        (unit(a.flatten()) - unit(b.flatten())).abs().mean() for a, b in zip(s, t, strict=True)
    ),
    "pyramid": by_pyramid,
    "channel_correlation": by_channel_correlation,
    "similarity": by_similarity,
    "cosines": by_cosines,
    "distances": by_distances,
    "angles": by_angles,
    "neighbors": by_neighbors,
    "gaussian": by_gaussian,
}
ON_MAPS = [name for name, loss in LOSSES.items() if loss.layout != "rows"]
ON_VECTORS = [name for name, loss in LOSSES.items() if loss.layout not in ("places", "maps", "channels")]


def test_every_loss_has_a_formula_here_and_is_public():
    assert FORMULAS.keys() == LOSSES.keys()
    assert set(LOSSES) <= set(losses.__all__)
    assert all(getattr(losses, name) is loss.function for name, loss in LOSSES.items())


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (N, C, H, W)) for name in ON_MAPS), *((name, (N, 6)) for name in ON_VECTORS)],
)
def test_value_and_gradient_equal_the_formula(name, shape):
    torch.manual_seed(3)
    s, t = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)
    got, want = LOSSES[name].function(s, t), FORMULAS[name](s, t)
    assert got.shape == ()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    a, b = (torch.autograd.grad(x, s)[0] for x in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)
    assert a.abs().max() > 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_autocast_do_not_round_the_loss(name):
    torch.manual_seed(0)
    shape = (N, C, H, W) if name in ON_MAPS else (N, 6)
    s, t = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    want = LOSSES[name].function(s.double(), t.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = LOSSES[name].function(s, t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


# -- features of two shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "layout", "found"),
    [
        ((2, 3), (2, 5), "values", ((2, 3), (2, 5))),
        ((2, 3, 8, 4), (2, 5, 4, 8), "values", ((2, 3, 4, 4), (2, 5, 4, 4))),  # each axis by itself
        ((2, 3, 8, 8), (2, 5), "values", ((2, 3), (2, 5))),
        ((2, 3), (2, 7, 5), "values", ((2, 3), (2, 5))),
        ((2, 7, 3), (2, 7, 5), "values", ((2, 3, 7), (2, 5, 7))),
        ((2, 3, 8, 8), (2, 17, 5), "values", ((2, 3, 4, 4), (2, 5, 4, 4))),  # a class token and 4x4 positions
        ((2, 3, 8, 4), (2, 8, 5), "values", ((2, 3, 4, 2), (2, 5, 4, 2))),
        ((2, 21, 3), (2, 2, 5, 5), "places", ((2, 3, 4, 4), (2, 2, 4, 4))),  # a class and four registers
        ((2, 197, 3), (2, 50, 5), "values", ((2, 3, 7, 7), (2, 5, 7, 7))),
        ((2, 17, 3), (2, 16, 5), "values", ((2, 3, 4, 4), (2, 5, 4, 4))),  # one of them has a class token
        ((2, 12, 3), (2, 6, 5), "values", ((2, 3, 6), (2, 5, 6))),
        ((2, 102, 3), (2, 51, 5), "values", ((2, 3, 51), (2, 5, 51))),  # frames, although 100 and 49 are squares
        ((2, 196, 3), (2, 49, 5), "values", ((2, 3, 7, 7), (2, 5, 7, 7))),
        ((2, 7, 3), (2, 7, 5), "rows", ((14, 3), (14, 5))),
        ((2, 3, 8, 8), (2, 5, 4, 4), "samples", ((2, 3, 8, 8), (2, 5, 4, 4))),
        ((2, 3, 8, 8), (2, 5), "samples", ((2, 3), (2, 5))),
        ((2, 3, 8, 8), (2, 5, 4, 4), "channels", ((2, 3, 8, 8), (2, 5, 4, 4))),
    ],
)
def test_features_are_brought_into_one_layout(student, teacher, layout, found):
    s, t = align(torch.randn(student), torch.randn(teacher), layout)
    assert (tuple(s.shape), tuple(t.shape)) == found


def test_positions_of_tokens_and_maps_are_the_same():
    image = torch.randn(2, 3, 4, 4)
    tokens = torch.cat([torch.full((2, 1, 3), 99.0), image.flatten(2).transpose(1, 2)], dim=1)
    a, b = align(image, tokens, "values")
    assert torch.equal(a, b)
    pooled, mean_of = align(image, torch.zeros(2, 3), "values")[0], image.mean((2, 3))
    torch.testing.assert_close(pooled, mean_of)
    frames = torch.arange(6.0).reshape(1, 6, 1)
    halved, _ = align(frames, torch.zeros(1, 3, 1), "values")
    assert halved.flatten().tolist() == [0.5, 2.5, 4.5]
    rows_of, _ = align(tokens, tokens, "rows")
    assert torch.equal(rows_of, tokens.flatten(0, 1))


@pytest.mark.parametrize(
    ("student", "teacher", "layout", "said"),
    [
        ((2, 3, 8, 8), (2, 12, 5), "values", "12 tokens are no grid of the proportions of a map of 8x8"),
        ((2, 12, 3), (2, 7, 5), "values", "sequences of 12 and 7 tokens cannot be paired"),
        ((2, 3), (2, 5, 4, 4), "places", "compares positions, and a vector"),
        ((2, 3, 1, 1), (2, 5, 4, 4), "places", "there is only one"),
        ((2, 7, 3), (2, 7, 5), "maps", "compares maps"),
        ((2, 3), (2, 3, 4, 5, 6), "values", "a feature is a vector"),
    ],
)
def test_shapes_that_cannot_be_paired_say_why(student, teacher, layout, said):
    with pytest.raises(UserError, match=said):
        align(torch.randn(student), torch.randn(teacher), layout)
