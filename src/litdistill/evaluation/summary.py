"""`summary.json`: the results and settings of a finished run, which reports read."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from litdistill.config.changes import flat
from litdistill.config.lr_scaling import read_scale
from litdistill.config.recipes import data_name, net_name, recipe, student_folder, teacher_folder
from litdistill.data.foreign import sample_count
from litdistill.data.protocol import input_dtype
from litdistill.distillation.mixed import reads_ids
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.methods import NAMES
from litdistill.models.ensemble import Ensemble
from litdistill.models.preprocess import preprocessing
from litdistill.models.profile import count_macs, count_parameters, weight_bytes
from litdistill.tasks.base import Task
from litdistill.utils.command_line import command_text
from litdistill.utils.hashing import digest, weights_sha256
from litdistill.utils.modality import modality_of
from litdistill.utils.versions import git_state, versions


def summarize(
    cfg: DictConfig,
    data: Any,
    task: Task,
    student: nn.Module,
    teacher: nn.Module | None,
    found: dict[str, Any],
    last: dict[str, float],
    best_val: float,
    times: dict[str, float],
    trainer: Trainer,
) -> dict[str, Any]:
    """Returns a plain dict for JSON. `found`: `predictions.measure` of the best weights; `last`: metrics of the last."""
    samples = trainer.global_step * read_scale(cfg, trainer, data.batch_size).batch
    name, direction = task.monitor
    about, shape = found["student"], data.input_shape
    sha256 = None if teacher is None else weights_sha256(teacher.state_dict())
    return {
        "experiment": cfg.name,
        "technique": cfg.get("technique"),
        "method": method_name(cfg),
        "seed": cfg.seed,
        "options": {k: v for k, v in hyperparameters(cfg, trainer, data.batch_size).items() if k != "seed"},
        "settings": settings(cfg, sha256),
        "task": type(task).__name__,
        "metric": {"name": name, "direction": direction},
        "data": data_facts(data),
        "teacher": None
        if teacher is None
        else {
            **network_facts(cfg.teacher, teacher, shape, input_dtype(data)),
            "preprocess": preprocessing(teacher),
            "test": found.get("teacher", {}),  # empty: a backbone, or a file without outputs of the test set
        },
        "student": {
            **network_facts(cfg.student, student, shape, input_dtype(data)),
            "precision": "fp32",
            "test": {**about, name: {"best": about[name], "last": last[name]}},
            **found.get("agreement", dict.fromkeys(("agreement", "kl"))),
        },
        "start": start_of(cfg),
        "val": {"best": best_val},
        **({"by_class": found["by_class"]} if found.get("by_class") else {}),  # of the test set
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "time": {
            "fit_s": times["fit_s"],
            "teacher_s": times["teacher_s"],
            "total_s": times["total_s"],
            "core_s": times["core_s"],
            "samples_per_s": samples / times["fit_s"],
        },
        "device": _device(trainer),
        "versions": versions(),
        "git": git_state(),
        "command": command_text(sys.argv),
    }


def data_facts(data: Any) -> dict[str, Any]:
    """Returns the name of the data, what kind they are of, and their sizes."""
    return {
        "name": data.name,
        "kind": modality_of(data).kind,
        "classes": data.num_classes,
        "input_shape": None if data.input_shape is None else list(data.input_shape),
        **{split: sample_count(data, split) for split in ("train", "val", "test")},
    }


def network_facts(
    node: DictConfig, net: nn.Module, shape: Sequence[int] | None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Returns a network's name, the hash of its weights, and its size; of a file of outputs what it says of its network.

    `shape`, `dtype`: of a sample's input.
    """
    if isinstance(net, RecordedTeacher):
        known = net.file.manifest.get("network") or {}
        about = {key: known.get(key) for key in ("params", "macs", "bytes")}
        return {"name": net.name, "sha256": weights_sha256(net.state_dict()), **about, "outputs": net.file.sha256}
    files = [member.file.sha256 for member in net.modules() if isinstance(member, RecordedTeacher)]
    return {
        **({"outputs": files} if files else {}),
        "name": net.name if isinstance(net, Ensemble) and len(net.names) > 1 else net_name(node),
        "sha256": weights_sha256(net.state_dict()),
        "params": count_parameters(net),
        "macs": macs(net, shape, dtype),
        "bytes": weight_bytes(net),
    }


def macs(net: nn.Module, shape: Sequence[int] | None, dtype: torch.dtype = torch.float32) -> int | None:
    """Returns the multiply-accumulates for one sample of that shape; None where inputs are no single tensor."""
    return None if shape is None or reads_ids(net) else count_macs(net, shape, dtype)


def own_run(backbone: Any) -> str | None:
    """Returns the folder of the finished run that a detector's `backbone` names; None for anything else."""
    return backbone if isinstance(backbone, str) and Path(backbone, "summary.json").is_file() else None


