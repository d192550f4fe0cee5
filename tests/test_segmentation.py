"""Segmentation: losses, methods and metrics over the pixels that count, against formulas of each in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from litdistill import Batch, Distiller, Outputs
from litdistill.methods import CRD, CWD, DKD, KD, RKD, LogitMSE, Sum, Supervised
from litdistill.tasks import Segmentation
from litdistill.tasks.segmentation.metrics import PixelMetrics, class_iou, confusion
from litdistill.utils.errors import UserError

N, H, W, K = 3, 4, 6, 5


class Map(nn.Module):
    """Gives the same logits (N, K, H, W) whatever the pictures are, so that gradients are those of the logits."""

    def __init__(self, seed: int, size: tuple[int, int] = (H, W)):
        super().__init__()
        self.logits = nn.Parameter(3 * torch.randn(N, K, *size, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)] * 1


class Small(nn.Module):
    """Logits (N, K, h, w) of a `classifier` at 1/`stride` of the picture."""

    def __init__(self, stride: int, channels: int = 6, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer1 = nn.Sequential(nn.Conv2d(3, channels, 3, stride, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(channels, K, 1)
        self.classifier.weight.data *= 9  # logits as large as those of a trained network

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.layer1(images))


def example(seed: int = 0, ignored: bool = True) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images, masks = torch.rand(N, 3, H, W, generator=g), torch.randint(0, K, (N, H, W), generator=g)
    if ignored:
        masks[0, 1, 2:], masks[2, :, 0] = 255, 255
    return Batch(images, masks, torch.arange(N))


def pixels(batch: Batch) -> list[tuple[int, int, int]]:
    places = [(n, y, x) for n in range(N) for y in range(H) for x in range(W)]
    return [place for place in places if int(batch.targets[place]) != 255]


def soft(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum()


def of_kd(s: Tensor, t: Tensor, y: int) -> Tensor:
    p, q = soft(t / 4), soft(s / 4)
    return 16 * (p * (p.log() - q.log())).sum()


def of_dkd(s: Tensor, t: Tensor, y: int) -> Tensor:
    p, q = soft(t / 4), soft(s / 4)
    pair = lambda r: torch.stack([r[y], 1 - r[y]])  # noqa: E731
    kl = lambda a, b: (a * (a.log() - b.log())).sum()  # noqa: E731
    others = [i for i in range(K) if i != y]
    return 16 * (kl(pair(p), pair(q)) + 8 * kl(p[others] / (1 - p[y]), q[others] / (1 - q[y])))


METHODS = [
    (KD(hard=0, soft=1), of_kd),
    (DKD(hard=0), of_dkd),
    (LogitMSE(), lambda s, t, y: (s - t).square().sum() / 2),
    (Supervised(), lambda s, t, y: -soft(s)[y].log()),
]


@pytest.mark.parametrize(("method", "formula"), METHODS, ids=[type(m).__name__ for m, _ in METHODS])
def test_a_loss_is_the_mean_over_the_pixels_that_count(method, formula):
    batch, student, teacher = example(), Map(1), Map(2)
    loss = Distiller(student, method, teacher, batch, task="segmentation").loss(batch)
    loss.backward()
    s, t = student.logits.detach().double().requires_grad_(), teacher.logits.detach().double()
    found = [formula(s[n, :, y, x], t[n, :, y, x], int(batch.targets[n, y, x])) for n, y, x in pixels(batch)]
    reference = torch.stack(found).mean()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(
        student.logits.grad, s.grad.float(), rtol=1e-3, atol=1e-6 * s.grad.abs().max().item() + 1e-7
    )
    assert student.logits.grad[2, :, :, 0].abs().max() == 0  # pixels that do not count have no gradient


def test_class_weights_scale_each_pixel():
    batch, weights = example(), [0.5, 2.0, 1.0, 0.0, 3.0]
    logits = Map(1).logits.detach()
    task = Segmentation(class_weights=weights)
    found = task.loss(Map(1), task.forward(Map(1), batch, False), batch)["hard"]
    each = [
        -weights[int(batch.targets[n, y, x])] * soft(logits[n, :, y, x].double())[int(batch.targets[n, y, x])].log()
        for n, y, x in pixels(batch)
    ]
    assert found.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    with pytest.raises(UserError, match=r"class_weights=.* are 2, and the network gives 5 logits"):
        Segmentation(class_weights=[1, 2]).loss(Map(1), task.forward(Map(1), batch, False), batch)
    with pytest.raises(UserError, match="one number for each class"):
        Segmentation(class_weights=[1, float("inf")])


def test_logits_of_a_smaller_map_are_enlarged_to_the_picture():
    batch, net = example(), Map(1, (2, 3))
    found = Segmentation().forward(net, batch, False).logits
    expected = nn.functional.interpolate(net.logits, (H, W), mode="bilinear")
    assert found.shape == (N, H * W, K)
    torch.testing.assert_close(found.view(N, H, W, K), expected.permute(0, 2, 3, 1))


def test_pictures_without_labels_teach_by_the_teacher_alone():
    batch = example()
    batch.targets[1] = -1
    student, teacher = Map(1), Map(2)
    hard = Distiller(student, Supervised(), None, batch, task="segmentation", labels="some").loss(batch)
    s = student.logits.detach().double()
    each = [-soft(s[n, :, y, x])[int(batch.targets[n, y, x])].log() for n, y, x in pixels(batch) if n != 1]
    assert hard.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    soft_loss = Distiller(student, KD(hard=0, soft=1), teacher, batch, task="segmentation", labels="some").loss(batch)
    t = teacher.logits.detach().double()
    every = [of_kd(s[n, :, y, x], t[n, :, y, x], 0) for n, y, x in pixels(batch)]  # of picture 1 too
    assert soft_loss.item() == pytest.approx(torch.stack(every).mean().item(), rel=1e-5)
    metric = Segmentation().metrics()
    metric.update(Segmentation().forward(student, batch, False), batch.targets)
    assert int(metric.counts.sum()) == sum(n != 1 for n, _, _ in pixels(batch))  # what has no label is not measured


@pytest.mark.parametrize("stride", [1, 2])
def test_cwd_compares_the_logits_of_a_classifier_at_one_size(stride):
    """Shu et al. 2021, equations 2 to 4: T² · KL over positions of each channel; here α is `hint`."""
    batch, student, teacher = example(), Small(stride, 4, seed=1), Small(1, 8, seed=2)
    method = CWD(hard=0, hint=3.0, temperature=4.0, student_taps=["classifier"], teacher_taps=["classifier"])
    loss = Distiller(student, method, teacher, batch, task="segmentation").loss(batch)
    loss.backward()
    own = student.classifier.weight.grad.clone()
    student.double(), teacher.double()
    s, t = (net(batch.inputs.double()) for net in (student, teacher.eval()))
    if stride == 2:  # the mean of each 2 x 2 pixels of the teacher
        t = torch.stack([t[..., y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2, 4)], 2)
    terms = []
    for n in range(N):
        for c in range(K):
            p, q = soft(t[n, c].flatten() / 4).detach(), soft(s[n, c].flatten() / 4)
            terms.append(16 * (p * (p.log() - q.log())).sum())
    reference = 3 * torch.stack(terms).sum() / (N * K)
    student.zero_grad()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-4)
    torch.testing.assert_close(own.double(), student.classifier.weight.grad, rtol=1e-3, atol=1e-7)


def test_a_map_of_as_many_channels_as_pixels_stays_a_map():
    places = torch.ones(2, 9, dtype=torch.bool)
    outputs = Outputs({"logits": torch.zeros(2, 9, K)}, {"layer1": torch.zeros(2, 9, 3, 3)})
    found = outputs.at(places)
    assert found.logits.shape == (18, K)
    assert found.features["layer1"].shape == (2, 9, 3, 3)


@pytest.mark.parametrize("method", [RKD(), Sum({"kd": KD(), "crd": CRD(hard=0)})])
def test_methods_that_compare_whole_pictures_are_refused(method):
    with pytest.raises(UserError, match=r"compares whole samples.*\bkd, .*\(cwd, at, fitnet\)"):
        Distiller(Small(1), method, Small(1), example(), task="segmentation")


# -- metrics -----------------------------------------------------------------------------------------------------------


def mean_iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """By two loops, of the classes that are there or predicted."""
    found = []
    for c in range(K):
        both = sum(a == c and b == c for a, b in zip(predicted, truth, strict=True))
        either = sum(a == c or b == c for a, b in zip(predicted, truth, strict=True))
        found += [both / either] if either else []
    return sum(found) / len(found)


def test_mean_iou_and_pixel_accuracy_are_those_of_all_pixels_in_any_batches():
    batch, logits = example(), Map(3).logits.detach()
    predicted = logits.argmax(1)[batch.targets != 255].numpy()
    truth = batch.targets[batch.targets != 255].numpy()
    expected = mean_iou(predicted, truth)
    assert expected == pytest.approx(jaccard_score(truth, predicted, average="macro"))
    task = Segmentation()
    for size in (1, 2, N):
        for keep in (False, True):
            metric = task.metrics()
            for some, targets in zip(logits.split(size), batch.targets.split(size), strict=True):
                outputs = Outputs.of(some.flatten(2).transpose(1, 2))
                metric.update(task.keep(outputs) if keep else outputs, targets)
            values = {k: float(v) for k, v in metric.compute().items()}
            accuracy = float((predicted == truth).mean())
            assert values == pytest.approx({"miou": expected, "pixel_accuracy": accuracy}, rel=1e-12)


def test_a_class_that_is_nowhere_is_left_out_of_the_mean():
    labels, truth = torch.tensor([0, 0, 1, 4]), torch.tensor([0, 1, 1, 1])
    iou = class_iou(confusion(labels, truth, K))
    assert iou[:2].tolist() == [0.5, pytest.approx(1 / 3)]
    assert iou[4] == 0  # it is predicted, and nowhere there
    assert iou[2:4].isnan().all()


def test_counts_are_whole_numbers_beyond_those_of_float32():
    metric = PixelMetrics()
    metric.counts[0, 0] = 2**24
    metric.update(Outputs({"label": torch.zeros(1, 1)}), torch.zeros(1, 1, 1, dtype=torch.int64))
    assert int(metric.counts[0, 0]) == 2**24 + 1
    assert metric.counts.dtype == torch.int64


def test_chance_is_the_mean_iou_of_the_most_frequent_class():
    batch = example()
    truth = batch.targets[batch.targets != 255]
    most = int(torch.bincount(truth).argmax())
    expected = mean_iou(np.full(len(truth), most), truth.numpy())
    assert Segmentation().chance(batch.targets) == pytest.approx(expected)


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        Segmentation().metrics().update(
            Outputs.of(torch.full((1, 4, K), math.nan)), torch.zeros(1, 2, 2, dtype=torch.int64)
        )


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_targets_of_another_kind_are_refused():
    for targets, said in (
        (torch.zeros(3, dtype=torch.int64), "needs masks"),
        (torch.zeros(2, 4, 4), "needs masks"),
        (torch.full((2, 4, 4), 255), "No pixel of 2 pictures counts"),
    ):
        with pytest.raises(UserError, match=said):
            Segmentation().places(targets)


def test_a_class_beyond_the_logits_is_refused():
    batch = example(ignored=False)
    batch.targets[0, 0, 0] = K
    with pytest.raises(UserError, match=f"Masks hold classes from 0 to {K}, and the network gives {K} logits"):
        Distiller(Map(1), Supervised(), None, batch, task="segmentation").loss(batch)


def test_a_network_that_gives_no_map_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * H * W, K))
    with pytest.raises(UserError, match="segmentation needs a map of logits"):
        Segmentation().forward(net, example(), False)
