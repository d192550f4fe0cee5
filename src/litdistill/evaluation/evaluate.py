"""Rebuilds finished runs and evaluates student and teacher on the whole test set, on one device."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from litdistill.config.build import build_data, build_student, build_teacher
from litdistill.config.changes import as_started
from litdistill.config.distiller import build_distiller, build_method, example_batch
from litdistill.config.origin import check_links, made_here
from litdistill.config.recipes import is_complete, teacher_by_weights, teacher_folder
from litdistill.config.trust import check_trusted, packages
from litdistill.data.foreign import ForeignData
from litdistill.distillation.adversarial import images_to_attack
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.evaluation import figures
from litdistill.evaluation.attacks import robust_accuracy
from litdistill.evaluation.findings import judge_gap
from litdistill.evaluation.predictions import measure, quality, spread_out, whole_split
from litdistill.features.outputs import run_network
from litdistill.models.preprocess import preprocessing
from litdistill.tasks import Classification, Task
from litdistill.utils.checkpoint import STUDENT, load_checkpoint, load_state_dict_checked, load_weights, read_metadata
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import weights_sha256
from litdistill.utils.manifest import MANIFEST, read_manifest, verified
from litdistill.utils.text import printable_values

log = logging.getLogger(__name__)
T = TypeVar("T")


def load_run(folder: Path, trust: Sequence[str] = ()) -> tuple[DictConfig, dict[str, Any]]:
    """Returns the config and the summary of a finished run.

    Raises `UserError` where `folder` is no finished run, and where the run was made elsewhere and its config names classes
    outside of this project and of the packages in `trust` (`litdistill.config.trust`).
    """
    packages(trust)
    config, summary = folder / ".hydra" / "config.yaml", folder / "summary.json"
    if not config.is_file() or not summary.is_file():
        have = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} is no finished run: it needs .hydra/config.yaml and summary.json ({have}).")
    cfg, found = _whole(config, lambda path: _read_config(path, folder, trust)), _whole(summary, _read_summary)
    with open_dict(cfg):
        # The teachers lie beside the run, whatever the working directory is.
        cfg.runs = str(next((p for p in folder.resolve().parents if (p / "teachers").is_dir()), cfg.runs))
    return cfg, found


def _whole(path: Path, read: Callable[[Path], T]) -> T:
    """Returns `read(path)`; raises `UserError` where the file is damaged."""
    try:
        return read(path)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {reason}). Fetch the run's folder anew, or train it again."
        ) from error


def _read_config(path: Path, folder: Path, trust: Sequence[str]) -> DictConfig:
    content = path.read_bytes()  # read once, so that the bytes checked are the bytes used
    cfg = OmegaConf.load(io.StringIO(content.decode()))
    if not isinstance(cfg, DictConfig):
        raise ValueError("it is no config of a run")
    with open_dict(cfg):
        cfg.folder = str(folder)
    if not made_here(folder, content):
        check_trusted(cfg, folder, trust)
    if any(cfg[key] is None for key in ("runs", "data", "student", "method")):
        raise ValueError("it is no config of a run")
    return cfg


def _read_summary(path: Path) -> dict[str, Any]:
    summary = printable_values(json.loads(path.read_text(encoding="utf-8")))
    networks = [summary["student"], *([summary["teacher"]] if summary["teacher"] is not None else [])]
    if not all(isinstance(network["sha256"], str) for network in networks):
        raise ValueError("it is no summary of a run")
    return summary


def run_data(cfg: DictConfig, folder: Path) -> tuple[Any, Task]:
    """Returns a finished run's data and task, with the mean and the standard deviation of its training.

    Raises `UserError` where the data's classes or input shape differ from those that the student was trained on.
    """
    known = {key: read_metadata(folder, f"data_{key}") for key in ("mean", "std")}
    data, task = build_data(cfg, **({} if None in known.values() else known))
    classes, shape = read_metadata(folder, "classes"), read_metadata(folder, "input_shape")
    back = "Put its data back as they were, or name the place where they are with +data.root=…"
    if classes and classes != list(data.class_names):
        gone, new = (
            [c for c in a if c not in b] for a, b in ((classes, data.class_names), (data.class_names, classes))
        )
        raise UserError(
            f"{folder} was trained on other classes than its data have now, or in another order: only then {_some(gone)}, "
            f"only now {_some(new)}. {back}"
        )
    if shape is not None and shape != list(data.input_shape or ()):
        raise UserError(f"{folder} was trained on inputs of {shape}, and its data are {list(data.input_shape)}. {back}")
    return data, task


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") or "none"


def rebuild(folder: Path, overrides: DictConfig | None = None, trust: Sequence[str] = ()) -> tuple[Any, Distiller]:
    """Returns a finished run's data, and its distiller with the teacher and the best student's weights.

    `overrides`: merged into the run's config, for data that has moved. `trust`: see `load_run`. Raises `UserError` where the
    teacher is missing, or the weights of either network differ from those in summary.json.
    """
    cfg, summary = load_run(folder, trust)
    if overrides is not None:
        cfg = OmegaConf.merge(cfg, overrides)  # type: ignore[assignment]
    data, task = run_data(cfg, folder)
    started = as_started(cfg, summary.get("changes"))
    teacher = build_teacher(_with_teacher_found(started, summary), data, task, _gone)
    if teacher is not None:
        found, then = weights_sha256(teacher.state_dict()), summary["teacher"]["sha256"]
        if found != then:
            raise UserError(f"The run had another teacher: its SHA-256 was {then[:12]}…, and is now {found[:12]}….")
        if (now := preprocessing(teacher)) != summary["teacher"]["preprocess"]:
            raise UserError(
                f"The run's teacher preprocessed images by {summary['teacher']['preprocess']}, and now by {now}."
            )
    with open_dict(cfg):
        cfg.student.checkpoint = cfg.ema = None  # the run's weights file already holds the averaged weights
    torch.manual_seed(cfg.seed)
    student = build_student(cfg, data, teacher, finished=folder)
    foreign = isinstance(data, ForeignData)
    distiller = build_distiller(
        cfg, student, build_method(cfg), teacher, task,
        data.example if foreign else example_batch(data), None if foreign else data,
    )  # fmt: skip
    load_state_dict_checked(distiller.deployed_student, _own_weights(folder, summary), folder, "student")
    return data, distiller


def _with_teacher_found(cfg: DictConfig, summary: dict[str, Any]) -> DictConfig:
    """Returns `cfg`, with the folder of its automatic teacher as the checkpoint where its recipe does not lead there any more:
    the images of the run have changed since, or it is measured on others."""
    if cfg.teacher is None or cfg.teacher.checkpoint != "auto" or cfg.teacher.get("ensemble"):
        return cfg
    if is_complete(teacher_folder(cfg)) or summary["teacher"] is None:
        return cfg
    known = teacher_by_weights(cfg, summary["teacher"]["sha256"])
    if known is None:
        return cfg
    found = cfg.copy()
    OmegaConf.update(found, "teacher.checkpoint", str(known))
    return found


def _gone(cfg: DictConfig, folder: Path) -> None:
    raise UserError(f"The run's teacher is gone: {folder} holds no finished run any more. Train it again with the run.")


def evaluate(
    folder: str | Path,
    overrides: DictConfig | None = None,
    device: str = "auto",
    trust: Sequence[str] = (),
    robustness: int = 0,
    eps: float = 0.1,
) -> dict[str, Any]:
    """Rebuilds a finished run and returns its metrics on the test set, those of the last checkpoint too if it exists.

    `findings`: what is wrong with the student, by sentences. `trust`: see `load_run`. `robustness`: so many test images are
    attacked in the ball of radius `eps`; what `robust_accuracy` returns is then in `robustness`, by model.

    Raises `UserError` where the student's weights or an exported file have changed since the run, and where there is nothing to
    attack.
    """
    folder = Path(folder)
    verify_files(folder, trust)
    data, distiller = rebuild(folder, overrides, trust)
    device = pick_device(device)
    teacher = distiller.teacher.net if distiller.teacher is not None else None
    attacked: dict[str, Any] = {}
    if robustness:  # first, for it may be refused
        both = {"teacher": teacher, "student": distiller.deployed_student}
        attacked["robustness"] = under_attack(both, data, distiller.task, robustness, eps, device)
    found = measure(distiller.deployed_student, teacher, data, distiller.task, "test", device) | attacked
    found["findings"] |= judge_gap(distiller.deployed_student, data, distiller.task, device)
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        found["last"] = measure_last(distiller, last, data, device)
    return found


def _logits(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return run_network(net, images).logits


def under_attack(
    networks: Mapping[str, nn.Module | None], data: Any, task: Task, count: int, eps: float, device: str
) -> dict[str, dict[str, float]]:
    """Returns `robust_accuracy` of each network, by name, on `count` test images, evenly spaced among all.

    Networks that are None, or files of outputs, are left out. Raises `UserError` for anything but a classifier of images with
    pixels from 0 to 1.
    """
    images, targets = whole_split(data, "test")
    if not isinstance(task, Classification) or images is None or images.ndim != 4:
        raise UserError("robustness=… attacks classifiers of images with one label each: leave it at 0.")
    chosen = spread_out(count, len(images))
    images, targets = images_to_attack(images[chosen], "robustness=…").to(device), targets[chosen].to(device)
    found = {}
    for name, net in networks.items():
        if net is not None and not isinstance(net, RecordedTeacher):
            net.to(device).eval().requires_grad_(False)
            found[name] = robust_accuracy(partial(_logits, net), images, targets, eps)
    return found


def draw(
    folder: str | Path,
    overrides: DictConfig | None = None,
    device: str = "auto",
    trust: Sequence[str] = (),
    to: Path | None = None,
) -> None:
    """Writes the pictures of a finished run to TensorBoard's files in its folder anew, or as PNG files to the folder `to`.
    `trust`: see `load_run`."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(folder)
    data, distiller = rebuild(folder, overrides, trust)
    check_links(folder)
    teacher = distiller.teacher.net if distiller.teacher is not None else None
    step = int(load_run(folder, trust)[1]["steps"])
    with figures.PngFiles(to) if to is not None else SummaryWriter(str(folder)) as writer:
        figures.show(writer, distiller.deployed_student, teacher, data, distiller.task, pick_device(device), step)