def start_of(cfg: DictConfig) -> dict[str, Any] | None:
    """Returns what the student was initialized from; None for a random initialization.

    `from`: "teacher", "network" or "published"; `images`: the largest training set among the network and its predecessors,
    None if unknown; `method`: that of its run. With `student.checkpoint: auto` also `run`, and the cost of that run and its
    predecessors.
    """
    source = cfg.student.get("checkpoint") or own_run(cfg.student.get("backbone"))
    if source is None:
        fetched = cfg.student.get("weights") or cfg.student.get("pretrained")
        return {"from": "published", "images": None} if fetched else None
    named, run = source, student_folder
    if source == "teacher":
        named, run = cfg.teacher.checkpoint, teacher_folder
    start: dict[str, Any] = {"from": "teacher" if source == "teacher" else "network", "images": None}
    folder = run(cfg) if named == "auto" else Path(named or "")
    if named is None or not (folder / "summary.json").is_file():
        return start
    found = json.loads((folder / "summary.json").read_text())
    before = found.get("start") or {}
    start |= {"images": max(found["data"]["train"], before.get("images") or 0), "method": found["method"]}
    if source != "auto":
        return start
    cost = {k: found[k] + before.get(k, 0) for k in ("epochs", "steps")}
    total_s = found["time"]["total_s"] + before.get("total_s", 0.0)
    return {**start, "run": folder.name, **cost, "total_s": total_s}


# Keys of a recipe that do not distinguish kinds of runs.
NO_SETTING = ("seed", "teacher.allow_chance", "trainer.deterministic", "trainer.strategy")


def settings(cfg: DictConfig, teacher_sha256: str | None = None) -> dict[str, Any]:
    """Returns the config values, by key, that determine a run's weights; equal for runs that differ in the seed alone.

    A teacher or a starting point given by a path is represented by a hash of the settings of the run at that path. Where
    its summary has none, the teacher is represented by the hash of its weights, the starting point by `start_of`.
    """
    unseeded = cfg.copy()
    unseeded.seed = 0  # interpolated values change with it
    kept = recipe(unseeded)
    if (teacher := kept["teacher"]) and teacher.get("checkpoint", "auto") != "auto":
        teacher.pop("recipe", None)
        teacher["checkpoint"] = _settings_at(teacher["checkpoint"]) or (teacher_sha256 or "")[:10]
    for member in (teacher or {}).get("ensemble") or []:
        if member.get("checkpoint") not in (None, "auto"):
            member["checkpoint"] = _settings_at(member["checkpoint"]) or (teacher_sha256 or "")[:10]
    if kept["student"].get("checkpoint", "auto") not in ("auto", "teacher"):
        kept["student"].pop("recipe", None)
        known = start_of(cfg) or {}
        nature = "/".join(str(known[k]) for k in ("from", "method", "images") if known.get(k) is not None)
        kept["student"]["checkpoint"] = _settings_at(kept["student"]["checkpoint"]) or nature
    return {k: v for k, v in flat(kept).items() if not k.startswith(NO_SETTING)}


def _settings_at(run: str) -> str | None:
    """Returns the hash of a finished run's settings, ten hex digits; None where its summary has none."""
    path = Path(run, "summary.json")
    found = json.loads(path.read_text()).get("settings") if path.is_file() else None
    return digest(found) if found else None


def method_name(cfg: DictConfig) -> str:
    """Returns the method's short name (`kd`, `fitnet`, …): for a sum those of its parts, else the class's name.

    The methods of a task's folder are named by their file, as all of this project.
    """
    parts = cfg.method.get("methods")
    nodes = [cfg.method] if not parts else parts.values() if OmegaConf.is_dict(parts) else parts
    return "+".join(_short(str(node["_target_"])) for node in nodes)


def _short(target: str) -> str:
    where, _, name = target.rpartition(".")
    return where.rpartition(".")[2] if where.startswith("litdistill.tasks.") else NAMES.get(name, name)


def hyperparameters(cfg: DictConfig, trainer: Trainer | None = None, batch_size: int = 1) -> dict[str, Any]:
    """Returns flat, plain values for TensorBoard's HParams tab; with a trainer also the global batch size and scaled lr."""
    flat: dict[str, Any] = {
        "experiment": cfg.name,
        "seed": cfg.seed,
        "data": data_name(cfg.data),
        "student": net_name(cfg.student),
        "teacher": net_name(cfg.teacher) if cfg.teacher is not None else "none",
        "method": method_name(cfg),
        # TensorBoard shows only the first few keys in alphabetical order by default.
        "train/batch_size": cfg.data.get("batch_size"),
        "train/epochs": cfg.trainer.max_epochs if trainer is None else trainer.max_epochs,
        "train/optimizer": str(cfg.optimizer["_target_"]).rsplit(".", 1)[-1],
        "train/lr": cfg.optimizer.get("lr"),
    }
    if trainer is not None:
        scale = read_scale(cfg, trainer, batch_size)
        flat |= {"train/global_batch": scale.batch, "train/scaled_lr": scale.lr}
    for key, value in cfg.method.items():
        if isinstance(value, (int, float, str, bool)) and key != "_target_":
            flat[f"method/{key}"] = value
    return flat


def _device(trainer: Trainer) -> dict[str, Any]:
    kind = trainer.strategy.root_device.type
    name = torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or platform.machine()
    return {"type": kind, "name": name, "world_size": trainer.world_size, "threads": torch.get_num_threads()}
