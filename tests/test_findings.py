"""The guard for the student: chance level, one prediction for all, training samples learned by heart."""

import json
import math

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill.cli.commands import evaluate as evaluate_verb
from litdistill.cli.commands import export as export_verb
from litdistill.data.foreign import ForeignData
from litdistill.evaluation.findings import judge_gap
from litdistill.report.tables import summaries
from litdistill.tasks.classification import Classification
from litdistill.tasks.findings import constant, judge
from litdistill.tasks.multilabel import MultiLabel
from litdistill.tasks.regression import Regression
from litdistill.training.distill import distill
from litdistill.training.train import train
from litdistill.types import Batch, Outputs
from tests.composed import composed
from tests.fits import digits, net
from tests.test_train import run

ALONE = ["method=supervised", "teacher=null"]


def logits_of(predicted, classes=3):
    """Logits whose largest is that of these classes, other than that at random."""
    torch.manual_seed(0)
    return torch.rand(len(predicted), classes) + 2 * nn.functional.one_hot(torch.as_tensor(predicted), classes)


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        ([1] * 100, [0, 1] * 50, "it predicts cat for 100.0 %"),
        ([1] * 99 + [0], [0, 1] * 50, "it predicts cat for 99.0 %"),
        ([1] * 98 + [0] * 2, [0, 1] * 50, None),  # 2 of 100 differ
        ([1] * 100, [1] * 99 + [0], None),  # so are the labels
        ([1] * 100, [1] * 98 + [0] * 2, "it predicts cat for 100.0 %"),
    ],
)
def test_one_class_for_all_is_a_constant_unless_the_labels_are(predicted, labels, expected):
    found = constant(Classification(), Outputs.of(logits_of(predicted)), torch.tensor(labels), ("dog", "cat", "cow"))
    assert found == expected


def test_values_and_probabilities_that_do_not_depend_on_the_input_are_a_constant():
    torch.manual_seed(0)
    noise, targets = torch.randn(200, 2), torch.randn(200, 2) * 5 + 3
    task = Regression([3.0, 3.0], [5.0, 5.0])
    assert constant(task, Outputs.of(noise * 0.005), targets) == "it gives the same values for all samples"
    assert constant(task, Outputs.of(noise * 0.02), targets) is None
    assert constant(task, Outputs.of(noise * 0.005), targets * 0 + 3) is None  # nothing varies
    labels = (noise > 0).long()
    assert (
        constant(MultiLabel(), Outputs.of(noise * 0.03 - 5), labels)
        == "it gives the same probabilities for all samples"
    )
    assert (
        constant(MultiLabel(), Outputs.of(noise - 5), labels) is None
    )  # no label is predicted, yet samples are ranked
    assert constant(Classification(), Outputs({"other": noise}), labels) is None  # no logits: nothing to judge


def test_chance_is_said_with_the_value_and_the_level():
    found = judge(Classification(), Outputs.of(logits_of([0, 1] * 50)), torch.tensor([0, 0, 1, 1] * 25), 0.5)
    assert found.keys() == {"chance"}
    assert "accuracy on the test set is 50.00 %" in found["chance"]
    assert "up to 65.00 %" in found["chance"]  # 0.5 + 3 standard deviations of 100 guesses
    assert "learned nothing" in found["chance"]


def test_few_samples_are_not_said_to_show_that_nothing_is_learned():
    guesses, targets = logits_of([0] * 8 + [1] * 4 + [0] * 4), torch.tensor([0] * 8 + [1] * 8)
    found = judge(Classification(), Outputs.of(guesses), targets, 0.75)
    assert "may be at chance level" in found["chance"]
    assert "16 samples are too few" in found["chance"]
    assert "learned nothing" not in found["chance"]


