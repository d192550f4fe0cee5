"""Metrics against plain NumPy in float64."""

import numpy as np
import pytest
import torch

from litdistill.tasks import metrics
from litdistill.utils.errors import UserError


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (7, 3), (200, 10), (50, 1000)])
def test_quality_and_likeness_are_their_formulas(n, classes):
    rng = np.random.default_rng(n)
    x, y, t = 3 * rng.normal(size=(n, classes)), 3 * rng.normal(size=(n, classes)), rng.integers(0, classes, n)
    soft = lambda z: np.exp(z - z.max(1, keepdims=True)) / np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)  # noqa: E731
    p, q = soft(x), soft(y)
    found = metrics.quality(torch.tensor(x), torch.tensor(t))
    assert found["accuracy"] == pytest.approx((p.argmax(1) == t).mean())
    assert found["nll"] == pytest.approx(-np.log(p[np.arange(n), t]).mean())
    assert found["brier"] == pytest.approx(((p - np.eye(classes)[t]) ** 2).sum(1).mean())
    confidence, right, ece = p.max(1), p.argmax(1) == t, 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert found["ece"] == pytest.approx(ece, abs=1e-6)
    like = metrics.agreement(torch.tensor(x), torch.tensor(y))
    assert like["agreement"] == pytest.approx((x.argmax(1) == y.argmax(1)).mean())
    assert like["kl"] == pytest.approx((q * (np.log(q) - np.log(p))).sum(1).mean())


def test_confusion_and_reliability_count_every_sample_once():
    torch.manual_seed(0)
    logits, targets = 2 * torch.randn(300, 4), torch.randint(0, 4, (300,))
    matrix = metrics.confusion(logits, targets)
    for row in range(4):
        for column in range(4):
            assert matrix[row, column] == ((targets == row) & (logits.argmax(1) == column)).sum()
    confidence, accuracy, count = metrics.reliability(logits, targets)
    assert count.sum() == 300
    full = count > 0
    assert (accuracy * count)[full].sum() == pytest.approx((logits.argmax(1) == targets).sum().item())
    assert (confidence * count)[full].sum() == pytest.approx(logits.double().softmax(1).max(1).values.sum().item())


def test_logits_that_are_not_numbers_are_refused_and_a_class_that_is_ruled_out_is_none():
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    logits[:2, 2] = -torch.inf
    assert metrics.quality(logits, targets.clamp(max=1))["brier"] < 2
    for bad in (torch.nan, torch.inf):
        logits[3, 1] = bad
        with pytest.raises(UserError, match=r"logits of 1 of 5 samples are not finite.*smaller learning rate"):
            metrics.quality(logits, targets)
