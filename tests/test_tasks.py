"""What tasks say of outputs: losses with their gradients, metrics, chance and agreement, against scikit-learn and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor, nn

from litdistill.tasks import TASKS, Classification, MultiLabel, Regression, named_task
from litdistill.tasks.base import Task, to_batch
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

NET = nn.Identity()  # which no loss here looks at


def draw(*shape: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def loss_of(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    terms = task.loss(NET, Outputs.of(logits), Batch(None, targets))
    assert terms.keys() == {"hard"}
    return terms["hard"]


def same_with_gradient(task: Task, logits: Tensor, targets: Tensor, closed_form) -> None:
    """The loss of float32 logits against a closed form of the same logits in float64."""
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, wanted = loss_of(task, single, targets), closed_form(double)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    (got,), (want,) = torch.autograd.grad(found, single), torch.autograd.grad(wanted, double)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6 * want.abs().max().item())


def measured(task: Task, logits: Tensor, targets: Tensor, batch: int = 10**6) -> dict[str, float]:
    metric = task.metrics()
    for some, labels in zip(logits.split(batch), targets.split(batch), strict=True):
        metric.update(Outputs.of(some), labels)
    return {name: float(value) for name, value in metric.compute().items()}


# -- losses ------------------------------------------------------------------------------------------------------------


def cross_entropy(z: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over samples of −Σ_k y_k log q_k with y = (1 − ε) · label + ε / K."""
    log_q = z - z.logsumexp(1, keepdim=True)
    losses = [-(1 - smoothing) * row[label] - smoothing * row.mean() for row, label in zip(log_q, target, strict=True)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_cross_entropy_is_its_closed_form(smoothing, scale):
    target = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    same_with_gradient(
        Classification(smoothing), draw(7, 5, scale=scale), target, lambda z: cross_entropy(z, target, smoothing)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_labels_are_the_mixture_of_the_two_losses(smoothing):
    a = torch.tensor([0, 1, 2, 3, 4, 0])
    b, one_hot = (a + 1) % 5, torch.eye(5)
    mixed = 0.3 * one_hot[a] + 0.7 * one_hot[b]
    want = lambda z: 0.3 * cross_entropy(z, a, smoothing) + 0.7 * cross_entropy(z, b, smoothing)  # noqa: E731
    same_with_gradient(Classification(smoothing), draw(6, 5), mixed, want)


@pytest.mark.parametrize("soft", [False, True])
def test_binary_cross_entropy_is_summed_over_labels_and_averaged_over_samples(soft):
    targets = draw(6, 4, seed=1).sigmoid() if soft else (draw(6, 4, seed=1) > 0).float()
    y = targets.double()
    want = lambda z: -(y * torch.log(z.sigmoid()) + (1 - y) * torch.log((-z).sigmoid())).sum() / 6  # noqa: E731
    same_with_gradient(MultiLabel(), draw(6, 4), targets, want)


@pytest.mark.parametrize("values", [1, 3])
def test_squared_error_is_of_standardized_targets(values):
    mean, std = [100.0, -3.0, 0.0][:values], [50.0, 0.1, 1.0][:values]
    targets = draw(8, values, seed=1) * torch.tensor(std) + torch.tensor(mean)
    standard = (targets.double() - torch.tensor(mean).double()) / torch.tensor(std).double()
    want = lambda z: (z - standard).square().mean()  # noqa: E731
    same_with_gradient(Regression(mean, std), draw(8, values), targets, want)


def test_targets_of_one_value_may_be_a_vector():
    logits, targets = draw(8, 1), draw(8, seed=1)
    task = Regression([0.5], [2.0])
    assert loss_of(task, logits, targets).equal(loss_of(task, logits, targets[:, None]))
    assert measured(task, logits, targets) == measured(task, logits, targets[:, None])


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Classification(0.1), torch.tensor([1, 0, 3])),
        (MultiLabel(), torch.tensor([[1.0, 0, 1, 0]] * 3)),
        (Regression(), torch.randn(3, 4)),
    ],
)
def test_losses_are_float32_under_autocast(task, targets):
    logits = draw(3, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_of(task, logits, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(loss_of(task, logits.float(), targets).item(), rel=1e-6)


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "labels"), [(200, 5), (30, 1), (50, 12)])
@pytest.mark.parametrize("ties", [False, True])
def test_multilabel_metrics_are_those_of_scikit_learn(n, labels, ties):
    targets = (draw(n, labels, seed=1) > 0.8).float()
    logits = draw(n, labels) + targets
    if ties:
        logits = logits.round()
    p, truth = logits.double().sigmoid().numpy(), targets.numpy().astype(int)
    there = truth.any(0)
    found = measured(MultiLabel(0.4), logits, targets)
    want = sklearn_metrics.average_precision_score(truth[:, there], p[:, there], average="macro")
    assert found["map"] == pytest.approx(want, abs=1e-12)
    predicted = (p > 0.4).astype(int)
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(truth.ravel(), predicted.ravel()), abs=1e-12)
    assert found["accuracy"] == pytest.approx((truth == predicted).mean(), abs=1e-12)
    losses = [
        sklearn_metrics.log_loss(truth[:, k], np.stack([1 - p[:, k], p[:, k]], 1), labels=[0, 1]) for k in range(labels)
    ]
    assert found["nll"] == pytest.approx(sum(losses), rel=1e-9)