class Memory(nn.Module):
    """A network that knows the images of the training set, and of all others nothing."""

    def __init__(self, data):
        super().__init__()
        self.images = data.get_batch("train", data.train_ids).inputs.flatten(1).float()
        self.targets = data.train_targets[data.train_ids]

    def forward(self, images):
        near = torch.cdist(images.flatten(1).float(), self.images).min(1)
        found = nn.functional.one_hot(self.targets[near.indices], 10).float()
        return torch.where(near.values[:, None] == 0, found, torch.eye(10)[:1].expand(len(images), -1))


def test_training_samples_learned_by_heart_are_noticed():
    data = digits(per_class=40)
    found = judge_gap(Memory(data), data, Classification(), "cpu")
    assert f"100.00 % on {len(data.val_ids)} training samples" in found["gap"]
    trained = net()
    assert judge_gap(trained, data, Classification(), "cpu") == {}


def test_whole_batches_of_a_strangers_loader_are_looked_at():
    data = digits(per_class=40)
    every = Batch(*data.get_batch("train", data.train_ids)[:2])
    others = next(iter(data.batches("val")))
    parts = [TensorDataset(batch.inputs, batch.targets) for batch in (every, others)]
    module = LightningDataModule.from_datasets(*parts, test_dataset=parts[1], batch_size=40)
    found = judge_gap(Memory(data), ForeignData(module, Classification().batch), Classification(), "cpu")
    count = 40 * math.ceil(len(others.targets) / 40)  # whole minibatches, as many samples as validate at least
    assert len(others.targets) < count < 400
    assert f"100.00 % on {count} training samples" in found["gap"]


class Constant(Callback):
    """Makes the student predict one class whatever it sees."""

    def on_train_start(self, trainer, pl_module):
        last = [m for m in pl_module.student.modules() if isinstance(m, nn.Linear)][-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.eye(10)[3])


def test_a_constant_is_told_at_the_end_of_training_by_evaluate_by_export_and_in_the_summary(small, caplog, capsys):
    cfg = small(*ALONE, "optimizer.lr=1e-12")
    folder = run(cfg, Constant())
    last = caplog.records[-1].getMessage()
    said = "The student is a constant: it predicts 3 for 100.0 % of the test set."
    warned = [r.getMessage() for r in caplog.records[-2:] if r.levelname == "WARNING"]
    assert len(warned) == 2, last  # the last lines of all
    assert warned[0].startswith(said)
    assert "at chance level" in warned[1]
    (summary,) = summaries([folder])
    assert list(summary["findings"].values()) == warned
    capsys.readouterr()
    evaluate_verb(composed("evaluate", [f"run={folder}", "device=cpu"]))
    assert said in " ".join(capsys.readouterr().out.splitlines()[-8:])
    for precision in ("fp32", "int8"):
        export_verb(composed("export", [f"run={folder}", f"precision={precision}"]))
        assert said in " ".join(capsys.readouterr().out.splitlines()[-8:])
    manifest = json.loads((folder / "export" / "manifest.json").read_text())
    assert all("constant" in entry["check"]["findings"] for entry in manifest["files"].values())


def test_a_student_that_has_learned_is_not_warned_of(small, caplog):
    cfg = small(*ALONE, "optimizer.lr=0.02", "trainer.max_epochs=4", "data.per_class=40")
    train(cfg)
    assert summaries([cfg.folder])[0]["findings"] == {}
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_distill_warns_of_a_constant(tmp_path, caplog):
    data = digits(per_class=40)
    every = list(data.batches("train"))
    images, labels = torch.cat([b.inputs for b in every]), torch.cat([b.targets for b in every])
    loader = DataLoader(TensorDataset(images, labels), 40)
    options = {"max_epochs": 1, "out": tmp_path, "trainer": {"logger": False}, "callbacks": [Constant()]}
    distill(net(), None, loader, loader, optimizer=lambda p: torch.optim.SGD(p, lr=1e-12), **options)
    assert "The student is a constant: it predicts class 3 for 100.0 % of the validation set." in caplog.text
