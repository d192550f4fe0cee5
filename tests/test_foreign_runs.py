"""Data, networks and a task of a stranger from the command's config: train, evaluate, export."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from litdistill import load_student
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.export.export import export
from litdistill.export.predict import load
from litdistill.training.train import train
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from tests.conftest import compose_config
from tests.foreigners import points

# -- train() -----------------------------------------------------------------------------------------------------------

MODULE = '''
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning import LightningDataModule
from litdistill.tasks import Classification

class Points(LightningDataModule):
    """Says nothing of itself: tuples, and no names."""

    def setup(self, stage=None):
        x = torch.randn(192, 4, generator=torch.Generator().manual_seed(0))
        y = x[:, :3].argmax(1)
        self.parts = [TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 96), (96, 144), (144, 192))]

    def train_dataloader(self):
        return DataLoader(self.parts[0], 32)

    def val_dataloader(self):
        return DataLoader(self.parts[1], 32)

    def test_dataloader(self):
        return DataLoader(self.parts[2], 32)

def net(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

class NamedPoints(Points):
    """Yields dicts, of which the network takes two."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch[0][:, :2], "more": batch[0][:, 2:], "labels": batch[1]}

class Both(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.net = net(width)

    def forward(self, x, more):
        return {"logits": self.net(torch.cat([x, more], 1))}

class Focal(Classification):
    """Lin et al. 2017 (arXiv 1708.02002): the cross-entropy of each sample times (1 - p) ** gamma."""

    def __init__(self, gamma: float = 2.0, label_smoothing: float = 0.0):
        super().__init__(label_smoothing)
        self.gamma = gamma

    def loss(self, net, outputs, batch):
        log_p = outputs.logits.float().log_softmax(1).gather(1, batch.targets[:, None])
        return {"focal": (-(1 - log_p.exp()) ** self.gamma * log_p).mean()}
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch) -> str:
    """A module of somebody else's, in a temporary folder, by its name."""
    name = f"outside_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def finished(folder: Path, *overrides: str) -> Path:
    """The folder of a run that `train()` has finished."""
    cfg = compose_config(folder, "trainer=cpu", "trainer.max_epochs=2", *overrides)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    return folder


def foreign_keys(outside: str) -> list[str]:
    """Networks and data of that module, in place of the default's."""
    return [
        "~data", f"+data={{_target_: {outside}.Points}}",
        "~student.widths", "~student.global_pool", f"student._target_={outside}.net",
        "~teacher.widths", "~teacher.global_pool", f"teacher._target_={outside}.net", "+teacher.width=16",
        "optimizer.lr=0.05", "++teacher.recipe.trainer.max_epochs=6",
    ]  # fmt: skip


@pytest.mark.usefixtures("drawn")
def test_a_foreign_data_module_trains_evaluates_and_exports_without_names(outside, tmp_path, caplog):
    folder = finished(tmp_path / "run", *foreign_keys(outside))
    _, summary = load_run(folder)
    assert summary["data"]["name"] == "Points"
    assert (summary["data"]["train"], summary["data"]["val"], summary["data"]["test"]) == (96, 48, 48)
    assert summary["teacher"] is not None
    assert summary["options"]["train/global_batch"] == 32
    events = EventAccumulator(str(folder)).Reload()
    assert (
        "loss/total" in events.Tags()["scalars"]
    )  # though an epoch has fewer minibatches than trainer.log_every_n_steps
    assert differences(evaluate(folder, device="cpu"), summary) == []
    assert list(folder.rglob("events*"))
    assert "left out" not in caplog.text  # the pictures in TensorBoard
    path, check = export(folder)
    assert check["agreement"] == 1.0
    model = load(path)
    assert model.facts.classes == ["0", "1", "2"]
    x, _ = points(192)
    given = torch.from_numpy(model.run(x[144:].numpy()))
    torch.testing.assert_close(given, load_student(folder)(x[144:]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("drawn")
def test_inputs_by_name_train_and_evaluate_too_and_an_export_says_what_does_it(outside, tmp_path, caplog):
    keys = [k.replace(".Points", ".NamedPoints").replace(".net", ".Both") for k in foreign_keys(outside)]
    folder = finished(tmp_path / "run", *keys)
    _, summary = load_run(folder)
    assert summary["data"]["input_shape"] is None
    assert summary["teacher"] is not None
    assert differences(evaluate(folder, device="cpu"), summary) == []
    assert "left out" not in caplog.text
    with pytest.raises(
        UserError, match=r"has one input, and this student takes several: load it with litdistill\.load_student"
    ):
        export(folder)
    x, y = (t[144:] for t in points(192))
    right = load_student(folder)(x=x[:, :2], more=x[:, 2:])["logits"].argmax(1) == y
    assert right.double().mean().item() == summary["student"]["test"]["accuracy"]["best"]


def test_a_task_of_ones_own_trains_and_evaluates(outside, tmp_path):
    folder = finished(
        tmp_path / "run",
        *foreign_keys(outside),
        f"task._target_={outside}.Focal",
        "+task.gamma=1.5",
        "logger=none",
    )
    _, summary = load_run(folder)
    assert summary["task"] == "Focal"
    assert differences(evaluate(folder, device="cpu"), summary) == []
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1


def test_its_loss_is_what_is_learnt(outside, tmp_path):
    """With labels alone one step of gradient descent is that of the focal loss, closed form and all."""
    folder = finished(
        tmp_path / "run", *foreign_keys(outside), f"task._target_={outside}.Focal", "method=supervised",
        "teacher=null", "logger=none", "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0", "optimizer.weight_decay=0",
        "optimizer.nesterov=false", "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "scheduler=none",
    )  # fmt: skip
    module = sys.modules[outside]
    torch.manual_seed(0)
    net = module.net()
    x, y = (t[:32] for t in points(192))
    log_p = net(x).log_softmax(1).gather(1, y[:, None])
    loss = (-((1 - log_p.exp()) ** 2) * log_p).mean()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    trained = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(trained[f"student.{name}"], value, rtol=1e-5, atol=1e-6)


def test_an_endless_loader_needs_to_be_told_its_epoch(tmp_path):
    keys = foreign_keys("tests.foreigners")
    keys[1] = "+data={_target_: tests.test_foreign_data.EndlessData}"
    keys = [k.replace("foreigners.net", "foreigners.mlp") for k in keys]
    fast = ["logger=none", "method=supervised", "teacher=null", "+student.width=4"]
    with pytest.raises(UserError, match=r"has no length.*trainer\.limit_train_batches"):
        finished(tmp_path / "a", *keys, *fast)
    assert load_run(finished(tmp_path / "b", *keys, *fast, "+trainer.limit_train_batches=5"))[1]["steps"] == 10
