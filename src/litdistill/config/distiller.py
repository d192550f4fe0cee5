"""Builds the method, the optimizer, the scheduler and the `Distiller` of a config, for training and for evaluation."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from litdistill.compress.quantize import Int8
from litdistill.config.instantiate import instantiate, with_key
from litdistill.data.protocol import IndexedData
from litdistill.distillation.adversarial import PGD
from litdistill.distillation.cuda_graphs import CudaGraphs
from litdistill.distillation.distiller import Clip, Distiller, OptimizerFactory, SchedulerOptions
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.base import Method
from litdistill.tasks.base import Task
from litdistill.types import Batch, Outputs
from litdistill.utils.errors import UserError

STEPPED = ("OneCycleLR", "CyclicLR")  # schedulers whose default interval is a step


def build_optimizer(node: DictConfig, lr: float | None) -> OptimizerFactory:
    """Returns a function from parameters to the optimizer; `lr`: the scaled learning rate, None for the node's own."""
    factory = instantiate(node, "optimizer")
    return factory if lr is None else functools.partial(factory, lr=lr)


def build_scheduler(
    node: DictConfig | None, epochs: int, steps: int, monitor: str | None = None, mode: str | None = None
) -> tuple[Any, SchedulerOptions]:
    """Returns a function from the optimizer to the scheduler, None without one, and when the scheduler is stepped.

    `monitor`, `mode`: of the metric that selects the epoch, the defaults for ReduceLROnPlateau.

    The node holds `interval` (epoch or step) and `monitor` beside the scheduler's own options. An option for the length of
    the schedule (`total_steps`, `T_max`, `total`) that is null becomes the number of scheduler steps in the run: `epochs` or
    `steps`. Raises `UserError` for a OneCycleLR whose length is not that number.
    """
    if node is None:
        return None, SchedulerOptions()
    name = str(node["_target_"]).rpartition(".")[2]
    options = {k: v for k, v in node.items() if k not in ("interval", "monitor")}
    interval = node.get("interval") or ("step" if name in STEPPED else "epoch")
    if interval not in ("epoch", "step"):
        raise UserError(f"scheduler.interval={interval}: choose epoch or step.")
    horizon = steps if interval == "step" else epochs
    typed = node.get("total_steps") or (node.get("epochs") or 0) * (node.get("steps_per_epoch") or 0)
    if name == "OneCycleLR" and typed and typed != horizon:
        raise UserError(
            f"OneCycleLR is made for {typed} steps and will be stepped {horizon} times: leave scheduler.total_steps at null, "
            f"which counts them, or set it to {horizon}."
        )
    facts: dict[str, Any] = {
        key: horizon for key in ("total_steps", "T_max", "total") if key in options and options[key] is None
    }
    if name == "OneCycleLR" and not typed:
        facts["total_steps"] = horizon
    if name == "ReduceLROnPlateau":
        facts |= {"mode": mode} if options.get("mode") is None else {}
    else:
        monitor = None
    plain = OmegaConf.create({k: v for k, v in options.items() if k not in facts})
    return instantiate(plain, "scheduler", **facts), SchedulerOptions(interval, node.get("monitor") or monitor)


def build_method(cfg: DictConfig) -> Method:
    """Returns the method of a config. Raises `UserError` if it needs a teacher and the config has none."""
    method: Method = instantiate(cfg.method, "method")
    if method.needs_teacher and cfg.teacher is None:
        raise UserError(
            f"{type(method).__name__} learns from a teacher, and there is none: name one (net@teacher=conv4_wide), or train "
            "on the labels alone with method=supervised."
        )
    if method.reads_adversarial and not cfg.get("adversarial"):
        raise UserError(f"{type(method).__name__} learns at adversarial inputs, and there are none: adversarial=pgd.")
    return method


def train_labels(data: IndexedData) -> Tensor | None:
    """Returns the labels of the training samples by id, (M,), -1 for samples not trained on; None if they are not classes."""
    targets = data.train_targets
    if targets.ndim != 1 or targets.is_floating_point():
        return None
    trained = torch.full_like(targets, -1)
    trained[data.train_ids] = targets[data.train_ids]
    return trained


