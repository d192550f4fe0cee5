"""`Distiller`: the LightningModule that trains a student, with a frozen teacher or (`teacher=None`) without.

It works with any Trainer, and with any loader whose batches its task accepts. The constructor creates all parameters: a dry
forward of `example` gives the shapes of the features that the method reads.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningModule
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from litdistill.data.protocol import IndexedData, training_labels
from litdistill.distillation import checks
from litdistill.distillation.adversarial import PGD, check_adversarial
from litdistill.distillation.balance import Rule, balance_for
from litdistill.distillation.batch_statistics import LaggingStatistics
from litdistill.distillation.captured import CapturedStep, captured_step
from litdistill.distillation.cuda_graphs import CudaGraphs, Recorder
from litdistill.distillation.dry_run import check_outputs, run_example
from litdistill.distillation.examine import TeacherOnValidation, examine
from litdistill.distillation.logs import log_group, log_step
from litdistill.distillation.running_means import RunningMeans
from litdistill.distillation.schedules import average_of, follow, interpolate, optimizer_of, scheduler_of, step_plateau
from litdistill.distillation.step import clip, loss_of, seed_step, timed_outputs, train_group
from litdistill.distillation.teacher import FrozenTeacher, teacher_taps
from litdistill.distillation.teacher_cache import CacheOptions, TeacherCache, open_cache
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.features.outputs import describe_inputs, inputs_like
from litdistill.methods.base import Method
from litdistill.methods.supervised import Supervised
from litdistill.tasks import TASKS, named_task
from litdistill.tasks.base import Task, every_place
from litdistill.types import Batch, Group, Outputs
from litdistill.utils.modes import eval_mode

log = logging.getLogger(__name__)

Schedule = Mapping[str, Sequence[tuple[float, float]]]
OptimizerFactory = Callable[..., Optimizer]


class Clip(NamedTuple):
    """How gradients are clipped within a group of minibatches; without groups the Trainer clips them."""

    value: float | None = None
    algorithm: str = "norm"


class SchedulerOptions(NamedTuple):
    """When a scheduler is stepped: `interval` is "epoch" or "step"; `monitor` is the metric that ReduceLROnPlateau reads."""

    interval: str = "epoch"
    monitor: str | None = None


class Distiller(LightningModule):
    """Trains `student` by `method`.

    Args:
        student: the network that is trained and deployed.
        method: computes the distillation loss and sets the weight of the labels' loss; `Supervised` by default.
        teacher: any module. Validation compares the student with it; it gives targets if the method reads them. It is no
            submodule: no checkpoint, optimizer, average or gradient bucket holds it.
        example: a batch of a few samples as the loader yields it, for the dry forward that gives the shapes of features. A
            method that reads only logits needs none.
        task: defines the labels' loss and the metrics; a `Task` or its name (`litdistill.tasks.TASKS`).
        optimizer: creates the optimizer from the parameters. scheduler: creates the scheduler from the optimizer.
        scheduling: when the scheduler is stepped. method_lr: the rate of the method's own layers, times the student's.
        schedule: for any term of the loss, points (epoch, factor) between which its weight is scaled linearly, with the
            first epoch counted as 1: `{"soft": [[0, 0], [20, 1]]}` warms the soft term up over 20 epochs.
        balance: the rule that sets the weights of hints which were left at their defaults; "auto": `Balance()`.
        adversarial: the attack of adversarial training (`litdistill.distillation.adversarial`); None: none.
        ema: decay of the exponential moving average of the student's weights; the average is then evaluated and deployed.
        seed: seeds each step by seed, epoch, minibatch and rank, so that a run can be resumed at any step.
        allow_chance: trains even with a teacher that is no better than chance.
        data: a data module with sample ids, which caching of the teacher's outputs needs (`cache`).
        train_targets: (M,) the labels of all training samples by id, for methods with a memory bank (CRD).
        teacher_on_validation: the teacher's outputs for `data.val_ids`, if already computed.
        group: the maximum number of minibatches in a step of Lightning; 0: one, with automatic optimization. Above 0,
            optimization is manual, loaders yield `Group`s (`litdistill.training.grouping`), and `clip` clips gradients.
        labels: which training samples have a label, "all", "some" or "none"; others have a target of -1. None: as `data` says.
        recorder: records the step of a minibatch in a group, to replay it (`litdistill.distillation.captured`); None: no step.

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
        method_lr: float | None = None,
        schedule: Schedule | None = None,
        balance: Rule | Literal["auto"] | None = "auto",
        adversarial: PGD | None = None,
        ema: float | None = None,
        seed: int | None = None,
        allow_chance: bool = False,
        data: IndexedData | None = None,
        train_targets: Tensor | None = None,
        teacher_on_validation: Outputs | None = None,
        cache: CacheOptions | None = None,
        group: int = 0,
        clip: Clip = Clip(),  # noqa: B008
        labels: str | None = None,
        recorder: Recorder | None = CudaGraphs(),  # noqa: B008
    ):
        super().__init__()
        self.task, self.method = named_task(task), method or Supervised()
        self.labels = (labels or training_labels(data)) if self.task.reads_labels else "none"
        checks.check_pairing(self.method, student, teacher, self.task, example, self.labels, optimizer)
        batch = None if example is None else self._example(example)
        frozen = teacher if isinstance(teacher, FrozenTeacher) else None
        device = next(student.parameters(), torch.empty(0)).device  # an evaluation may have left the teacher on another
        network = None if teacher is None else (frozen.net if frozen is not None else teacher).to(device)
        batch = None if batch is None else move_data_to_device(batch, device)
        tried = run_example(self.task, batch, student, network)
        self.student = self.method.prepare(student, network, None if batch is None else batch.inputs)
        student_taps, teacher_taps = self._taps(self.student, network, batch)
        self.extractor = FeatureExtractor(self.student, student_taps)
        options: dict[str, Any] = {"compile": frozen.mode, "faster": frozen.faster} if frozen is not None else {}
        wrapped = None if network is None else FrozenTeacher(network, self.task, teacher_taps, batch, **options)
        self.__dict__["teacher"] = wrapped  # not registered as a submodule: see the class's docstring
        self._build(batch, train_targets, tried)
        checks.check_trained(self, batch)
        check_adversarial(adversarial, self.method, self.task, self.student, batch, self.labels)
        self.average = average_of(self.student, ema) if ema is not None else None
        self.optimizer, self.scheduler, self.scheduling, self.method_lr = optimizer, scheduler, scheduling, method_lr
        self.schedule, self.seed, self.allow_chance = dict(schedule or {}), seed, allow_chance
        self.balance, self.adversarial = balance_for(self.method, balance), adversarial
        self.data, self.cache_options = data, cache or CacheOptions()
        self.cache: TeacherCache | None = None  # opened on the training device when training starts
        self.recorder, self.captured, self._first_update = recorder, None, True  # the second: while training
        self.automatic_optimization, self.clip = not group, clip
        self.means, self.statistics = RunningMeans(self.task, self.labels), LaggingStatistics()
        self.schedule_factors: dict[str, float] = {}  # of terms, set anew each epoch
        self.teacher_s = 0.0  # spent in the teacher since the fit began
        self.val_metrics, self.test_metrics = self.task.metrics(), self.task.metrics()
        self.on_validation = TeacherOnValidation(teacher_on_validation, data, self.task.agreement_metric())
        self._logged_step = 0
        self._note_hyperparameters(batch, ema)

    teacher: FrozenTeacher | None
    captured: CapturedStep | None
    lr: float | None = None  # in place of the optimizer's own: Lightning's LearningRateFinder sets it

    def _example(self, example: Any) -> Batch:
        # A checkpoint stores the types and shapes of the example.
        return Batch(inputs_like(example), None) if isinstance(example, str) else self.task.batch(example)

    def _taps(self, student: nn.Module, teacher: nn.Module | None, batch: Batch | None) -> tuple[list[str], list[str]]:
        """Returns the names of the features that the method reads from the student and from the teacher."""
        if batch is None:
            return [], []
        taps = self.method.taps()
        run = lambda net, _: self.task.forward(net, batch, False)  # noqa: E731
        names = resolve_taps(student, batch.inputs, taps.student, run)
        return names, teacher_taps(teacher, batch.inputs, taps, run)

    def _build(self, batch: Batch | None, train_targets: Tensor | None, tried: Outputs | None) -> None:
        """Calls `method.build` with the outputs of a dry forward in eval mode, which leaves both networks unchanged."""
        if batch is None:
            return
        with eval_mode(self.student), torch.no_grad():
            student = self.extractor.run(lambda net: self.task.forward(net, batch, False))
            check_outputs(self.task, student, tried, batch)
            teacher = self.teacher(batch) if self.teacher is not None and self.method.needs_teacher else None
            self.method.build(every_place(self.task, student), every_place(self.task, teacher), train_targets)
            checks.check_readable(self.method, self.task, student, teacher, batch)

    def _note_hyperparameters(self, batch: Batch | None, ema: float | None) -> None:
        """Saves numbers and strings as hyperparameters for `load_from_checkpoint`, whose caller passes the objects again."""
        task = next((name for name, kind in TASKS.items() if type(self.task) is kind), None)
        example = None if batch is None else describe_inputs(batch.inputs)
        found = {"example": example, "task": task, "ema": ema, "seed": self.seed}
        self.save_hyperparameters({k: v for k, v in found.items() if v is not None}, logger=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Distiller:
        """Returns a copy that shares the data, the cache and the teacher's outputs; callbacks that average weights copy."""
        shared = (self.data, self.cache, self.on_validation, self.recorder, self.captured)
        memo |= {id(thing): thing for thing in shared}
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # -- trained and deployed networks -------------------------------------------------------------------------------

    def forward(self, inputs: Any) -> Outputs:
        """Returns the outputs of the deployed network."""
        return self.task.forward(self.deployed_student, Batch(inputs, None), False)

    @property
    def evaluated(self) -> nn.Module:
        """Returns the network that is validated: the student, or the average of its weights."""
        return self.student if self.average is None else self.average.module

    @property
    def deployed_student(self) -> nn.Module:
        """Returns the network that is deployed: the validated one without the companions of the method."""
        return self.method.ship(self.evaluated)

    def update_average(self) -> None:
        """Updates the average of the weights; called after each step of the optimizer."""
        if self.average is not None:
            follow(self.average, self.student, self._first_update)
        self._first_update = False

    # -- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self)
        if self.scheduler is None:
            return optimizer
        scheduler = scheduler_of(self, optimizer)
        found: dict[str, Any] = {"scheduler": scheduler, "interval": self.scheduling.interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            checks.check_plateau(scheduler, self.scheduling.interval, self.waits_for, self.task)
            found |= {"monitor": self.waits_for, "strict": False} if self.automatic_optimization else {}
        return {"optimizer": optimizer, "lr_scheduler": found}

    @property
    def waits_for(self) -> str:
        """Returns the name of the metric that ReduceLROnPlateau reads: by default the task's monitor."""
        return self.scheduling.monitor or f"val/{self.task.monitor[0]}"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook of automatic optimization; updates the average, so that each checkpoint includes all steps."""
        super().optimizer_step(*args, **kwargs)
        self.update_average()

    def configure_gradient_clipping(self, optimizer: Optimizer, *options: Any, **named: Any) -> None:
        """Lightning's hook of automatic optimization; where no loss is scaled, it clips as a group does."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return super().configure_gradient_clipping(optimizer, *options, **named)
        return clip(optimizer, *options, *named.values())

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's hook. `step_plateau` steps ReduceLROnPlateau instead, before the epoch's checkpoint is written."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_fit_start(self) -> None:
        if self.teacher is not None:  # no submodule, which Lightning would move and convert
            self.trainer.precision_plugin.convert_module(self.teacher.to(self.device))

    def on_train_start(self) -> None:
        self.on_train_epoch_start()  # Lightning skips this hook for a run that is resumed within an epoch
        self._logged_step = self.trainer.global_step
        checks.check_trainer(self.trainer, self.method)
        if self.teacher is not None:
            self._examine_teacher()
            self._open_cache()
        self.captured = captured_step(self, Distiller)

    def on_train_epoch_start(self) -> None:
        self.means.start_epoch()
        self.method.set_epoch(self.current_epoch)
        self.statistics.batches.clear()
        if self.cache is not None:
            self.cache.start_epoch()
        self.schedule_factors = {k: interpolate(points, self.current_epoch + 1) for k, points in self.schedule.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, Group):
            return train_group(self, batch)
        batch = self.task.batch(batch)
        self.seed_step(batch_idx)
        self.statistics.remember(self, batch)
        loss = self.loss(batch)
        return loss if batch.weight == 1 else loss * batch.weight

    def seed_step(self, index: int) -> None:
        """Seeds the generators for a minibatch; `index`: its position in the epoch."""
        if self.seed is not None:
            seed_step(self.seed, self.current_epoch, index, self.global_rank, self.device)

    def loss(self, batch: Batch, teacher: Outputs | None = None) -> Tensor:
        """Returns the loss of one minibatch, a scalar; `teacher`: its outputs, if already computed."""
        loss, seen = loss_of(self, batch, teacher)
        self.means.add(seen)
        return loss

    @property
    def needs_teacher_outputs(self) -> bool:
        """Returns whether a training step needs the teacher's outputs."""
        return self.teacher is not None and self.method.needs_teacher

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """Returns the teacher's outputs for a batch, from the cache or computed, and adds the time to `teacher_s`."""
        outputs, seconds = timed_outputs(self, batch)
        self.teacher_s += seconds
        self.means.teacher_s += seconds
        return outputs

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if isinstance(batch, Group):
            if batch.logs:
                log_group(self)
        elif step != self._logged_step:
            if every and step % every == 0:
                log_step(self)
            self._logged_step = step

    def on_train_epoch_end(self) -> None:
        step_plateau(self)
        self.statistics.refresh(self)  # of an epoch without validation

    def on_train_end(self) -> None:
        self.captured = None  # its graphs hold memory
        if self.cache is not None and self.cache.requested:
            share = 1 - self.cache.computed / self.cache.requested
            log.info("Of %d outputs of the teacher %.0f %% were known.", self.cache.requested, 100 * share)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the balance, and the method's buffers of all ranks (CRD's memory banks): a state dict has those of rank 0."""
        if self.balance is not None:
            checkpoint["balance"] = self.balance.state_dict()
        if self.trainer.world_size > 1:
            checkpoint["buffers_of_ranks"] = {name: self.all_gather(x) for name, x in self.method.named_buffers()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the balance, and each rank's own buffers if the number of processes is unchanged."""
        if self.balance is not None and "balance" in checkpoint:
            self.balance.load_state_dict(checkpoint["balance"])
        for name, of_ranks in checkpoint.get("buffers_of_ranks", {}).items():
            if len(of_ranks) == checks.world_size():
                checkpoint["state_dict"][f"method.{name}"] = of_ranks[self.global_rank]

    # -- validation, test, prediction --------------------------------------------------------------------------------

    def on_validation_model_eval(self) -> None:
        self.statistics.refresh(self)
        super().on_validation_model_eval()

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:  # before a checkpoint of non-finite weights is written
            checks.check_finite(self, self.means.means(), weights=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.task.batch(batch)
        outputs = self.task.keep(self.task.forward(self.evaluated, batch, False))
        teacher = self.on_validation.of_batch(self, batch, batch_idx)
        self.val_metrics.update(outputs, self.task.truth(batch.targets, teacher))
        self.on_validation.compare(self.task, outputs, teacher, batch.targets)

    def on_validation_epoch_end(self) -> None:
        values = {name: float(value) for name, value in self.val_metrics.compute().items()}
        self.val_metrics.reset()
        self._log_evaluation("val", values | self.on_validation.agreement(self.device))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch = self.task.batch(batch)
        teacher = self.on_validation.of_batch(self, batch, -1)
        outputs = self.task.keep(self.task.forward(self.evaluated, batch, False))
        self.test_metrics.update(outputs, self.task.truth(batch.targets, teacher))

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", {name: float(value) for name, value in self.test_metrics.compute().items()})
        self.test_metrics.reset()

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Returns the task's predictions by name, each (N, ...); the batch may lack labels."""
        labelled = isinstance(batch, (Batch, Mapping)) or (isinstance(batch, (tuple, list)) and len(batch) > 1)
        bare = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.task.decode(self.forward(self.task.batch(batch).inputs if labelled else bare))

    def _log_evaluation(self, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():  # equal on all ranks: metrics gather the samples of all
            self.log(f"{split}/{name}", value, prog_bar=name == self.task.monitor[0])
        if not self.automatic_optimization:
            self.log("step", float(self.trainer.global_step))  # by default Lightning's x axis counts groups

    def _open_cache(self) -> None:
        """Opens the cache if the method needs the teacher, samples have ids, and caching saves time."""
        epochs, data = self.trainer.max_epochs or 0, self.data
        if data is not None and self.teacher is not None and self.needs_teacher_outputs and not self.teacher.by_ids:
            passes = epochs * (data.epoch_size or len(data.train_ids)) / len(data.train_ids)
            self.cache = open_cache(self.cache_options, self.teacher, data, self.device, passes, self.trainer.precision)

    def _examine_teacher(self) -> None:
        """Runs the teacher over the validation set once; raises `UserError` if it is no better than chance."""
        if self.trainer.val_dataloaders is not None:
            examine(self)
