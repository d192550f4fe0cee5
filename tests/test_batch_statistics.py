"""Statistics of batch normalization that lag behind the weights are computed anew over training samples."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from litdistill.distillation.batch_statistics import LAG, SAMPLES, steps_of_lag, training_batches
from litdistill.distillation.distiller import Distiller
from litdistill.evaluation.predictions import quality
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.small import conv4
from litdistill.training.distill import distill
from tests.fits import digits, fit, grouped, same


def slow(momentum=0.01, widths=(16, 16, 16, 16)):
    """A ConvNet for digits whose statistics move slowly, as those of torchvision's MobileNetV3 do."""
    torch.manual_seed(0)
    net = Preprocessed(conv4(10, (1, 8, 8), widths=list(widths)), Preprocess([0.3], [0.35]))
    for norm in norms(net):
        norm.momentum = momentum
    return net


def norms(net):
    return [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


def statistics(net):
    return {k: v.clone() for k, v in net.state_dict().items() if "running" in k or "tracked" in k}


def reference(net, data, batches=None):
    """The same network after `torch.optim.swa_utils.update_bn` over the training samples."""
    net = copy.deepcopy(net)
    update_bn([b.inputs for b in batches or training_batches(data, torch.device("cpu"))], net)
    return net


@pytest.mark.parametrize("group", [0, 16])
def test_a_short_run_of_slow_statistics_is_judged_by_its_weights(tmp_path, group):
    data, net = digits(per_class=40), slow()
    trainer = fit(Distiller(net, data=data, group=group), grouped(data, group), tmp_path, max_epochs=12)
    known = {k: v for k, v in statistics(reference(net, data)).items() if "tracked" not in k}
    found = statistics(net)
    for name, value in known.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    assert all(n.num_batches_tracked == trainer.global_step and n.momentum == 0.01 for n in norms(net))
    right = quality(net, data, Distiller(slow()).task, "val")["accuracy"]
    assert right > 0.8
    assert trainer.callback_metrics["val/accuracy"] == pytest.approx(right)


def test_training_itself_is_the_same_and_statistics_that_have_caught_up_stay(tmp_path):
    data = digits()
    weights = []
    for momentum in (0.01, 0.99):  # the latter has caught up after two steps, before the first validation
        net = slow(momentum)
        fit(Distiller(net, data=data), data, tmp_path)
        weights.append({k: v.clone() for k, v in net.state_dict().items() if "running" not in k})
        assert steps_of_lag(norms(net)[0]) == {0.01: 917, 0.99: 2}[momentum]
    assert same(*weights)
    ready = statistics(net)
    assert not any(torch.equal(ready[k], v) for k, v in statistics(reference(net, data)).items() if "running" in k)
    assert (1 - 0.01) ** 917 <= LAG < (1 - 0.01) ** 916


def test_frozen_layers_and_exact_means_stay_as_they_are(tmp_path):
    data, net = digits(), slow()
    frozen, exact, last = norms(net)[0], norms(net)[1], norms(net)[-1]
    frozen.training, exact.momentum = False, None
    before = [x.clone() for x in (frozen.running_mean, frozen.running_var)]
    fit(Distiller(net, data=data), data, tmp_path)
    assert torch.equal(frozen.running_mean, before[0])
    assert torch.equal(frozen.running_var, before[1])
    assert not frozen.training
    assert exact.momentum is None
    assert exact.training
    assert last.training
    expected = statistics(reference(net, data))
    name = next(k for k, m in net.named_modules() if m is exact) + ".running_mean"
    assert not torch.allclose(statistics(net)[name], expected[name], rtol=1e-3)


def test_an_average_of_weights_has_the_statistics_of_its_own_weights(tmp_path):
    data = digits(per_class=40)
    distiller = Distiller(slow(0.5), data=data, ema=0.9)  # statistics lag by the average's decay, not by their momentum
    fit(distiller, data, tmp_path, max_epochs=3)
    found = statistics(distiller.evaluated)
    for name, value in statistics(reference(distiller.evaluated, data)).items():
        if "tracked" not in name:
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_an_epoch_without_validation_ends_with_statistics_of_its_weights(tmp_path):
    data, net = digits(), slow()
    fit(Distiller(net, data=data), data, tmp_path, max_epochs=3, check_val_every_n_epoch=2)
    found = statistics(net)
    for name, value in statistics(reference(net, data)).items():
        if "tracked" not in name:
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("group", [0, 2])
def test_a_resumed_run_of_slow_statistics_is_the_same_to_the_bit(tmp_path, group):
    def run(epochs, ckpt=None):
        data = digits()
        distiller = Distiller(slow(), data=data, seed=0, ema=0.9, group=group)
        trainer = fit(distiller, grouped(data, group), tmp_path, ckpt, max_epochs=epochs)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return distiller

    whole = run(4)
    run(2)
    resumed = run(4, tmp_path / "2.ckpt")
    assert same(whole.student, resumed.student)
    assert same(whole.evaluated, resumed.evaluated)


class Ranks(Callback):
    """Writes the statistics of each process, and the metric that it has."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        found = {"net": pl_module.student.state_dict(), "value": trainer.callback_metrics["val/accuracy"]}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def test_two_processes_have_the_statistics_of_one(tmp_path):
    data, net = digits(per_class=40), slow()
    ranks = {"strategy": "ddp_fork", "devices": 2, "callbacks": [Ranks(tmp_path)]}
    fit(Distiller(net, data=data), data, tmp_path, max_epochs=12, **ranks)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(one["net"], other["net"])
    net.load_state_dict(one["net"])
    for name, value in statistics(reference(net, data)).items():
        if "tracked" not in name:
            torch.testing.assert_close(one["net"][name], value, atol=1e-6, rtol=1e-5)
    right = quality(net, data, Distiller(slow()).task, "val")["accuracy"]
    assert right > 0.5  # chance is 0.1; half as many steps as in one process
    assert one["value"] == other["value"] == pytest.approx(right)


def test_any_loader_will_do(tmp_path):
    data = digits(per_class=40)
    every = list(data.batches("train"))
    images, labels = torch.cat([b.inputs for b in every]), torch.cat([b.targets for b in every])
    order = torch.Generator().manual_seed(0)
    train = DataLoader(TensorDataset(images, labels), 40, shuffle=True, generator=order)
    val = DataLoader(TensorDataset(images[::3], labels[::3]), 100)
    net = slow()
    distiller = distill(net, None, train, val, max_epochs=12, out=tmp_path, trainer={"logger": False})
    assert quality(distiller.deployed_student, data, distiller.task, "val")["accuracy"] > 0.8
    assert sum(len(b.targets) for b in distiller.statistics.batches) == len(images) <= SAMPLES