def test_a_label_that_nobody_has_is_left_out_of_the_mean():
    targets = torch.tensor([[1.0, 0], [0, 0], [1, 0]])
    logits = torch.tensor([[2.0, 5], [1, 5], [3, 5]])
    assert measured(MultiLabel(), logits, targets)["map"] == 1
    assert measured(MultiLabel(), logits, torch.zeros(3, 2)) == pytest.approx(
        {"map": 0, "accuracy": 0, "f1": 0, "nll": torch.nn.functional.softplus(logits.double()).sum().item() / 3}
    )


@pytest.mark.parametrize("values", [1, 3])
def test_regression_metrics_are_those_of_scikit_learn_in_the_targets_own_units(values):
    mean, std = [100.0, -3.0, 0.0][:values], [50.0, 0.1, 1.0][:values]
    logits = draw(40, values, scale=1.0)
    targets = (logits + draw(40, values, scale=0.4, seed=1)) * torch.tensor(std) + torch.tensor(mean)
    predicted = logits.double().numpy() * np.array(std) + np.array(mean)
    truth = targets.double().numpy()
    found = measured(Regression(mean, std), logits, targets)
    assert found["rmse"] == pytest.approx(sklearn_metrics.root_mean_squared_error(truth, predicted), rel=1e-12)
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(truth, predicted), rel=1e-12)
    assert found["r2"] == pytest.approx(sklearn_metrics.r2_score(truth, predicted), rel=1e-9)


def test_r2_of_whoever_says_the_mean_is_zero_and_targets_that_are_all_alike_have_one_that_is_a_number():
    targets = torch.tensor([[1.0], [2.0], [6.0]])
    assert measured(Regression(), torch.full((3, 1), 3.0), targets)["r2"] == pytest.approx(0, abs=1e-12)
    assert math.isfinite(measured(Regression(), torch.zeros(3, 1), torch.zeros(3, 1))["r2"])


