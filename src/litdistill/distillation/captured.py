"""A minibatch's step as one CUDA graph: forward, loss, backward, optimizer and average, launched as one operation.

A small step is hundreds of kernels of a few microseconds, and to launch one takes the CPU longer than to run it takes the GPU.
A graph is recorded once and replayed: `CapturedStep` writes the samples of a group of minibatches, and the teacher's outputs
for them, into tensors that the graphs read (`litdistill.distillation.group_tensors`), and the learning rate where it changes;
then it replays a graph for each minibatch, which knows its place in the group by a number on the device. A live teacher whose
features are not read is a graph of its own, over the whole group. Numbers of Python that a step reads (weights of terms, a
method's epoch, momentum) are constants of a graph, so they are its key: where one changes, another graph is recorded.

What no graph can hold (a value that is read on the host, a shape that depends on values, an optimizer that keeps its state in
Python) runs operation by operation as everywhere else, and a line in the log says why: `reason_for_launching` before the first
step, `Recorder.watch` in the first steps of each key.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from litdistill.distillation.cuda_graphs import Recorder, random_states
from litdistill.distillation.group_tensors import GroupTensors, Left
from litdistill.distillation.step import clip, loss_of, runs_ahead, teacher_ahead
from litdistill.methods.base import Method
from litdistill.tasks.base import Task
from litdistill.types import Group, Outputs

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller

log = logging.getLogger(__name__)

OPTIMIZERS = (SGD, Adam, AdamW)  # their fused forms read the learning rate, and count steps, on the device
SAID = "Steps are launched operation by operation, not as CUDA graphs: %s."
TEACHER = "teacher"  # a key of what is doubtful
SPARE = 8  # steps that are watched beyond those that are replayed: more mean that constants change too often
# Hooks and methods of a Distiller that a graph would leave out if a subclass has its own.
HOOKS = (
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "backward"),
    *("configure_gradient_clipping", "loss", "update_average"),
)


class Taken(NamedTuple):
    """What a step leaves: its loss, a scalar that the next step overwrites, and the names of what it has written for the log;
    None: it was noted at once, since it is not of the minibatch's samples."""

    loss: Tensor
    left: Left | None


class Recorded(NamedTuple):
    """A recorded step: what it leaves, how it is run, and whether it draws random numbers."""

    taken: Taken
    replay: Callable[[], Any]
    draws: bool


