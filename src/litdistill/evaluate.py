"""What a student is worth: both networks over the whole test set, on one device, and all that is measured of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor, nn

from litdistill import metrics
from litdistill.build import build_data, build_distiller, build_net, make, teacher_folder
from litdistill.checkpoint import fit_weights, load_checkpoint, load_weights
from litdistill.data.datamodule import ImageData
from litdistill.errors import UserError
from litdistill.teacher import weights_sha256

log = logging.getLogger(__name__)


@torch.no_grad()
def collect(net: nn.Module, data: ImageData, split: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The logits (N, classes) of `net` in eval mode over all of a split, and the targets (N,), both on the CPU."""
    was_training = net.training
    net.to(device).eval()
    pairs = [(net(batch.images).float().cpu(), batch.targets.cpu()) for batch in data.batches(split, device)]
    net.train(was_training)
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])


def measure(
    student: nn.Module,
    teacher: nn.Module | None,
    data: ImageData,
    split: str = "test",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Quality of the student, and with a teacher its quality and how far the student follows it; a plain dict."""
    logits, targets = collect(student, data, split, device)
    found: dict[str, Any] = {"student": metrics.quality(logits, targets)}
    if teacher is not None:
        taught, _ = collect(teacher, data, split, device)
        found |= {"teacher": metrics.quality(taught, targets), "likeness": metrics.likeness(logits, taught)}
    return found


def load_run(folder: Path) -> tuple[DictConfig, dict[str, Any]]:
    """The config and the summary of a finished run. Raises `UserError` where it is none."""
    config, summary = folder / ".hydra" / "config.yaml", folder / "summary.json"
    if not config.is_file() or not summary.is_file():
        have = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} is no finished run: it needs .hydra/config.yaml and summary.json ({have}).")
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    with open_dict(cfg):
        cfg.folder = str(folder)
    return cfg, json.loads(summary.read_text())


def rebuild(
    folder: Path, overrides: DictConfig | None = None
) -> tuple[ImageData, nn.Module, nn.Module | None, dict[str, Any]]:
    """Data, student (best weights), teacher and summary of a finished run, from its own folder.

    `overrides`: merged into the run's config, for data that has moved. The teacher is None where the run had none or
    where it is gone, which is logged.
    """
    cfg, summary = load_run(folder)
    if overrides is not None:
        cfg = OmegaConf.merge(cfg, overrides)  # type: ignore[assignment]
    data = build_data(cfg)
    teacher = _teacher(cfg, data, summary)
    with open_dict(cfg):
        cfg.student.checkpoint = None
    student = build_distiller(cfg, data, make(cfg.method), teacher).student
    fit_weights(student, load_weights(folder), folder, "student")
    return data, student, teacher, summary


def _teacher(cfg: DictConfig, data: ImageData, summary: dict[str, Any]) -> nn.Module | None:
    if cfg.teacher is None:
        return None
    folder = teacher_folder(cfg) if cfg.teacher.checkpoint == "auto" else None
    try:
        teacher = build_net(cfg.teacher, data, "teacher", folder)
    except UserError as error:
        raise UserError(f"The run's teacher cannot be had any more: {error}") from error
    found, noted = weights_sha256(teacher.state_dict()), summary["teacher"]["sha256"]
    if found != noted:
        raise UserError(
            f"The run had another teacher: its weights' SHA-256 was {noted[:12]}…, and is now {found[:12]}…."
        )
    return teacher


def evaluate(folder: str | Path, overrides: DictConfig | None = None, device: str = "auto") -> dict[str, Any]:
    """Rebuilds a finished run and measures it anew on the test set; its last weights too where they are kept."""
    folder = Path(folder)
    data, student, teacher, _ = rebuild(folder, overrides)
    device = pick_device(device)
    found = measure(student, teacher, data, "test", device)
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        found["last"] = measure_last(student, last, data, device)
    return found


def measure_last(student: nn.Module, checkpoint: Path, data: ImageData, device: torch.device | str) -> dict[str, float]:
    """Quality on the test set of the weights that training ended with. The student keeps them."""
    state = load_checkpoint(checkpoint)["state_dict"]
    fit_weights(
        student,
        {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")},
        checkpoint,
        "student",
    )
    return metrics.quality(*collect(student, data, "test", device))


def pick_device(name: str) -> str:
    """ "auto" is a GPU if there is one, else the CPU."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def differences(found: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """Where a fresh measurement is not, digit for digit, what the summary says; empty where it is reproduced."""
    test, student = summary["student"]["test"], found["student"]
    pairs = {
        "student accuracy (best)": (student["accuracy"], test["accuracy"]["best"]),
        "nll": (student["nll"], test["nll"]),
        "ece": (student["ece"], test["ece"]),
        "brier": (student["brier"], test["brier"]),
    }
    if "last" in found:
        pairs["student accuracy (last)"] = (found["last"]["accuracy"], test["accuracy"]["last"])
    if "teacher" in found:
        pairs["teacher accuracy"] = (found["teacher"]["accuracy"], summary["teacher"]["test"]["accuracy"])
        pairs["agreement"] = (found["likeness"]["agreement"], summary["student"]["agreement"])
        pairs["kl"] = (found["likeness"]["kl"], summary["student"]["kl"])
    return [f"{k}: now {now!r}, then {then!r}" for k, (now, then) in pairs.items() if now != then]