CASES = {
    "classification": (Classification(), draw(101, 6), torch.arange(101) % 6),
    "multilabel": (MultiLabel(), draw(101, 6), (draw(101, 6, seed=1) > 0).float()),
    "regression": (Regression([3.0] * 2, [7.0] * 2), draw(101, 2), 3 + 7 * draw(101, 2, seed=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_metrics_do_not_depend_on_the_batches_and_a_metric_can_be_used_again(name):
    task, logits, targets = CASES[name]
    whole = measured(task, logits, targets)
    for batch in (1, 7, 50):
        assert measured(task, logits, targets, batch) == whole
    metric = task.metrics()
    metric.update(Outputs.of(logits[:50]), targets[:50])
    metric.compute()
    metric.reset()
    metric.update(Outputs.of(logits), targets)
    assert {k: float(v) for k, v in metric.compute().items()} == whole
    assert task.monitor[0] in whole


def test_a_metric_keeps_outputs_that_are_written_over_afterwards():
    task, logits, targets = CASES["classification"]
    static, metric = torch.empty(50, 6), task.metrics()
    for i in (0, 50):
        metric.update(Outputs.of(static.copy_(logits[i : i + 50])), targets[i : i + 50])
    assert {k: float(v) for k, v in metric.compute().items()} == measured(task, logits[:100], targets[:100])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_numbers_are_refused(name, bad):
    task, logits, targets = CASES[name]
    logits = logits.clone()
    logits[3, 1] = bad
    with pytest.raises(UserError, match=r"(of|for) 1 of 101 samples are not finite.*smaller learning rate"):
        measured(task, logits, targets)


# -- what is watched, predicted and compared -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_scores_average_to_the_metric_that_they_are_named_after(name):
    task, logits, targets = CASES[name]
    metrics, named = measured(task, logits, targets), {"absolute_error": "mae"}
    for key, values in task.scores(Outputs.of(logits), targets).items():
        assert values.shape == (101,)
        assert values.double().mean().item() == pytest.approx(metrics[named.get(key, key)], rel=1e-6)


def test_scores_of_mixed_labels_count_the_larger_share():
    mixed = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    assert Classification().scores(Outputs.of(torch.tensor([[2.0, 1], [2, 1]])), mixed)["accuracy"].tolist() == [1, 0]


@pytest.mark.parametrize("name", CASES)
def test_a_network_agrees_with_itself_and_kl_is_its_formula(name):
    task, logits, _ = CASES[name]
    other = logits + draw(*logits.shape, seed=2)
    alike, found = (task.agreement(Outputs.of(x), Outputs.of(logits)) for x in (logits, other))
    assert alike.keys() == found.keys()
    perfect = {"agreement": 1.0, "kl": 0.0, "deviation": 0.0}
    for key, values in alike.items():
        torch.testing.assert_close(values, torch.full((101,), perfect[key], dtype=torch.float64))
    s, t = other.double(), logits.double()
    if name == "classification":
        p, q = t.softmax(1), s.softmax(1)
        torch.testing.assert_close(found["kl"], (p * (p / q).log()).sum(1))
    elif name == "multilabel":
        p, q = t.sigmoid(), s.sigmoid()
        torch.testing.assert_close(found["kl"], (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1))
        torch.testing.assert_close(found["agreement"], ((s > 0) == (t > 0)).double().mean(1))
    else:
        torch.testing.assert_close(found["deviation"], 7 * (s - t).abs().mean(1))


def test_predictions_are_decoded():
    logits = torch.tensor([[0.0, 2.0], [-1.0, -3.0]])
    of = Outputs.of(logits)
    found = Classification().decode(of)
    assert found["label"].tolist() == [1, 0]
    torch.testing.assert_close(found["confidence"], torch.tensor([2.0, 2.0]).sigmoid())
    assert MultiLabel(0.3).decode(of)["labels"].tolist() == [[True, True], [False, False]]
    assert MultiLabel(0.6).decode(of)["labels"].tolist() == [[False, True], [False, False]]
    assert Regression([10.0, 20.0], [2.0, 3.0]).decode(of)["values"].tolist() == [[10.0, 26.0], [8.0, 11.0]]


def test_units_turn_outputs_into_values():
    task = Regression([10.0, 20.0], [2.0, 3.0])
    units, logits = task.units(), draw(5, 2)
    by_hand = logits.double() * torch.tensor(units["std"]).double() + torch.tensor(units["mean"]).double()
    torch.testing.assert_close(task.values(Outputs.of(logits)), by_hand)
    assert Classification().units() is None
    assert MultiLabel().units() is None


# -- chance ------------------------------------------------------------------------------------------------------------


def random_scores(task: Task, targets: Tensor, outputs: int, times: int = 200) -> list[float]:
    return [measured(task, draw(len(targets), outputs, seed=i), targets)[task.monitor[0]] for i in range(times)]


def test_guessing_is_seldom_better_than_chance_and_knowing_is():
    labels = torch.arange(300) % 4
    some = (draw(160, 8, seed=1) > 0.6).float()
    numbers = 3 + 7 * draw(80, 1, seed=1)
    for task, targets, outputs in (
        (Classification(), labels, 4),
        (MultiLabel(), some, 8),
        (Regression([3.0], [7.0]), numbers, 1),
    ):
        chance = task.chance(targets)
        assert chance is not None
        guessed = random_scores(task, targets, outputs)
        assert sum(task.better(value, chance) for value in guessed) <= 1, task
    assert Classification().better(0.9, Classification().chance(labels))
    assert MultiLabel().better(
        measured(MultiLabel(), some + draw(160, 8, scale=0.5), some)["map"], MultiLabel().chance(some)
    )
    assert Regression().better(6.0, Regression().chance(numbers))


@pytest.mark.parametrize(("n", "share"), [(20, 0.25), (160, 0.1), (160, 0.6)])
def test_chance_of_several_labels_starts_at_the_mean_of_random_orders(n, share):
    """With very many labels that are drawn alike the allowance for luck vanishes."""
    targets = torch.zeros(n, 4000)
    targets[: round(n * share)] = 1
    scores = torch.rand(n, 4000, generator=torch.Generator().manual_seed(0))
    found = measured(MultiLabel(), scores.logit(), targets)["map"]
    assert MultiLabel().chance(targets) == pytest.approx(found, abs=0.012)


def test_chance_of_numbers_is_their_deviation_and_of_a_label_that_nobody_has_unknown():
    targets = torch.tensor([[1.0, 0.0], [3.0, 10.0]])
    assert Regression().chance(targets) == pytest.approx((1 + 5) / 2)
    assert Regression().chance(targets[:, 0]) == pytest.approx(1)
    assert MultiLabel().chance(torch.zeros(5, 3)) is None


def test_of_few_samples_chance_leaves_room_to_be_right():
    for task, targets in ((Classification(), torch.tensor([0, 1, 1])), (MultiLabel(), torch.tensor([[1.0], [0], [1]]))):
        assert task.chance(targets) < 1


# -- batches and refusals ----------------------------------------------------------------------------------------------


def test_batches_are_made_of_what_loaders_yield():
    x, y, ids = torch.randn(4, 3), torch.arange(4), torch.arange(10, 14)
    for raw in ((x, y), [x, y], {"inputs": x, "labels": y}, {"images": x, "target": y}):
        batch = to_batch(raw)
        assert batch.inputs is x
        assert batch.targets is y
        assert batch.ids is None
    own = Batch(x, y, ids)
    assert to_batch(own) is own
    named = to_batch({"input_ids": x, "mask": y, "label": y, "ids": ids})
    assert named.inputs.keys() == {"input_ids", "mask"}
    assert named.ids is ids
    assert to_batch((x, ids, y)).inputs == (x, ids)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"inputs": torch.zeros(2)}, "keys inputs has no labels: name them labels or targets"),
        (torch.zeros(2), r"yields float32 \(2,\)"),
        ([torch.zeros(2)], r"yields \(float32 \(2,\)\)"),
        ((torch.zeros(2), 3), r"should be a pair \(inputs, targets\)"),
    ],
)
def test_what_is_no_batch_is_refused(raw, says):
    with pytest.raises(UserError, match=says):
        to_batch(raw)