class CapturedStep:
    """Trains a Distiller by recorded steps; see the module's docstring. Made when training starts, after a restore."""

    def __init__(self, distiller: Distiller, recorder: Recorder):
        self.distiller, self.recorder = distiller, recorder
        self.optimizer: Optimizer = distiller.optimizers().optimizer  # type: ignore[union-attr]
        use_fused(self.optimizer)
        self.reason: str | None = None  # why no step is recorded any more
        self.replayed = 0  # steps
        self._rates = [torch.zeros((), device=distiller.device) for _ in self.optimizer.param_groups]
        self._written = [math.nan for _ in self._rates]
        self._tensors: GroupTensors | None = None
        self._group: tuple[Group, list[int]] | None = (
            None  # the one that is trained on, and the first sample of each minibatch
        )
        self._noted: tuple[Left, int, int] | None = None  # of steps that the means lack: the first and the end
        self._steps: dict[Any, Recorded | bool] = {}  # by key; a bool: to record next, and whether it draws
        self._teachers: dict[int, Callable[[], Any] | None] = {}  # by samples; None: to record next
        self._teacher_fits = True
        self._doubtful: set[Any] = set()  # keys of what could not be recorded when it was watched first
        self._constants: Any = None
        self._chosen: Any = None  # the options of the optimizer
        self._epoch = -1
        self._begun, self._watched = False, 0

    def begin(self, group: Group) -> Sequence[Outputs] | None:
        """Writes the samples of a group and the teacher's outputs to where steps read them; returns these by minibatch, None
        where each step computes them or needs none. To be called before the steps of the group, and `end` after them."""
        distiller = self.distiller
        if self.reason is not None:
            return teacher_ahead(distiller, group)
        alone = group.once is None and self._records_teacher()
        teacher = None if alone else teacher_ahead(distiller, group)
        if self._tensors is None or not self._tensors.fits(group, teacher):
            self._tensors = GroupTensors(group, teacher)
            self._steps.clear()
            self._teachers.clear()
        self._tensors.fill(group.batch)
        self._group = group, [0, *itertools.accumulate(group.sizes)]
        if alone:
            return self._teacher_outputs(group)
        if teacher is not None:
            self._tensors.fill_outputs(teacher)
        return teacher

    def train(self, index: int) -> Tensor | None:
        """Takes the step of a minibatch of the group; returns its loss, a scalar that the next step overwrites. None: nothing
        was done.

        The first step of all creates the optimizer's state, and is left to the caller; so are all where a step cannot be
        recorded.
        """
        begun, self._begun = self._begun, True
        if not begun or self.reason is not None or not self._same_constants():
            return None
        assert self._group is not None
        assert self._tensors is not None
        group, starts = self._group
        size = group.sizes[index]
        if (options := _options(self.optimizer)) != self._chosen:
            self._chosen = options
            self._steps.clear()
        key = size, options
        if key not in self._steps and self._watched == self.replayed + SPARE:
            self._give_up("a constant of the step, such as an option of the optimizer, changes too often")
            return None
        self._write_rates()
        self._tensors.place(starts[index], index)
        found = self._steps.get(key)
        if found is None:
            taken = self._watch(key, functools.partial(self._step, size), group.first + index)
        else:
            if isinstance(found, bool):
                step = functools.partial(self._step, size)
                found = self._steps[key] = Recorded(*self.recorder.record(step), draws=found)
            if found.draws:
                self.distiller.seed_step(group.first + index)
            found.replay()
            taken = found.taken
            self.replayed += 1
        if taken.left is not None:
            self._tensors.moved(starts[index + 1], index + 1)
        count_step(self.distiller)
        self._note(taken.left, index)
        return taken.loss

    def end(self) -> None:
        """Adds what the steps of the group have left to the means."""
        if self._noted is not None:
            assert self._group is not None
            assert self._tensors is not None
            left, first, end = self._noted
            starts = self._group[1]
            seen = self._tensors.seen(left, slice(starts[first], starts[end]), slice(first, end))
            self.distiller.means.add(seen, end - first)
        self._noted = None

    def _note(self, left: Left | None, index: int) -> None:
        if self._noted is not None and (left, index) != (self._noted[0], self._noted[2]):
            self.end()
        if left is not None:
            self._noted = left, index if self._noted is None else self._noted[1], index + 1

    def _watch(self, key: Any, step: Callable[[], Taken], place: int) -> Taken:
        """Takes a step as it is launched, and finds out whether it can be recorded."""
        self._watched += 1
        self.distiller.seed_step(place)
        before = random_states(self.distiller.device)
        taken, reason = self.recorder.watch(step)
        draws = not all(map(torch.equal, before, random_states(self.distiller.device)))
        if reason is None and taken.left is None:
            reason = "what is measured of a step is not of its samples alone"
        if reason is None:
            self._steps[key] = draws
        elif key in self._doubtful:
            self._give_up(reason)
        else:
            self._doubtful.add(key)  # it may have been compiled: it is watched again
        return taken

    def _same_constants(self) -> bool:
        """Returns whether the constants of a step are known, as they are but for the first minibatches of `balance`; forgets
        what was recorded with others."""
        epoch, balance = self.distiller.current_epoch, self.distiller.balance
        if epoch != self._epoch or (balance is not None and self._constants is None):
            self._epoch = epoch
            constants = constants_of(self.distiller)
            if constants != self._constants:
                self._steps.clear()
                self._constants = constants
        return self._constants is not None

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._steps.clear()
        log.info(SAID, reason)

    def _write_rates(self) -> None:
        """Writes the learning rates into the tensors that steps read, where they have changed."""
        for i, (rate, group) in enumerate(zip(self._rates, self.optimizer.param_groups, strict=True)):
            if group["lr"] != self._written[i]:
                rate.fill_(group["lr"])
                self._written[i] = group["lr"]

    def _step(self, size: int) -> Taken:
        """Takes the step of the next minibatch of the group's tensors, with the learning rates from theirs."""
        distiller, groups, tensors = self.distiller, self.optimizer.param_groups, self._tensors
        assert tensors is not None
        batch, teacher, rows = tensors.minibatch(size)
        rates = [group["lr"] for group in groups]
        self.optimizer.zero_grad()
        loss, seen = loss_of(distiller, batch, teacher)
        distiller.manual_backward(loss)
        clip(self.optimizer, *distiller.clip)
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            self.optimizer.step()
        finally:
            for group, number in zip(groups, rates, strict=True):
                group["lr"] = number
        self.optimizer.zero_grad()  # see `count_step`
        distiller.update_average()
        own = teacher is None
        if not distiller.means.scored:  # whose heads nobody reads
            seen = seen._replace(student=Outputs({}), teacher=None, targets=batch.targets)
        heads = [*seen.student.heads.values(), *(seen.teacher.heads.values() if own and seen.teacher else ())]
        if seen.targets is not batch.targets or any(len(head) != size for head in heads):
            distiller.means.add(seen)
            return Taken(loss.detach(), None)
        return Taken(loss.detach(), tensors.leave(seen, rows, own))

    def _records_teacher(self) -> bool:
        """Returns whether the teacher's outputs for a group are computed by a graph of their own."""
        teacher, live = self.distiller.teacher, self.distiller.cache is None
        return teacher is not None and live and runs_ahead(self.distiller) and teacher.recordable and self._teacher_fits

    def _teacher_outputs(self, group: Group) -> Sequence[Outputs]:
        """Returns copies of the teacher's outputs for the minibatches of a group, which are at their places for the steps."""
        distiller, tensors, count = self.distiller, self._tensors, sum(group.sizes)
        assert tensors is not None
        start = time.perf_counter()

        def run() -> None:
            tensors.keep_heads(distiller.teacher(tensors.samples(count)).heads)  # type: ignore[misc]

        if count not in self._teachers:
            _, reason = self.recorder.watch(run)
            if reason is None:
                self._teachers[count] = None
            self._teacher_fits = reason is None or TEACHER not in self._doubtful
            self._doubtful |= {TEACHER} if reason is not None else set()
        else:
            if (replay := self._teachers[count]) is None:
                replay = self._teachers[count] = self.recorder.record(run)[1]
            replay()
        seconds = time.perf_counter() - start
        distiller.teacher_s += seconds
        distiller.means.teacher_s += seconds
        heads = {name: head[:count].clone() for name, head in tensors.heads.items()}
        return Outputs(heads, ids=group.batch.ids).split(group.sizes)