def verify_files(folder: Path, trust: Sequence[str] = ()) -> None:
    """Raises `UserError` where the student differs from summary.json, or an exported file from its manifest.

    Only SHA-256 hashes are compared: no model is opened.
    """
    _own_weights(folder, load_run(folder, trust)[1])
    manifest = folder / "export" / MANIFEST
    for name in read_manifest(manifest) if manifest.is_file() else ():
        verified(manifest.parent / Path(name).name)


def _own_weights(folder: Path, summary: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the student's weights. Raises `UserError` where their SHA-256 differs from the summary's."""
    weights = load_weights(folder)
    found, expected = weights_sha256(weights), summary["student"]["sha256"]
    if found != expected:
        raise UserError(
            f"{folder / STUDENT} is not the student of this run: the SHA-256 of its weights is {found[:12]}…, and "
            f"summary.json has {expected[:12]}…. Fetch the run's folder anew, or train it again."
        )
    return weights


def load_weights_of(distiller: Distiller, checkpoint: Path) -> nn.Module:
    """Returns the deployed student with a checkpoint's weights: the averaged weights where the run averages them."""
    state = load_checkpoint(checkpoint)["state_dict"]
    # A finished run is rebuilt without its average, and its last checkpoint holds one.
    prefix = "average.module." if any(k.startswith("average.module.") for k in state) else "student."
    weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    load_state_dict_checked(distiller.evaluated, weights, checkpoint, "student")
    return distiller.deployed_student


def measure_last(distiller: Distiller, checkpoint: Path, data: Any, device: torch.device | str) -> dict[str, float]:
    """Returns the test metrics of the last epoch's weights; `distiller` keeps these weights."""
    teacher = None if distiller.teacher is None else distiller.teacher.net
    return quality(load_weights_of(distiller, checkpoint), data, distiller.task, "test", device, teacher)


def pick_device(name: str) -> str:
    """Returns the device's name; "auto" selects a GPU if available, else the CPU. Raises `UserError` if unavailable."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:  # which one is raised depends on the torch build
        raise UserError(f"device={name} is not there: choose auto, cpu, or a GPU such as cuda:0.") from error
    return name


def differences(found: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """Returns a line for each value that is not exactly equal in both; empty where the summary is reproduced."""
    test, name = summary["student"]["test"], summary["metric"]["name"]
    pairs = {f"student {name} (best)": (found["student"][name], test[name]["best"])}
    pairs |= {key: (value, test.get(key)) for key, value in found["student"].items() if key != name}
    if "last" in found:
        pairs[f"student {name} (last)"] = (found["last"][name], test[name]["last"])
    if "teacher" in found:
        pairs[f"teacher {name}"] = (found["teacher"].get(name), summary["teacher"]["test"].get(name))
        pairs |= {key: (value, summary["student"].get(key)) for key, value in found["agreement"].items()}
    both_nan = lambda now, then: now != now and then != then  # noqa: E731
    return [
        f"{k}: now {now!r}, then {then!r}"
        for k, (now, then) in pairs.items()
        if now != then and not both_nan(now, then)
    ]