@pytest.mark.parametrize(
    ("task", "logits", "targets", "says"),
    [
        (Classification(), (4, 3), torch.rand(4), r"float32 \(4,\).*task=regression"),
        (Classification(), (4, 3), torch.rand(4, 2), "task=multilabel"),
        (Classification(), (4, 3), torch.tensor([[0], [1], [2], [0]]), r"needs integers \(4,\)"),
        (Classification(), (4, 3), torch.tensor([0, 1, 2, 3]), "Labels go from 0 to 3, and the network gives 3 logits"),
        (Classification(), (4, 3), [0, 1, 2, 0], "The targets are list"),
        (Classification(), (4, 3, 8, 8), torch.zeros(4).long(), r"needs logits \(N, classes\)"),
        (MultiLabel(), (4, 3), torch.tensor([0, 1, 2, 0]), "task=classification"),
        (MultiLabel(), (4, 3), torch.zeros(4, 2), r"gives \(4, 3\) and the targets are \(4, 2\)"),
        (Regression(), (4, 3), torch.zeros(4), "as many outputs as there are values"),
        (Regression(), (4, 1), torch.zeros(4, 2), "as many outputs as there are values"),
    ],
)
def test_targets_of_another_task_are_refused_in_one_line(task, logits, targets, says):
    with pytest.raises(UserError, match=says) as caught:
        loss_of(task, draw(*logits), targets)
    assert "\n" not in str(caught.value)


def test_narrow_integers_are_labels_too():
    logits, labels = draw(3, 4), torch.tensor([1, 3, 0])
    for dtype in (torch.int32, torch.uint8):
        assert loss_of(Classification(), logits, labels.to(dtype)).equal(loss_of(Classification(), logits, labels))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Classification(label_smoothing=1.0), "label_smoothing=1.0 must be at least 0 and below 1"),
        (lambda: MultiLabel(threshold=0), "threshold=0 is a probability"),
        (lambda: Regression([0.0], [0.0]), "std above 0"),
        (lambda: Regression([0.0, 1.0], [1.0]), "one of each"),
        (lambda: named_task("boxes"), "choose classification, multilabel, regression"),
    ],
)
def test_wrong_options_are_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_a_task_is_found_by_its_name():
    for name, kind in TASKS.items():
        assert type(named_task(name)) is kind
    own = MultiLabel(0.3)
    assert named_task(own) is own
