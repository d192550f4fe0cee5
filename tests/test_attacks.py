"""Attacks against independent forms in numpy, against torchattacks where it is installed, and on what gradients cannot see."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litdistill.evaluation import attacks
from litdistill.evaluation.attacks import apgd, fgsm, margin, pgd, robust_accuracy, square, withstood
from litdistill.evaluation.evaluate import under_attack
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.report.writers import attack_table
from litdistill.tasks import Classification, MultiLabel
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from tests.fits import digits, net

torch.set_num_threads(1)
EPS = 0.1


@pytest.fixture(scope="module")
def trained():
    """A small network of digits, and 200 digits that it has not seen, of which it classifies most."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 16
    y = torch.from_numpy(found.target).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x[:1000]), y[:1000]).backward()
        optimizer.step()
    net.requires_grad_(False)
    return net, x[1000:1200], y[1000:1200]


class Curved:
    """Logits of float64 whose loss and gradient numpy gives too: log Σ exp(others) - label's. The gradient's signs change in
    the ball, so that ascents from different points, by different steps, end at different ones."""

    def __init__(self, seed=0, classes=4):
        self.rng = np.random.default_rng(seed)
        self.inner, self.weights = 4 * self.rng.normal(size=(8, 16)), self.rng.normal(size=(classes, 8))
        self.x, self.y = self.rng.random((6, 1, 4, 4)), self.rng.integers(0, classes, 6)

    def __call__(self, images):
        return torch.tanh(images.flatten(1) @ torch.from_numpy(self.inner.T)) @ torch.from_numpy(self.weights.T)

    def logits(self, x):
        return self.weights @ np.tanh(self.inner @ x.ravel())

    def value(self, x, i):
        logits = self.logits(x)
        return self._others(logits, i).sum() and math.log(self._others(logits, i).sum()) - logits[self.y[i]]

    def _others(self, logits, i):
        return np.where(np.arange(len(logits)) == self.y[i], 0.0, np.exp(logits))

    def gradient(self, x, i):
        share, hidden = self._others(self.logits(x), i), np.tanh(self.inner @ x.ravel())
        outer = (share / share.sum()) @ self.weights - self.weights[self.y[i]]
        return ((outer * (1 - hidden**2)) @ self.inner).reshape(x.shape)


def as_torch(model):
    return torch.from_numpy(model.x), torch.from_numpy(model.y)


def noise_of(model, seed):
    """The start's noise, from -1 to 1."""
    return 2 * torch.rand(model.x.shape, generator=torch.Generator().manual_seed(seed)).double().numpy() - 1