def example_batch(data: IndexedData) -> Batch:
    """Returns a batch of two training samples without augmentation."""
    return data.get_batch("train", data.train_ids[:2], None)


def build_distiller(
    cfg: DictConfig,
    student: nn.Module,
    method: Method,
    teacher: nn.Module | None,
    task: Task,
    example: Any,
    data: IndexedData | None = None,
    optimizer: OptimizerFactory = torch.optim.Adam,
    scheduler: tuple[Any, SchedulerOptions] = (None, SchedulerOptions()),
    teacher_on_validation: Outputs | None = None,
    group: int = 0,
    sharded: bool = False,
    labels: str | None = None,
) -> Distiller:
    """Returns the Distiller of a config from its parts.

    `sharded`: the teacher is sharded over ranks, not made faster. `labels`: as of `Distiller`.
    """
    modes: Mapping[str, Any] = cfg.get("compile") or {}
    if teacher is not None:
        teacher = FrozenTeacher(teacher, task, compile=modes.get("teacher"), faster=not sharded)
    try:
        distiller = Distiller(
            student,
            method,
            teacher,
            example,
            task,
            optimizer,
            *scheduler,
            method_lr=cfg.get("method_lr"),
            schedule=OmegaConf.to_container(cfg.schedule) if cfg.get("schedule") else {},  # type: ignore[arg-type]
            balance=instantiate(cfg.balance, "balance") if cfg.get("balance") else None,
            adversarial=PGD(**cfg.adversarial) if cfg.get("adversarial") else None,
            ema=cfg.get("ema"),
            seed=cfg.seed,
            allow_chance=bool(cfg.teacher is not None and cfg.teacher.allow_chance),
            data=data,
            train_targets=None if data is None else train_labels(data),
            teacher_on_validation=teacher_on_validation,
            cache=CacheOptions("off") if sharded else cache_options(cfg),
            group=group,
            labels=labels,
            recorder=CudaGraphs() if records_steps(cfg) else None,
            clip=Clip(cfg.trainer.get("gradient_clip_val"), cfg.trainer.get("gradient_clip_algorithm") or "norm"),
        )
    except UserError as error:
        raise with_key(_of_int8(error, student, method), cfg.method, "method") from error
    distiller.to(memory_format=torch.channels_last)  # convolutions are 1.2 to 1.6 times faster in it
    if modes.get("student") not in (None, "auto"):  # which a training decides
        distiller.student.compile(mode=modes["student"])
    return distiller


def records_steps(cfg: DictConfig) -> bool:
    """Returns whether steps are recorded as CUDA graphs: not where a compiled network records graphs of its own."""
    modes = set((cfg.get("compile") or {}).values())
    return cfg.get("capture", "auto") == "auto" and not modes & {"reduce-overhead", "max-autotune"}


def _of_int8(error: UserError, student: nn.Module, method: Method) -> UserError:
    """Returns the error, or for an int8 student and a method that reads features an error that names the cause."""
    parts = [
        m for m in method.modules() if isinstance(m, Method) and not any(isinstance(c, Method) for c in _inside(m))
    ]
    int8 = any(isinstance(module, Int8) for module in student.modules())
    if not int8 or not any(part.taps().student for part in parts):
        return error
    return UserError(
        f"{type(method).__name__} reads features inside the student, and in int8 (compress=int8) that is one traced "
        "graph without layers to tap. Use a method that reads logits alone (kd, dkd, dist, mlkd, supervised), or distill "
        "in float first and start from that student: student.checkpoint=<its run folder> compress=int8."
    )


def _inside(module: nn.Module) -> list[nn.Module]:
    return list(module.modules())[1:]


def cache_options(cfg: DictConfig) -> CacheOptions:
    """Returns whether and where the teacher's outputs are cached."""
    options = cfg.teacher.get("cache") if cfg.teacher is not None else None
    if not options:
        return CacheOptions()
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return CacheOptions(**{**options, "shared": options.get("shared") or multirun}, folder=Path(cfg.runs) / "cache")
