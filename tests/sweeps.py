"""A sweep whose trials are a closed form, and what tests of sweeps share."""

import json
import multiprocessing
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from litdistill.sweep import trial as sweep_trial
from litdistill.utils.paths import CONF

pytest.importorskip("optuna")

from litdistill.sweep import study as sweep_study
from litdistill.sweep.study import sweep
from tests.composed import composed

FORK = multiprocessing.get_context("fork")


def start(folder: Path, *overrides: str, space: dict | None = None):
    """What `scripts/sweep.py` does with these overrides, and with a file in conf/sweep that has this space."""
    cfg = composed("sweep", ["sweep.storage=journal", *overrides])  # the quicker one
    if space is not None:
        cfg.sweep.space = space
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.MonkeyPatch.context() as patch:
        for module in (sweep_study, sweep_trial):
            patch.setattr(module, "compose", composed)
        return sweep(cfg, overrides, folder)


def accuracy(cfg) -> float:
    """A stand-in's validation accuracy: best at temperature 4, and a little better for wider students."""
    return 1 / (1 + abs(cfg.method.temperature - 4)) + 0.01 * sum(cfg.student.widths) / 100


def leave(cfg, val: float) -> None:
    """What a finished run leaves, as far as a sweep reads it; on the test set the worse is better."""
    folder, cost = Path(cfg.folder), sum(cfg.student.widths)
    student = {"params": cost, "macs": 10 * cost, "bytes": 4 * cost, "test": {"accuracy": {"best": 1 - val}}}
    summary = {"val": {"best": val}, "student": student, "time": {"fit_s": 1.0}}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(name="quick")
def quick_fixture(monkeypatch):
    """Replaces training by a closed form; gives the folders in which it was called, in order."""
    calls: list[Path] = []

    def train(cfg, callbacks=(), member=None):
        calls.append(Path(cfg.folder))
        leave(cfg, accuracy(cfg))

    monkeypatch.setattr(sweep_trial, "train", train)
    return calls


def points(study) -> list[dict]:
    return [t.params for t in study.trials]


def rerun_config(folder: Path, home: Path, *overrides: str):
    """What `best.yaml` composes to once it is in conf/experiment."""
    (home / "experiment").mkdir(parents=True)
    (home / "experiment" / "best.yaml").write_text((folder / "best.yaml").read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["experiment=best", f"hydra.searchpath=[file://{home}]", *overrides])


def same_but_for_the_folder(a, b) -> bool:
    """Nor does a run by itself know that others with its teacher follow, as a trial of a sweep does."""
    a, b = (OmegaConf.to_container(c, resolve=False) | {"folder": 0} for c in (a, b))
    for config in (a, b):
        if config["teacher"] is not None:
            del config["teacher"]["cache"]["shared"]
    return a == b


TEMPERATURE = {"method.temperature": {"low": 2.0, "high": 9.0}}