def count_step(distiller: Distiller) -> None:
    """Has Lightning count a step of the optimizer, which finds no gradient and updates nothing itself.

    That takes 22 microseconds of a CPU where the optimizer has 62 parameters, and is the only public way.
    """
    distiller.optimizers().step(closure=lambda: None)  # type: ignore[union-attr]


def captured_step(distiller: Distiller, base: type) -> CapturedStep | None:
    """Returns what records a Distiller's steps; None where nothing does, and a line in the log says why.

    `base`: the class whose hooks a recorded step keeps, `Distiller`; a subclass may have its own.
    """
    recorder = distiller.recorder
    if recorder is None or distiller.automatic_optimization or distiller.device.type != recorder.device:
        return None
    overridden = [hook for hook in HOOKS if getattr(type(distiller), hook) is not getattr(base, hook)]
    if (reason := reason_for_launching(distiller, overridden)) is not None:
        log.info(SAID, reason)
        return None
    return CapturedStep(distiller, recorder)


def reason_for_launching(distiller: Distiller, overridden: list[str]) -> str | None:
    """Returns why no step can be recorded, in words; None where nothing is known against it."""
    optimizer = distiller.optimizers().optimizer  # type: ignore[union-attr]
    if isinstance(distiller.trainer.strategy, ParallelStrategy):
        # Of one process, too: DDP times its backward passes by events, and its next forward reads the time between two of them,
        # which CUDA refuses for events that a graph holds.
        return "DDP exchanges gradients between processes, even if there is one"
    if overridden:
        return f"{type(distiller).__name__} has its own {overridden[0]}"
    parts: list[Task | Method] = [distiller.task, *(m for m in distiller.method.modules() if isinstance(m, Method))]
    for part in parts:
        if not (part.recordable or type(part).__module__.startswith("litdistill.")):
            return f"{type(part).__name__} may change with each step in Python; if not, it says recordable = True"
    if distiller.adversarial is not None:
        return "an attack (adversarial=pgd) runs the student several times a step"
    if type(optimizer) not in OPTIMIZERS:
        return f"{type(optimizer).__name__} may keep a state in Python, and SGD, Adam and AdamW do not"
    if distiller.method.init_epochs and any(group.get("momentum") for group in optimizer.param_groups):
        return (
            "SGD's fused form with momentum does not take parameters that are trained later, as in this method's phases"
        )
    if any(isinstance(group["lr"], Tensor) or group["differentiable"] for group in optimizer.param_groups):
        return "the learning rate is a tensor, or the optimizer is differentiable"
    return None


def constants_of(distiller: Distiller) -> Any:
    """Returns the numbers that are constants of a recorded step and change between epochs; None while `balance` measures the
    first minibatches."""
    method, balance, epoch = distiller.method, distiller.balance, distiller.current_epoch
    if balance is not None and not balance.finished and epoch >= method.init_epochs:
        return None
    factors = () if balance is None else balance.constants
    parts = [m for m in method.modules() if isinstance(m, Method)]
    phases = tuple(epoch if m.by_epoch else epoch >= m.init_epochs for m in parts)
    return phases, factors, tuple(distiller.schedule_factors.items())


def use_fused(optimizer: Optimizer) -> None:
    """Has an optimizer update all parameters in one kernel, which reads the learning rate and counts the steps on the device.

    A resumed run's optimizer has the options of the run that wrote its state, perhaps on a CPU.
    """
    for group in optimizer.param_groups:
        cuda = all(p.device.type == "cuda" for p in group["params"])
        group["fused"], group["foreach"] = True, None
        if "capturable" in group:
            group["capturable"] = cuda
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, torch.float32)


def _options(optimizer: Optimizer) -> Any:
    """Returns the options of an optimizer that a recorded step has as constants: all but the learning rate."""
    left_out = ("params", "lr", "initial_lr")
    return tuple(tuple(v for k, v in group.items() if k not in left_out) for group in optimizer.param_groups)
