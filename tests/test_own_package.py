"""One package of the user's own with a network, data module, optimizer, callback, task and method: named from outside, in
yaml files beside it, trained in one run, stopped and resumed, evaluated, exported, and a teacher."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from litdistill.evaluation.evaluate import differences, evaluate, load_run, rebuild
from litdistill.export.export import export
from litdistill.export.predict import load
from litdistill.training.train import train
from litdistill.utils.errors import Stopped
from litdistill.utils.files import write_text
from tests.conftest import compose_config

CODE = '''
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litdistill import Method
from litdistill.tasks import Classification


class Net(nn.Module):
    """Knows its classes by itself."""

    def __init__(self, width=8):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, width), nn.Tanh()), nn.Linear(width, 3)

    def forward(self, rows):
        return {"logits": self.head(self.body(rows))}


class Rows(LightningDataModule):
    """Rows of six numbers of three classes, in tuples."""

    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        draw = torch.Generator().manual_seed(0)
        self.sets = []
        for count in (96, 48, 60):
            y = torch.arange(count) % 3
            self.sets.append(TensorDataset(F.one_hot(y, 6) * 1.5 + torch.randn(count, 6, generator=draw), y))

    def train_dataloader(self):
        return DataLoader(self.sets[0], self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.sets[1], 32)

    def test_dataloader(self):
        return DataLoader(self.sets[2], 32)


class Signs(torch.optim.Optimizer):
    """Steps of one size along the sign of the gradient."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())
        return loss


class Counter(Callback):
    """Counts the minibatches."""

    seen = 0

    def __init__(self, by=1):
        self.by = by

    def on_train_batch_end(self, *_):
        Counter.seen += self.by


class Focal(Classification):
    """Focal loss, Lin et al. 2017 (arXiv 1708.02002)."""

    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def loss(self, net, outputs, batch):
        log_p = outputs.logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
        return {"focal": -((1 - log_p.exp()) ** self.gamma * log_p).mean()}


class Distance(Method):
    """Mean absolute difference of the logits."""

    def __init__(self, hard=1.0, soft=1.0):
        super().__init__(hard)
        self.soft = soft

    def forward(self, student, teacher, batch):
        return {"soft": self.soft * (student.logits - teacher.logits).abs().mean()}
'''

YAML = {
    "net/mine": "_target_: mine_pkg.parts.Net\nwidth: 8\n",
    "net/mine_wide": "_target_: mine_pkg.parts.Net\nwidth: 24\n",
    "data/mine": "_target_: mine_pkg.parts.Rows\nbatch_size: 16\n",
    "task/mine": "_target_: mine_pkg.parts.Focal\ngamma: 1.5\n",
    "method/mine": "_target_: mine_pkg.parts.Distance\nsoft: 0.5\n",
    "optimizer/mine": "_target_: mine_pkg.parts.Signs\n_partial_: true\nlr: 0.02\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with that package, on Python's path, and its configs."""
    place = tmp_path_factory.mktemp("mine")
    write_text(place / "lib" / "mine_pkg" / "__init__.py", "")
    write_text(place / "lib" / "mine_pkg" / "parts.py", CODE)
    for name, text in YAML.items():
        write_text(place / "conf" / f"{name}.yaml", text)
    sys.path.insert(0, str(place / "lib"))
    yield place
    sys.path.remove(str(place / "lib"))
    for name in [name for name in sys.modules if name.split(".")[0] == "mine_pkg"]:
        del sys.modules[name]


def config(place: Path, name: str, *overrides: str) -> DictConfig:
    own = [f"{group}=mine" for group in ("data", "task", "optimizer", "net@student")]
    cfg = compose_config(
        place / "runs" / name,
        f"hydra.searchpath=[file://{place / 'conf'}]",
        *(*own, "net@teacher=mine_wide", "method=mine", "trainer=cpu", "trainer.max_epochs=3"),
        *("+callbacks.mine={_target_: mine_pkg.parts.Counter, by: 2}", "trainer.log_every_n_steps=2", *overrides),
    )
    write_text(Path(cfg.folder) / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    return cfg


@pytest.fixture(scope="module")
def finished(place) -> Path:
    cfg = config(place, "run")
    train(cfg)
    return Path(cfg.folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_one_run_has_all_of_them(finished):
    from mine_pkg.parts import Counter

    summary = load_run(finished)[1]
    assert (summary["task"], summary["method"], summary["student"]["name"]) == ("Focal", "Distance", "Net-8")
    assert summary["data"]["name"] == "Rows"
    assert [summary["data"][split] for split in ("train", "val", "test")] == [96, 48, 60]
    assert summary["student"]["test"]["accuracy"]["best"] > 0.5  # of three classes
    assert summary["student"]["agreement"] > 0.5
    assert summary["teacher"]["params"] == 24 * 7 + 3 * 25
    assert (
        Counter.seen == 2 * 6 * 3 * 1
    )  # each minibatch of the student, and none of the teacher that was trained first
    assert summary["steps"] == 18


def test_the_steps_are_those_of_the_own_optimizer(finished):
    """Each moves every weight by its rate, or not at all."""
    start = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    assert start["optimizer_states"][0]["param_groups"][0]["lr"] == 0.02


def test_it_is_evaluated_to_the_digit_and_exported(finished):
    assert differences(evaluate(finished), load_run(finished)[1]) == []
    pytest.importorskip("onnxruntime")
    path, check = export(finished)
    assert check["metric"] == "accuracy"
    data, distiller = rebuild(finished)
    batch = next(data.batches("test"))
    with torch.no_grad():
        expected = distiller.deployed_student.eval()(batch.inputs)["logits"]
    assert np.abs(load(path).run(batch.inputs.numpy()) - expected.numpy()).max() < 1e-5


class StopAt(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 8:
            signal.raise_signal(signal.SIGINT)


def test_it_goes_on_after_a_stop(place, finished):
    """And takes as many steps in all."""
    with pytest.raises(Stopped):
        train(config(place, "parts"), [StopAt()])
    cfg = config(place, "parts")
    train(cfg)
    assert json.loads((Path(cfg.folder) / "summary.json").read_text())["steps"] == 18
    assert weights(Path(cfg.folder)).keys() == weights(finished).keys()


def test_it_is_a_teacher(place, finished):
    cfg = config(place, "pupil", "net@teacher=mine", f"teacher.checkpoint={finished}", "trainer.max_epochs=1")
    train(cfg)
    taught = load_run(Path(cfg.folder))[1]["teacher"]
    assert taught["sha256"] == load_run(finished)[1]["student"]["sha256"]
