"""Every method of conf/method with its published weights in whole runs on the digits.

    pytest -m zoo tests/test_zoo.py

Each trains, term by term, is logged, goes on to the bit after a stop, and ships the student alone.
"""

from __future__ import annotations

import signal
from math import isfinite
from pathlib import Path
from statistics import mean

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from litdistill.config.build import build_data, build_net
from litdistill.config.recipes import teacher_folder
from litdistill.evaluation.evaluate import differences, evaluate, load_run
from litdistill.training.train import train
from litdistill.utils.errors import Stopped
from litdistill.utils.files import write_text
from litdistill.utils.paths import CONF
from tests.conftest import compose_config

pytestmark = pytest.mark.zoo

OTHER_TASKS = {
    "binary_kd",
    "crosskd",
    "dense_kd",
    "fgd",
    "ld",
    "pkd_dense_kd",
    "ld_dense_kd",
    "pseudo_boxes",
}  # several labels a sample, boxes (tests/test_detection_runs.py)
NAMES = sorted(p.stem for p in (CONF / "method").glob("*.yaml") if p.stem not in OTHER_TASKS)
STEPS, EPOCHS, WINDOW = 8, 6, 4  # steps an epoch, epochs, steps that one logged value is the mean of
RUN = [
    "trainer=cpu",
    f"trainer.max_epochs={EPOCHS}",
    f"trainer.log_every_n_steps={WINDOW}",
    f"data.epoch_size={32 * STEPS}",
    "data.batch_size=32",
    "data.per_class=16",  # CRD's terms grow while its memories fill: each image is to be met more than once
    "optimizer.lr=3e-3",
    "student.widths=[8,16,16]",
    "teacher.widths=[16,24,32]",
]
TWO_PHASES = {"ab", "fsp", "ft"}
ROBUST = {"ard", "rslad"}
REUSES_CLASSIFIER = {"simkd", "feature_only"}

SOFT = ("kd", "logit_std", "mutual", "online", "soft_target_ce", "teacher_free", "wttm")

# Terms by method, where they are not the labels' and one other.
TERMS = {
    "supervised": {"hard"},
    "logit_mse": {"soft"},
    "simkd": {"hint"},
    "feature_only": {"hint"},
    "dist": {"hard", "inter", "intra"},
    "dkd": {"hard", "tckd", "nckd"},
    "ard": {"soft"},
    "rslad": {"adversarial", "soft"},
    "ft": {"hard", "hint", "paraphraser"},
    "hard_pseudo_label": {"hard", "pseudo"},
    "kd_at": {"hard", "kd_soft", "at_hint"},
    "kd_crd": {"hard", "kd_soft", "crd_hint"},
    "mft": {"soft"},
    "mlkd": {"hard", "instance", "batch", "classes"},
    "nkd": {"hard", "target", "others"},
    "rkd": {"hard", "distance", "angle"},
    "srd": {"hard", "hint", "soft"},
    "srrl": {"hard", "hint", "soft"},
    "wkd": {"hard", "target", "others"},
    "pairs": {"hard", "kl_logits", "cosine_last"},
    **{k: {"hard", "soft"} for k in SOFT},
}

# What these are compared with begins as the student (its average) or as undecided as it (peers, a virtual teacher with a
# temperature of 20), so that there is nothing to be seen of the term until the student has learned something.
RISES = {("online", "soft"), ("mutual", "soft"), ("teacher_free", "soft")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Where the module's runs keep their one teacher."""
    return tmp_path_factory.mktemp("zoo")


def config(runs: Path, folder: Path, name: str) -> DictConfig:
    first = ["method.init_epochs=2"] if name in TWO_PHASES else []
    attacked = ["adversarial=pgd", "adversarial.steps=2"] if name in ROBUST else []
    cfg = compose_config(folder, *RUN, f"method={name}", *first, *attacked)
    cfg.runs = str(runs)
    return cfg


def run(cfg: DictConfig, *callbacks: Callback) -> Path:
    """Trains, and leaves the config where Hydra would."""
    folder = Path(cfg.folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg, callbacks)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """All that training ended with: of the student, its companions and the method."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """The terms of the loss in TensorBoard, and `total`: the mean of each epoch."""
    written = next(folder.rglob("events.out.tfevents.*")).parent
    events = EventAccumulator(str(written), size_guidance={"scalars": 0}).Reload()
    found: dict[str, dict[int, list[float]]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("loss/"):
            for e in events.Scalars(tag):
                found.setdefault(tag.removeprefix("loss/"), {}).setdefault((e.step - 1) // STEPS, []).append(e.value)
    return {k: {epoch: mean(v) for epoch, v in epochs.items()} for k, epochs in found.items()}


class StopAt(Callback):
    """What a user's Ctrl-C does in the middle of an epoch."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", NAMES)
def test_method(runs, tmp_path, name):
    folder = run(config(runs, tmp_path / "whole", name))

    # It trains, and every term of it is logged and falls.
    means = logged(folder)
    terms = {k: v for k, v in means.items() if k != "total"}
    assert set(terms) == TERMS.get(name, {"hard", "hint"})
    for term, v in means.items():
        assert all(map(isfinite, v.values())), term
        if term in terms:
            assert (v[max(v)] < v[min(v)]) == ((name, term) not in RISES), f"{term}, by epoch: {v}"
    if name not in TWO_PHASES:  # whose sum is another one in either phase
        assert means["total"][EPOCHS - 1] < means["total"][0]
        assert all(v.keys() == means["total"].keys() for v in terms.values())
    assert len(means["total"]) == EPOCHS

    # The student is shipped alone, and measured again it gives the summary.
    shipped = load_file(folder / "student.safetensors")
    cfg, summary = load_run(folder)
    data, _ = build_data(cfg)
    plain = build_net(cfg.student, data, "student").state_dict()
    if name in REUSES_CLASSIFIER:
        teacher = load_file(teacher_folder(cfg) / "student.safetensors")
        body = {f"backbone.{k}" for k in plain if not k.startswith("fc.")}
        own = {k for k in shipped if k.startswith("projector.")}
        assert own
        assert set(shipped) == body | own | {"classifier.weight", "classifier.bias"}
        assert torch.equal(shipped["classifier.weight"], teacher["fc.weight"])
    else:
        assert {k: v.shape for k, v in shipped.items()} == {k: v.shape for k, v in plain.items()}
    assert {k.split(".")[0] for k in weights(folder)} <= {"student", "method"}  # and no teacher in a checkpoint
    assert differences(evaluate(folder, device="cpu"), summary) == []

    # Stopped in the middle of an epoch, and continued, it ends where it would have ended.
    with pytest.raises(Stopped):
        run(config(runs, tmp_path / "parts", name), StopAt(STEPS + 2))
    assert equal(weights(folder), weights(run(config(runs, tmp_path / "parts", name))))
