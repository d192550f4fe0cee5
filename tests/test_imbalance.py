"""Classes of unequal size: balanced sampling and class weights, each against a closed form."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sklearn.utils.class_weight import compute_class_weight

from litdistill.config.build import build_task
from litdistill.data import augment as aug
from litdistill.data.datamodule import ImageData
from litdistill.tasks import Classification
from litdistill.tasks.classification import balanced_weights
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

LABELS = torch.tensor([0] * 50 + [1] * 7 + [2] * 20 + [3] * 2)
IDS = torch.arange(100, 179)


@pytest.mark.parametrize("size", [None, 40, 33, 500])
def test_balanced_epochs_hold_each_class_and_each_of_its_images_equally_often(size):
    epochs = [aug.balanced_epoch(5, e, IDS, LABELS, size) for e in range(7)]
    assert all(len(ids) == len(rounds) == (size or 79) for ids, rounds in epochs)
    ids, rounds = (torch.cat(x) for x in zip(*epochs, strict=True))
    labels = LABELS[ids - 100]
    whole = len(ids) // 4 * 4  # blocks of four, one of each class
    assert torch.equal(labels[:whole].view(-1, 4).sort(1).values, torch.arange(4).expand(whole // 4, 4))
    assert len({tuple(block) for block in labels[:whole].view(-1, 4).tolist()}) > 10
    for c in range(4):
        mine, passes = ids[labels == c], rounds[labels == c]
        members = IDS[(of_class := c == LABELS)]
        assert torch.equal(passes, torch.arange(len(mine)) // len(members))
        counts = torch.bincount(mine - 100, minlength=79)[of_class]
        assert counts.max() - counts.min() <= 1
        expected = torch.cat([aug.order(5, r, members) for r in range(int(passes[-1]) + 1)])
        assert torch.equal(mine, expected[: len(mine)])


def test_balanced_epochs_are_pure_functions_of_seed_and_epoch():
    shuffled = torch.randperm(79, generator=torch.Generator().manual_seed(0))
    one = aug.balanced_epoch(1, 3, IDS, LABELS)
    assert all(
        torch.equal(a, b) for a, b in zip(one, aug.balanced_epoch(1, 3, IDS[shuffled], LABELS[shuffled]), strict=True)
    )
    assert not torch.equal(one[0], aug.balanced_epoch(2, 3, IDS, LABELS)[0])
    assert not torch.equal(one[0], aug.balanced_epoch(1, 4, IDS, LABELS)[0])


def data(**options):
    return ImageData("digits", balanced=True, batch_size=16, download=False, **options)


def unbalance(module):
    """Leaves all of class 0, and three images of each other class."""
    module.setup()
    labels = module.train_targets[module.train_ids]
    kept = [module.train_ids[labels == c][: None if c == 0 else 3] for c in range(10)]
    module.train_ids = torch.cat(kept).sort().values
    return module


def test_a_balanced_loader_is_the_same_on_any_number_of_ranks_and_resumes():
    module = unbalance(data(epoch_size=100, augment=["Flip"]))
    loader = module.train_loader()
    loader.set_epoch(2)
    batches = [rows.ids for rows in loader]
    counts = torch.bincount(module.train_targets[torch.cat(batches)], minlength=10)
    assert counts.tolist() == [10] * 10
    module.batch_size = 8
    ranks = [module.train_loader(rank, 2) for rank in range(2)]
    for one in ranks:
        one.set_epoch(2)
    for whole, *parts in zip(batches, *ranks, strict=True):
        assert torch.equal(whole, torch.cat([part.ids for part in parts]))
    module.batch_size = 16
    again = module.train_loader()
    again.set_epoch(2)
    again.load_state_dict({"epoch": 2, "done": 3})
    assert all(torch.equal(a.ids, b) for a, b in zip(again, batches[3:], strict=True))


def test_the_views_of_a_small_class_are_counted():
    """Views that are numbered by round go beyond the epochs where a class is small."""
    module = unbalance(data(augment=["RandomErasing"]))
    epochs = 4
    largest = max(int(module._epoch(e).views.max()) for e in range(epochs))
    assert largest > epochs
    assert largest < module.view_count(epochs) <= largest + 3


def outputs(n=60, classes=4):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes, (n,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_cross_entropy_is_its_closed_form(smoothing):
    logits, targets = outputs()
    weights = torch.tensor([0.5, 3.0, 0.0, 1.0], dtype=torch.float64)
    found = Classification(smoothing, weights.tolist()).loss(None, Outputs.of(logits), Batch(None, targets))["hard"]
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    wanted = torch.nn.functional.one_hot(targets, 4) * (1 - smoothing) + smoothing / 4
    assert found.item() == pytest.approx(-(wanted * weights * log_p).sum(1).mean().item(), rel=1e-6)
    mixed = wanted.float()
    found = Classification(0.0, weights.tolist()).loss(None, Outputs.of(logits), Batch(None, mixed))["hard"]
    assert found.item() == pytest.approx(-(wanted * weights * log_p).sum(1).mean().item(), rel=1e-6)


def test_the_weighted_loss_of_a_batch_is_the_mean_of_its_halves():
    logits, targets = outputs()
    task = Classification(class_weights=balanced_weights(targets, 4))
    loss = lambda rows: task.loss(None, Outputs.of(logits[rows]), Batch(None, targets[rows]))["hard"].item()  # noqa: E731
    assert loss(slice(None)) == pytest.approx((loss(slice(30)) + loss(slice(30, None))) / 2, rel=1e-6)


def test_balanced_weights_are_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(4), y=LABELS.numpy())
    assert balanced_weights(LABELS, 4) == pytest.approx(expected.tolist())
    assert balanced_weights(torch.tensor([0, 0, 0, 2]), 3) == pytest.approx([4 / 6, 1, 2])


def test_a_config_says_balanced():
    module = unbalance(data())
    node = OmegaConf.create({"_target_": "litdistill.tasks.Classification", "class_weights": "balanced"})
    labels = module.train_targets[module.train_ids]
    assert build_task(node, module).class_weights.tolist() == pytest.approx(balanced_weights(labels, 10))
    plain = build_task(
        OmegaConf.create({"_target_": "litdistill.tasks.Classification", "class_weights": [1] * 10}), module
    )
    assert plain.class_weights.tolist() == [1] * 10


@pytest.mark.parametrize("weights", ["balanced", [1, -1], [float("inf"), 1]])
def test_other_weights_are_refused(weights):
    with pytest.raises(UserError, match="class_weights="):
        Classification(class_weights=weights)


def test_weights_of_another_number_of_classes_are_refused():
    logits, targets = outputs()
    with pytest.raises(UserError, match="are 2, and the network gives 4"):
        Classification(class_weights=[1, 2]).loss(None, Outputs.of(logits), Batch(None, targets))