@pytest.mark.parametrize("seed", range(4))
def test_apgd_is_algorithm_1_of_its_paper_sample_by_sample_in_numpy(seed):
    model, steps = Curved(seed), 40
    found = apgd(model, *as_torch(model), EPS, steps, seed=3).numpy()
    noise = noise_of(model, 3)
    p = [0, 22]  # in hundredths, so that no rounding moves a mark
    while p[-1] < 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    marks = [-(-s * steps // 100) for s in p]
    for i, clean in enumerate(model.x):
        project = lambda v: np.clip(np.clip(v, clean - EPS, clean + EPS), 0, 1)  # noqa: B023, E731
        f, g = (lambda v: model.value(v, i)), (lambda v: model.gradient(v, i))  # noqa: B023
        xs, eta = [project(clean + EPS * noise[i])], 2 * EPS
        xs.append(project(xs[0] + eta * np.sign(g(xs[0]))))
        best = max(xs, key=f)
        rises, last, kept_eta, best_then = int(f(xs[1]) > f(xs[0])), 0, False, f(xs[0])
        for k in range(1, steps):
            if k in marks[1:]:
                if rises < 0.75 * (k - last) or (kept_eta and best_then == f(best)):
                    eta, kept_eta, xs[-1] = eta / 2, False, best
                else:
                    kept_eta = True
                rises, last, best_then = 0, k, f(best)
            z = project(xs[-1] + eta * np.sign(g(xs[-1])))
            xs.append(project(xs[-1] + 0.75 * (z - xs[-1]) + 0.25 * (xs[-1] - xs[-2])))
            rises += f(xs[-1]) > f(xs[-2])
            best = max(best, xs[-1], key=f)
        assert np.abs(found[i] - best).max() < 1e-9


def test_square_is_the_published_search_sample_by_sample_in_numpy():
    model, queries, eps = Curved(1), 60, EPS / 4
    model.y = np.array([model.logits(x).argmax() for x in model.x])  # right as they are
    found = square(model, *as_torch(model), eps, queries, seed=5).numpy()
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randint(2, shape, generator=generator).double().numpy() * 2 - 1  # noqa: E731

    def f(v, i):
        logits = model.logits(v)
        return np.delete(logits, model.y[i]).max() - logits[model.y[i]]

    best = np.clip(model.x + eps * draw(6, 1, 1, 4), 0, 1)
    for k in range(1, queries):
        place = k / queries * 10_000
        halvings = next((j for j, m in enumerate((10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)) if place <= m), 9)
        side = max(1, round(math.sqrt(0.8 / 2**halvings * 16)))
        top, left = (torch.randint(4 - side + 1, (6, 1, 1), generator=generator).flatten() for _ in range(2))
        signs = draw(6, 1, 1, 1)
        for i in range(6):
            if f(best[i], i) >= 0:
                continue
            tried = best[i].copy()
            rows, columns = slice(top[i], top[i] + side), slice(left[i], left[i] + side)
            tried[:, rows, columns] = np.clip(model.x[i][:, rows, columns] + eps * signs[i], 0, 1)
            if f(tried, i) > f(best[i], i):
                best[i] = tried
    assert np.abs(found - best).max() < 1e-12
    assert sum(f(v, i) < 0 for i, v in enumerate(best)) >= 3  # the search went on to its end


def test_pgd_with_restarts_ends_at_the_largest_margin_of_its_ascents():
    model = Curved(2)
    x, y = as_torch(model)
    found = pgd(model, x, y, EPS, steps=5, restarts=4, seed=7)
    generator, ends = torch.Generator().manual_seed(7), []
    for _ in range(4):
        noise = 2 * torch.rand(x.shape, generator=generator).double().numpy() - 1
        v, low, high = model.x + EPS * noise, np.maximum(model.x - EPS, 0), np.minimum(model.x + EPS, 1)
        v = np.clip(v, low, high)
        for _ in range(5):
            gradient = np.stack([model.gradient(v[i], i) for i in range(6)])
            v = np.clip(v + 2.5 * EPS / 5 * np.sign(gradient), low, high)
        ends.append(v)
    margins = np.stack([margin(model(torch.from_numpy(v)), y).numpy() for v in ends])
    assert np.abs(found.numpy() - np.stack(ends)[margins.argmax(0), range(6)]).max() < 1e-12
    assert len(set(margins.argmax(0))) > 1  # the best of a sample's ascents is not always the same one
    assert np.ptp(margins, 0).max() > 1e-3


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_each_attack_stays_in_the_ball_and_in_the_image_and_repeats_itself(name, trained):
    net, x, y = trained
    for eps in (0.02, 0.3):
        found = attacks.ATTACKS[name](net, x[:40], y[:40], eps)
        assert (found - x[:40]).abs().max() <= eps + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(found, attacks.ATTACKS[name](net, x[:40], y[:40], eps))


def test_stronger_attacks_leave_less_and_clean_is_the_most(trained):
    net, x, y = trained
    found = robust_accuracy(net, x, y, EPS, batch=64)
    assert list(found) == ["clean", *attacks.ATTACKS, "worst"]
    assert found["clean"] == (net(x).argmax(1) == y).double().mean().item()
    assert found["worst"] <= min(found.values())
    one, many, best = (found[k] for k in ("FGSM", "PGD-20, 5 starts", "APGD-CE, 100 steps"))
    assert many <= one < found["clean"]
    assert abs(many - best) <= 0.03
    assert found["Square, 1000 queries"] < found["clean"] - 0.1


def test_a_masked_gradient_stops_what_follows_it_and_not_the_black_box(trained):
    """Logits that are steps have no gradient: FGSM and PGD change nothing that counts, and Square does."""
    net, x, y = trained

    class Steps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return (z * 4).round() / 4

        @staticmethod
        def backward(ctx, g):
            return torch.zeros_like(g)

    found = robust_accuracy(lambda v: Steps.apply(net(v)), x, y, EPS)
    assert found["FGSM"] == found["clean"]
    assert found["Square, 1000 queries"] < found["clean"] - 0.1


def test_a_cross_entropy_that_underflows_looks_robust_and_the_excess_does_not(trained):
    net, x, y = trained
    sure = lambda v: 1000 * net(v)  # noqa: E731
    naive = withstood(sure, fgsm(sure, x, y, EPS, attacks.cross_entropy), y).float().mean()
    honest = withstood(sure, fgsm(sure, x, y, EPS), y).float().mean()
    clean = withstood(sure, x, y).float().mean()
    assert clean - naive < 0.5 * (clean - honest)


def test_logits_that_are_no_numbers_do_not_withstand():
    nan = lambda x: torch.full((len(x), 3), float("nan"))  # noqa: E731
    assert not withstood(nan, torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long)).any()


def test_torchattacks_finds_as_many_adversarial_examples(trained):
    """The same attacks by others, on a trained network: to three samples of 200."""
    torchattacks = pytest.importorskip("torchattacks")
    net, x, y = trained
    share = lambda v: withstood(net, v, y).double().mean().item()  # noqa: E731
    theirs = {
        "FGSM": torchattacks.FGSM(net, eps=EPS),
        "PGD": torchattacks.PGD(net, eps=EPS, alpha=2.5 * EPS / 20, steps=20, random_start=True),
        "APGD": torchattacks.APGD(net, norm="Linf", eps=EPS, steps=100, n_restarts=1, seed=0, loss="ce"),
        "Square": torchattacks.Square(net, norm="Linf", eps=EPS, n_queries=1000, p_init=0.8, seed=0),
    }
    ours = {"FGSM": fgsm(net, x, y, EPS), "PGD": pgd(net, x, y, EPS), "APGD": apgd(net, x, y, EPS),
            "Square": square(net, x, y, EPS, 1000)}  # fmt: skip
    for name, attack in theirs.items():
        difference = share(ours[name]) - share(attack(x, y))
        assert difference <= 3 / 200, name
        if name != "Square":  # whose squares never reach the last row and column there, which counts for 8x8 pixels
            assert difference >= -3 / 200, name


def test_both_networks_of_a_run_are_attacked_on_images_spread_over_the_test_set(trained):
    data, other = digits(), net()
    found = under_attack(
        {"teacher": other, "student": trained[0], "none": None}, data, Classification(), 50, EPS, "cpu"
    )
    images, targets = (torch.cat(x) for x in zip(*((b.inputs, b.targets) for b in data.batches("test")), strict=True))
    chosen = torch.linspace(0, len(images) - 1, 50, dtype=torch.float64).long()
    assert found.keys() == {"teacher", "student"}
    assert found["student"] == robust_accuracy(trained[0], images[chosen].float() / 255, targets[chosen], EPS)
    head, rows = attack_table(found, EPS)
    assert head == ["accuracy %, attacked by eps = 0.1", "teacher", "student"]
    assert rows[0] == ["clean", *(f"{100 * found[k]['clean']:.2f}" for k in ("teacher", "student"))]
    with pytest.raises(UserError, match="attacks classifiers of images"):
        under_attack({"student": other}, data, MultiLabel(), 50, EPS, "cpu")


class Smoothed(Classification):
    """A task of one's own with one label a sample."""


def test_images_of_any_shape_are_attacked_and_pixels_outside_of_0_to_1_are_refused(monkeypatch):
    monkeypatch.setattr(attacks, "ATTACKS", {"FGSM": fgsm, "Square": functools.partial(square, queries=30)})
    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, 33, 17), torch.arange(6) % 3
    small = Preprocessed(nn.Sequential(nn.Flatten(), nn.Linear(3 * 33 * 17, 3)), Preprocess([4.0] * 3, [0.1] * 3))
    resizes = Preprocessed(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)), Preprocess([0.5] * 3, [0.2] * 3, 8))
    of = lambda given: SimpleNamespace(batches=lambda split: [Batch(given, labels)])  # noqa: E731
    found = under_attack({"student": small, "teacher": resizes}, of(images), Smoothed(), 6, EPS, "cpu")
    assert found["student"]["worst"] < found["student"]["clean"]
    assert 0 <= found["teacher"]["worst"] <= found["teacher"]["clean"]
    for wrong in (images * 2 - 1, (images * 30_000).int()):
        with pytest.raises(UserError, match=r"^robustness=… changes pixels from 0 to 1, and these go from [^\n]+$"):
            under_attack({"student": small}, of(wrong), Classification(), 6, EPS, "cpu")


def test_what_gives_logits_alone_is_attacked_by_square_and_refused_by_the_others(trained):
    net, images, labels = (*trained[:1], *(given[:20] for given in trained[1:3]))
    file = lambda x: torch.from_numpy(net(x.detach()).numpy())  # noqa: E731 - as an exported file answers
    found = {"Square": functools.partial(square, queries=30)}
    assert robust_accuracy(file, images, labels, EPS, found) == robust_accuracy(net, images, labels, EPS, found)
    for attack in (fgsm, pgd, apgd):
        with pytest.raises(UserError, match=r"^This attack follows the gradient [^\n]+ attack with `square`[^\n]+$"):
            attack(file, images, labels, EPS)
