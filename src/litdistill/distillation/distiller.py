"""`Distiller`: the LightningModule that trains a student, with a frozen teacher or (`teacher=None`) without.

It works with any Trainer and any loader that yields `(images, targets)` or a `litdistill.data.datamodule.Batch`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.utilities.distributed import gather_all_tensors

from litdistill.data.datamodule import Batch, ImageData
from litdistill.distillation.step import end_window, split, train_window
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions, TeacherCache, open_cache
from litdistill.features.feature_extractor import FeatureExtractor
from litdistill.methods.base import Method
from litdistill.tasks import metrics
from litdistill.types import Outputs
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)

NOTED = 16  # minibatches whose figures are summed at once: a dozen small operations cost as much as an optimiser's step

Schedule = Mapping[str, Sequence[tuple[float, float]]]


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The piecewise linear function through `points` (sorted by their first number), constant outside of them."""
    (x0, y0), *rest = points
    if x <= x0:
        return y0
    for x1, y1 in rest:
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        x0, y0 = x1, y1
    return y0


class Distiller(LightningModule):
    """Trains `student` by `method`.

    Args:
        student: the network that is trained and shipped.
        teacher: compared with, and learnt from if the method reads it. Not part of the module: no checkpoint, optimiser,
            average or gradient bucket ever holds it.
        method: gives the loss terms.
        optimizer: makes the optimiser from the parameters. scheduler: makes the schedule from the optimiser, and is
            stepped once an epoch.
        schedule: for any term of the loss, points (epoch, factor) between which its weight is scaled linearly, with the
            first epoch counted as 1: `{"soft": [[0, 0], [20, 1]]}` warms the soft term up over 20 epochs.
        student_taps: names of the nodes whose features the method reads (`litdistill.features.feature_extractor.resolve_taps`); the teacher has its own.
        allow_chance: trains even with a teacher that is no better than chance.
        cache: whether and where what the teacher says is kept (`litdistill.distillation.teacher_cache`). The losses are equal to float32 rounding.
        window: how many minibatches a training step holds where the loader yields windows (`litdistill.distillation.step`); with more
            than 1 gradients are clipped by `gradient_clip_val` and `gradient_clip_algorithm` here and not by the Trainer's.
    """

    def __init__(
        self,
        student: nn.Module,
        method: Method,
        teacher: FrozenTeacher | None = None,
        optimizer: Callable[..., Optimizer] = torch.optim.Adam,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        schedule: Schedule | None = None,
        student_taps: Sequence[str] = (),
        allow_chance: bool = False,
        cache: CacheOptions | None = None,
        window: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
    ):
        super().__init__()
        if method.needs_teacher and teacher is None:
            raise UserError(f"{type(method).__name__} learns from a teacher: give one, or use Supervised.")
        self.student, self.method = student, method
        self.__dict__["teacher"] = teacher  # past nn.Module's registration: see the class's docstring
        self.tapped = FeatureExtractor(student, student_taps)
        self.optimizer, self.scheduler, self.schedule = optimizer, scheduler, schedule or {}
        self.allow_chance, self.cache_options = allow_chance, cache or CacheOptions()
        self.cache: TeacherCache | None = None
        self.val_logits: Tensor | None = None  # what the teacher says of the data's `val_ids`, if that is known before
        # A step of several minibatches is optimised here (`litdistill.distillation.step`), one by one; of a single one by Lightning.
        self.automatic_optimization = window == 1
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        # The trainer's callbacks, while Lightning is kept from calling them (`litdistill.distillation.step`).
        self.called: Any = None
        self.teacher_s = 0.0  # seconds spent in the teacher since the fit began (on a GPU: in giving it its orders)
        self._reset_window()
        self._eval: list[tuple[Tensor, Tensor]] = []
        self._teacher_logits: list[Tensor] = []  # on the validation set, which does not change

    teacher: FrozenTeacher | None
    # Since the last log: what is noted of each minibatch, in this order; the last ones; and the sums of those before.
    _names: tuple[str, ...]
    _noted: list[tuple[list[Tensor], Tensor, Tensor, Tensor | None]]
    _sums: Tensor | None

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> the student's logits (N, classes)."""
        return self.student(images)

    @property
    def deployed_student(self) -> nn.Module:
        """The network that is deployed: the student without what its method trained beside it."""
        return self.method.ship(self.student)

    # -- training ----------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        parameters = [p for p in [*self.student.parameters(), *self.method.parameters()] if p.requires_grad]
        optimizer = self.optimizer(parameters)
        return [optimizer], [self.scheduler(optimizer)] if self.scheduler else []

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    def on_train_start(self) -> None:
        self.on_train_epoch_start()  # which Lightning skips for a run that goes on in the middle of an epoch
        if self.teacher is not None:
            self._examine_teacher()
            self._open_cache()

    def on_train_epoch_start(self) -> None:
        self.method.epoch = self.current_epoch
        self._factors = {k: interpolate(points, self.current_epoch + 1) for k, points in self.schedule.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = Batch(*batch)
        return self.loss(batch) if self.automatic_optimization else train_window(self, batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        end_window(self)

    def loss(self, batch: Batch, teacher: Outputs | None = None) -> Tensor:
        """The loss of one minibatch; `teacher`: what it gives for that, where it has been asked already."""
        if teacher is None and self._asks:
            start = time.perf_counter()
            teacher = self._taught(batch)
            self.teacher_s += time.perf_counter() - start
        student = self.tapped(batch.images)._replace(ids=batch.ids)
        terms = self.method(student, teacher, batch.targets)
        if not (self._factors.keys() <= terms.keys() or self.method.phases):
            unknown = ", ".join(self._factors.keys() - terms.keys())
            raise UserError(f"schedule names {unknown}, but the terms of this method are {', '.join(terms)}.")
        terms = {k: v * self._factors[k] if k in self._factors else v for k, v in terms.items()}
        loss = torch.stack(list(terms.values())).sum()
        self._watch(loss, terms, student, teacher, batch.targets)
        return loss

    @property
    def _asks(self) -> bool:
        return self.teacher is not None and self.method.needs_teacher

    def taught_ahead(self, window: Batch) -> list[Outputs] | None:
        """What the teacher gives for each minibatch of a window, asked for at once: it is frozen, and large batches and
        few lookups are what is fast. None where that gains nothing: without a teacher, for features that nobody keeps,
        which are too much to hold, and on a CPU, which is as fast on small batches."""
        if self.teacher is None or not self.method.needs_teacher or window.sizes is None:
            return None
        if self.cache is None and (self.teacher.tapped.names or self.device.type == "cpu"):
            return None
        start = time.perf_counter()
        taught = split(self._taught(window), window.sizes)
        self.teacher_s += time.perf_counter() - start
        return taught

    def _taught(self, batch: Batch) -> Outputs:
        assert self.teacher is not None
        if self.cache is not None and batch.ids is not None:
            return self.cache.outputs(batch)
        return self.teacher(batch.images)._replace(ids=batch.ids)

    def _watch(
        self, loss: Tensor, terms: dict[str, Tensor], student: Outputs, teacher: Outputs | None, y: Tensor
    ) -> None:
        """Notes what is to be logged: summed for several minibatches at once, and read only where the trainer logs."""
        names = ("loss", *terms, "accuracy", *(["agreement"] if teacher is not None else []))
        if names != self._names:
            self._reset_window()
            self._names = names
        values = [x.detach() for x in (loss, *terms.values())]
        predicted = student.logits.detach().argmax(1)  # now: a CUDA graph writes its next logits over these
        self._noted.append((values, predicted, y, teacher.logits if teacher is not None else None))
        self._steps += 1
        self._samples += len(y)
        if len(self._noted) == NOTED:
            self._sum()
        every, loop = self.trainer.log_every_n_steps, self.trainer.fit_loop.epoch_loop  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0 and not loop._should_accumulate():
            self._log_window()

    @torch.no_grad()
    def _sum(self) -> None:
        """Adds what was noted to sums on the device: of the loss and its terms over minibatches, of hits over samples."""
        if not self._noted:
            return
        values, predicted, targets, taught = zip(*self._noted, strict=True)
        self._noted = []
        said, truth = torch.cat(predicted), torch.cat(targets)
        counts = [(said == (truth if truth.ndim == 1 else truth.argmax(1))).sum()]
        if "agreement" in self._names:
            counts.append((said == torch.cat(taught).argmax(1)).sum())
        scalars = torch.stack([x.float() for row in values for x in row]).view(len(values), -1).sum(0)
        sums = torch.cat([scalars, torch.stack(counts).float()])
        self._sums = sums if self._sums is None else self._sums + sums

    def _means(self) -> dict[str, Tensor]:
        """Of what was noted since the last log: over minibatches, and of accuracy and agreement over samples."""
        self._sum()
        if self._sums is None:
            return {}
        by_sample = ("accuracy", "agreement")
        return {
            name: x / (self._samples if name in by_sample else self._steps)
            for name, x in zip(self._names, self._sums.unbind(), strict=True)
        }

    def _log_window(self) -> None:
        means = self._means()
        self._stop_if_not_finite(means)
        seconds = max(time.perf_counter() - self._window_start, 1e-9)
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True)
        self.log("speed/samples_per_s", self._samples * self.trainer.world_size / seconds)
        self.log("speed/teacher_share", (self.teacher_s - self._window_teacher_s) / seconds)
        self._reset_window()

    def _reset_window(self) -> None:
        self._names, self._noted, self._sums = (), [], None
        self._steps = self._samples = 0
        self._window_start, self._window_teacher_s = time.perf_counter(), self.teacher_s

    def _stop_if_not_finite(self, means: Mapping[str, Tensor]) -> None:
        if not math.isfinite(means["loss"]):
            bad = ", ".join(f"{k} = {float(v):g}" for k, v in means.items())
            raise UserError(
                f"The loss is not finite any more, before step {self.trainer.global_step + 1} of epoch "
                f"{self.current_epoch}: {bad}. Checkpoints of earlier epochs are kept. "
                "A smaller optimizer.lr or trainer.gradient_clip_val=1 usually helps."
            )

    def on_train_end(self) -> None:
        if self.cache is not None and self.cache.asked:
            known = self.cache.asked - self.cache.computed
            log.info(
                "Of %d outputs of the teacher %.0f %% were known.", self.cache.asked, 100 * known / self.cache.asked
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what each rank's method remembers (CRD's memories), which the first rank's state alone would leave out."""
        if self.trainer.world_size > 1:
            own = {name: self.all_gather(x) for name, x in self.method.named_buffers()}
            checkpoint["buffers_of_ranks"] = own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gives each rank its own of those back, where there are as many ranks as before. And lets a run go on with another
        `window`: Lightning counts the steps that it makes itself and all others apart."""
        for name, of_ranks in checkpoint.get("buffers_of_ranks", {}).items():
            if self._trainer is not None and len(of_ranks) == self.trainer.world_size:
                checkpoint["state_dict"][f"method.{name}"] = of_ranks[self.trainer.global_rank]
        loops = checkpoint["loops"]["fit_loop"]
        own = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
        ours = loops["epoch_loop.manual_optimization.optim_step_progress"]["total"]
        for count in (own, ours):
            count.update(max((own, ours), key=lambda c: c["completed"]))

    # -- validation and test -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        if self.trainer.world_size > 1 and not self.automatic_optimization:
            for buffer in self.student.buffers():  # as DDP does before each of Lightning's own steps, and then only
                torch.distributed.broadcast(buffer, 0)
        if self._steps and not self.trainer.sanity_checking:  # no checkpoint is written of what is not a number
            self._stop_if_not_finite(self._means())
        self._eval.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = Batch(*batch)
        logits = self.student(batch.images)
        self._eval.append((logits.clone(), batch.targets))  # a CUDA graph writes its next outputs over these

    def on_validation_epoch_end(self) -> None:
        logits, targets = self._gathered(self._eval)
        values = metrics.quality(logits, targets)
        if self._teacher_logits:
            teacher = self._gather(torch.cat(self._teacher_logits))
            values |= metrics.agreement(logits, teacher)
            values["teacher_accuracy"] = (teacher.argmax(1) == targets).double().mean().item()
        self._log_evaluation("val", values)

    def on_test_epoch_start(self) -> None:
        self._eval.clear()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test", metrics.quality(*self._gathered(self._eval)))

    def _log_evaluation(self, split: str, values: dict[str, float]) -> None:
        for name, value in values.items():  # equal on every rank: what was gathered is everything
            self.log(f"{split}/{name}", value, prog_bar=name == "accuracy")

    def _open_cache(self) -> None:
        """Where the teacher is read, its outputs can be known by image and view, and keeping them pays."""
        data, epochs = getattr(self.trainer, "datamodule", None), self.trainer.max_epochs or 0
        if self.teacher is not None and isinstance(data, ImageData) and self.cache_options.mode != "off" and self._asks:
            passes = epochs * (data.epoch_size or len(data.train_ids)) / len(data.train_ids)
            self.cache = open_cache(self.cache_options, self.teacher, data, self.device, passes, self.trainer.precision)

    def _examine_teacher(self) -> None:
        """Runs the teacher over the validation set once; raises `UserError` if it is no better than chance."""
        assert self.teacher is not None
        loader, pairs = self.trainer.val_dataloaders, []
        if loader is None:
            return
        limit = self.trainer.num_val_batches[0]
        for i, raw in enumerate(loader):
            if i >= limit:  # limit_val_batches, which the student's evaluation obeys too
                break
            batch = Batch(*self.trainer.strategy.batch_to_device(raw))
            pairs.append((self._says(batch), batch.targets))
        self._teacher_logits = [logits for logits, _ in pairs]
        logits, targets = self._gathered(pairs)
        check_teacher(logits, targets, self.allow_chance)

    def _says(self, batch: Batch) -> Tensor:
        """The teacher's logits for a batch of the validation set."""
        assert self.teacher is not None
        if self.val_logits is None or batch.ids is None:
            return self.teacher(batch.images).logits
        place = torch.searchsorted(self.trainer.datamodule.val_ids, batch.ids.cpu())  # type: ignore[attr-defined]
        return self.val_logits[place].to(self.device)

    def _gathered(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return self._gather(torch.cat([a for a, _ in pairs])), self._gather(torch.cat([b for _, b in pairs]))

    def _gather(self, x: Tensor) -> Tensor:
        """What all ranks hold, each sample once, in whatever order."""
        return torch.cat(gather_all_tensors(x)) if self.trainer.world_size > 1 else x


def check_teacher(logits: Tensor, targets: Tensor, allow_chance: bool = False) -> float:
    """The teacher's accuracy. Raises `UserError` if its logits are not numbers, or no better than chance.

    Chance is the share of the most frequent label, and three standard deviations of it are granted, but no more than half of
    what is left to be right about: of few samples no other number could tell.
    """
    if not torch.isfinite(logits).all():
        raise UserError("The teacher's logits are not finite. Its checkpoint is damaged or of another network.")
    accuracy = (logits.argmax(1) == targets).double().mean().item()
    chance = (torch.bincount(targets).max() / len(targets)).item()
    granted = min(3 * math.sqrt(chance * (1 - chance) / len(targets)), (1 - chance) / 2)
    if accuracy <= chance + granted and not allow_chance:
        raise UserError(
            f"The teacher is at chance level: {accuracy:.1%} on the validation set, where the most frequent class alone "
            f"gives {chance:.1%}. A student would learn noise from it. Train the teacher (teacher.checkpoint=auto), for longer "
            "if it was (++teacher.recipe.trainer.max_epochs=…), name a trained one (teacher.checkpoint=<run folder or file>), "
            "or allow it with teacher.allow_chance=true."
        )
    return accuracy
