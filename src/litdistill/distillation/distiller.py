"""`Distiller`: the LightningModule that trains a student, with a frozen teacher or (`teacher=None`) without.

It works with any Trainer, and with any loader whose batches its task takes. It is complete once it is constructed: what a
method needs of both networks is found in a dry forward of `example`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from litdistill.data.protocol import IndexedData
from litdistill.distillation.checks import (
    check_finite,
    check_images,
    check_pairing,
    check_plateau,
    check_trainer,
    world_size,
)
from litdistill.distillation.examine import TeacherOnValidation, check_teacher
from litdistill.distillation.logs import log_group, log_step
from litdistill.distillation.running_means import RunningMeans
from litdistill.distillation.schedules import average_of, interpolate, step_plateau
from litdistill.distillation.step import seed_step, timed_outputs, train_group
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions, TeacherCache, open_cache
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.features.outputs import describe_inputs, inputs_like
from litdistill.methods.base import Method
from litdistill.methods.supervised import Supervised
from litdistill.tasks import TASKS, named_task
from litdistill.tasks.base import Task
from litdistill.types import Batch, Group, Outputs
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)

Schedule = Mapping[str, Sequence[tuple[float, float]]]
OptimizerFactory = Callable[..., Optimizer]


class Clip(NamedTuple):
    """How gradients are clipped inside a group of minibatches; elsewhere the Trainer does it."""

    value: float | None = None
    algorithm: str = "norm"


class SchedulerOptions(NamedTuple):
    """When a scheduler is stepped: `interval` is "epoch" or "step"; `monitor` is the metric that one on a plateau waits for."""

    interval: str = "epoch"
    monitor: str | None = None


class Distiller(LightningModule):
    """Trains `student` by `method`.

    Args:
        student: the network that is trained and deployed.
        method: what is learnt from the teacher, and how much the labels count; `Supervised` by default.
        teacher: any module, compared with, and learnt from if the method reads it. Not part of the module: no checkpoint,
            optimizer, average or gradient bucket ever holds it.
        example: a batch as the loader yields it, of a few samples, on which features and projectors are made. A method
            that reads logits alone needs none.
        task: what the labels say, or its name (`litdistill.tasks.TASKS`).
        optimizer: makes the optimizer from the parameters. scheduler: makes the schedule from the optimizer.
        scheduling: when that is stepped.
        schedule: for any term of the loss, points (epoch, factor) between which its weight is scaled linearly, with the
            first epoch counted as 1: `{"soft": [[0, 0], [20, 1]]}` warms the soft term up over 20 epochs.
        ema: decay of an average of the student's weights, which is what is evaluated and deployed then.
        seed: makes what a step draws a function of seed, epoch, minibatch and process, so that a run can go on anywhere.
        allow_chance: trains even with a teacher that is no better than chance.
        data: knows its samples by id, so that the teacher's outputs can be kept (`cache`).
        train_targets: (M,) the labels of all training samples by id, for methods that remember each sample (CRD).
        teacher_on_validation: the teacher's outputs for `data.val_ids`, where they are known.
        group: how many minibatches a step of Lightning holds at most; 0: one, with automatic optimization. Else it is manual,
            for loaders that yield `Group`s (`litdistill.training.grouping`), in which gradients are clipped by `clip`.

    Raises `UserError` for a method that is not defined for the task or for these networks.
    """

    def __init__(
        self,
        student: nn.Module,
        method: Method | None = None,
        teacher: nn.Module | None = None,
        example: Any = None,
        task: Task | str = "classification",
        optimizer: OptimizerFactory = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        scheduling: SchedulerOptions = SchedulerOptions(),  # noqa: B008
        schedule: Schedule | None = None,
        ema: float | None = None,
        seed: int | None = None,
        allow_chance: bool = False,
        data: IndexedData | None = None,
        train_targets: Tensor | None = None,
        teacher_on_validation: Outputs | None = None,
        cache: CacheOptions | None = None,
        group: int = 0,
        clip: Clip = Clip(),  # noqa: B008
    ):
        super().__init__()
        self.task, self.method = named_task(task), method or Supervised()
        check_pairing(self.method, student, teacher, self.task, example)
        batch = None if example is None else self._example(example)
        frozen = teacher if isinstance(teacher, FrozenTeacher) else None
        network = frozen.net if frozen is not None else teacher
        check_images(batch, student, network)
        self.student = self.method.prepare(student, network, None if batch is None else batch.inputs)
        student_taps, teacher_taps = self._taps(self.student, network, batch)
        self.extractor = FeatureExtractor(self.student, student_taps)
        how: dict[str, Any] = {"compile": frozen.mode, "faster": frozen.faster} if frozen is not None else {}
        found = None if network is None else FrozenTeacher(network, self.task, teacher_taps, batch, **how)
        self.__dict__["teacher"] = found  # past nn.Module's registration: see the class's docstring
        self._build(batch, train_targets)
        self.average = average_of(self.student, ema) if ema is not None else None
        self.optimizer, self.scheduler, self.scheduling = optimizer, scheduler, scheduling
        self.schedule, self.seed, self.allow_chance = dict(schedule or {}), seed, allow_chance
        self.data, self.cache_options = data, cache or CacheOptions()
        self.cache: TeacherCache | None = None  # opened when training starts, on its device
        self.automatic_optimization, self.clip = not group, clip
        self.means = RunningMeans(self.task)
        self.teacher_s = 0.0  # seconds spent in the teacher since the fit began
        self.val_metrics, self.test_metrics = self.task.metrics(), self.task.metrics()
        self.on_validation = TeacherOnValidation(teacher_on_validation, data)
        self._logged_step = 0
        self._note_hyperparameters(batch, ema)

    teacher: FrozenTeacher | None

    def _example(self, example: Any) -> Batch:
        if isinstance(example, str):  # from a checkpoint, which knows types and shapes
            return Batch(inputs_like(example), None)
        return self.task.batch(example)

    def _taps(self, student: nn.Module, teacher: nn.Module | None, batch: Batch | None) -> tuple[list[str], list[str]]:
        """The features that the method reads of either network."""
        if batch is None:
            return [], []
        asked = self.method.taps()
        run = lambda net, _: self.task.forward(net, batch, False)  # noqa: E731
        found = resolve_taps(student, batch.inputs, asked.student, run)
        return found, resolve_taps(teacher, batch.inputs, asked.teacher, run) if teacher is not None else []

    def _build(self, batch: Batch | None, train_targets: Tensor | None) -> None:
        """What the method makes of shapes, from a dry forward that leaves both networks as they were."""
        if batch is None:
            return
        modes = [(module, module.training) for module in self.student.modules()]
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            student = self.extractor.run(lambda net: self.task.forward(net, batch, False))
            teacher = self.teacher(batch) if self.teacher is not None and self.method.needs_teacher else None
            self.method.build(student, teacher, train_targets)
        for module, training in modes:
            module.training = training

    def _note_hyperparameters(self, batch: Batch | None, ema: float | None) -> None:
        """What `load_from_checkpoint` finds in a checkpoint: plain numbers and strings; objects are given again."""
        task = next((name for name, kind in TASKS.items() if type(self.task) is kind), None)
        example = None if batch is None else describe_inputs(batch.inputs)
        found = {"example": example, "task": task, "ema": ema, "seed": self.seed}
        self.save_hyperparameters({k: v for k, v in found.items() if v is not None}, logger=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
        """A copy, as callbacks that average weights make it, shares data and what is kept of the teacher."""
        memo |= {id(shared): shared for shared in (self.data, self.cache, self.on_validation)}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # -- what is trained and deployed --------------------------------------------------------------------------------

    def forward(self, inputs: Any) -> Outputs:
        """The outputs of the network that is deployed."""
        return self.task.forward(self.deployed_student, Batch(inputs, None), False)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated: the student, or the average of its weights."""
        return self.student if self.average is None else self.average.module

    @property
    def deployed_student(self) -> nn.Module:
        """The network that is deployed: what is validated without what its method trained beside it."""
        return self.method.ship(self.evaluated)

    def update_average(self) -> None:
        """Called after each step of the optimizer."""
        if self.average is not None:
            self.average.update_parameters(self.student)

    # -- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        parameters = [p for p in [*self.student.parameters(), *self.method.parameters()] if p.requires_grad]
        optimizer = self.optimizer(parameters)
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        found: dict[str, Any] = {"scheduler": scheduler, "interval": self.scheduling.interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            check_plateau(scheduler, self.scheduling.interval, self.waits_for, self.task)
            if self.automatic_optimization:
                found |= {"monitor": self.waits_for, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": found}

    @property
    def waits_for(self) -> str:
        """The metric that a scheduler on a plateau waits for: by default the task's."""
        return self.scheduling.monitor or f"val/{self.task.monitor[0]}"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook, which it calls in automatic optimization: any checkpoint has the average of all steps."""
        super().optimizer_step(*args, **kwargs)
        self.update_average()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's hook. One that waits for a metric is stepped before an epoch's checkpoint is written, not after it."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        self.on_train_epoch_start()  # which Lightning skips for a run that goes on in the middle of an epoch
        self._logged_step = self.trainer.global_step
        check_trainer(self.trainer, self.method)
        if self.teacher is not None:
            self._examine_teacher()
            self._open_cache()

    def on_train_epoch_start(self) -> None:
        self.method.set_epoch(self.current_epoch)
        self._factors = {k: interpolate(points, self.current_epoch + 1) for k, points in self.schedule.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, Group):
            return train_group(self, batch)
        batch = self.task.batch(batch)
        self.seed_step(batch_idx)
        loss = self.loss(batch)
        return loss if batch.weight == 1 else loss * batch.weight

    def seed_step(self, index: int) -> None:
        """Called before each minibatch, with its place in the epoch."""
        if self.seed is not None:
            seed_step(self.seed, self.current_epoch, index, self.global_rank, self.device)

    def loss(self, batch: Batch, teacher: Outputs | None = None) -> Tensor:
        """The loss of one minibatch; `teacher`: its outputs, where they are known already."""
        if teacher is None and self.needs_teacher_outputs:
            teacher = self.teacher_outputs(batch)
        student = self.extractor.run(lambda net: self.task.forward(net, batch, True))._replace(ids=batch.ids)
        terms = self._label_terms(student, batch) | self.method(student, teacher, batch)
        unknown = self._factors.keys() - terms.keys()
        if unknown and not self.method.init_epochs:
            raise UserError(
                f"schedule names {', '.join(unknown)}, but the terms of this method are {', '.join(terms)}."
            )
        terms = {k: v * self._factors[k] if k in self._factors else v for k, v in terms.items()}
        self.means.add(terms, student, teacher, batch.targets)
        return torch.stack(list(terms.values())).sum()

    def _label_terms(self, student: Outputs, batch: Batch) -> dict[str, Tensor]:
        """What the labels say, of the student and of whatever the method trains beside it, weighted by the method."""
        weight = self.method.hard * self.method.hard_factor(self.current_epoch)
        if not weight:
            return {}
        terms = dict(self.task.loss(self.student, student, batch))
        for companion in self.method.companions(student):
            for name, value in self.task.loss(self.student, companion, batch).items():
                terms[name] = terms[name] + value
        return {name: weight * value for name, value in terms.items()}

    @property
    def needs_teacher_outputs(self) -> bool:
        """Whether a step asks the teacher."""
        return self.teacher is not None and self.method.needs_teacher

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """The teacher's outputs for a batch, kept or computed."""
        outputs, seconds = timed_outputs(self, batch)
        self.teacher_s += seconds
        self.means.teacher_s += seconds
        return outputs

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if isinstance(batch, Group):
            if batch.logs:
                log_group(self)
        elif step != self._logged_step:
            every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and step % every == 0:
                log_step(self)
            self._logged_step = step

    def on_train_epoch_end(self) -> None:
        step_plateau(self)

    def on_train_end(self) -> None:
        if self.cache is not None and self.cache.asked:
            known = self.cache.asked - self.cache.computed
            log.info(
                "Of %d outputs of the teacher %.0f %% were known.", self.cache.asked, 100 * known / self.cache.asked
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what each process's method remembers (CRD's memories), which the first one's state alone would leave out."""
        if self.trainer.world_size > 1:
            own = {name: self.all_gather(x) for name, x in self.method.named_buffers()}
            checkpoint["buffers_of_ranks"] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives each process its own of those back, where there are as many as before."""
        for name, of_ranks in checkpoint.get("buffers_of_ranks", {}).items():
            if len(of_ranks) == world_size():
                checkpoint["state_dict"][f"method.{name}"] = of_ranks[self.global_rank]

    # -- validation, test, prediction --------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1:
            for buffer in self.evaluated.buffers():  # each process has seen other batches
                torch.distributed.broadcast(buffer, 0)
        if not self.trainer.sanity_checking:  # no checkpoint is written of what is not a number
            check_finite(self, self.means.means(), weights=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.task.batch(batch)
        outputs = self.task.forward(self.evaluated, batch, False)
        self.val_metrics.update(outputs, batch.targets)
        if self.teacher is not None and not self.trainer.sanity_checking:
            self.on_validation.compare(self, outputs, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        values = {name: float(value) for name, value in self.val_metrics.compute().items()}
        self.val_metrics.reset()
        values |= self.on_validation.agreement(self.device)
        self._log_evaluation("val", values)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.task.batch(batch)
        self.test_metrics.update(self.task.forward(self.evaluated, batch, False), batch.targets)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", {name: float(value) for name, value in self.test_metrics.compute().items()})
        self.test_metrics.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The task's predictions; a batch may come without labels."""
        labelled = isinstance(batch, (Batch, Mapping)) or (isinstance(batch, (tuple, list)) and len(batch) > 1)
        batch = (
            self.task.batch(batch) if labelled else Batch(batch[0] if isinstance(batch, (tuple, list)) else batch, None)
        )
        return self.task.decode(self.task.forward(self.deployed_student, batch, False))

    def _log_evaluation(self, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():  # equal in every process: what was gathered is everything
            self.log(f"{split}/{name}", value, prog_bar=name == self.task.monitor[0])
        if not self.automatic_optimization:
            self.log("step", float(self.trainer.global_step))  # Lightning would count groups

    def _open_cache(self) -> None:
        """Where the teacher is read, its outputs can be known by id and view, and keeping them pays."""
        epochs, data = self.trainer.max_epochs or 0, self.data
        if data is not None and self.cache_options.mode != "off" and self.needs_teacher_outputs:
            assert self.teacher is not None
            passes = epochs * (data.epoch_size or len(data.train_ids)) / len(data.train_ids)
            self.cache = open_cache(self.cache_options, self.teacher, data, self.device, passes, self.trainer.precision)

    def _examine_teacher(self) -> None:
        """Runs the teacher over the validation set once; raises `UserError` if it is no better than chance."""
        if self.trainer.val_dataloaders is not None:
            check_teacher(self.task, *self.on_validation.run(self), allow_chance=self.allow_chance)
