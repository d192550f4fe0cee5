"""A minibatch's step as one CUDA graph: forward, loss, backward, optimizer and average, launched as one operation.

A small step is hundreds of kernels of a few microseconds, and to launch one takes the CPU longer than to run it takes the GPU.
A graph is recorded once and replayed: `CapturedStep` copies each minibatch into the tensors that the graph reads, writes the
learning rate that it reads, and replays it. Numbers of Python that a step reads (weights of terms, a method's epoch, momentum)
are constants of a graph, so they are its key: where one changes, another graph is recorded.

What no graph can hold (a value that is read on the host, a shape that depends on values, an optimizer that keeps its state in
Python) runs operation by operation as everywhere else, and a line in the log says why: `reason_for_launching` before the first
step, `Recorder.watch` in the first steps of each key.
CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from litdistill.distillation.running_means import Seen
from litdistill.distillation.step import clip, loss_of
from litdistill.methods.base import Method
from litdistill.tasks.base import Task
from litdistill.types import Batch, Outputs

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller

log = logging.getLogger(__name__)

OPTIMIZERS = (SGD, Adam, AdamW)  # their fused forms read the learning rate, and count steps, on the device
SAID = "Steps are launched operation by operation, not as CUDA graphs: %s."
SPARE = 8  # steps that are watched beyond those that are replayed: more mean that constants change too often
# Hooks and methods of a Distiller that a graph would leave out if a subclass has its own.
HOOKS = (
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad", "backward"),
    *("configure_gradient_clipping", "loss", "update_average"),
)


class Taken(NamedTuple):
    """What a step leaves: its loss, a scalar; what is measured; and the terms of the loss as one tensor (terms,) float32."""

    loss: Tensor
    seen: Seen
    terms: Tensor


class Recorder(Protocol):
    """Records the operations of a step, to run them again on the same tensors."""

    device: str  # the type of device that it records on

    def watch(self, step: Callable[[], Taken]) -> tuple[Taken, str | None]:
        """Takes a step as usual; returns what it leaves, and in words what of it cannot be recorded."""

    def record(self, step: Callable[[], Taken]) -> tuple[Taken, Callable[[], Any]]:
        """Returns the tensors that each replay of a step writes, and the function that replays it. Takes no step."""


class CudaGraphs:
    """Records on a CUDA device. Graphs are replayed one at a time, so that they share one pool of memory."""

    device = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None

    def watch(self, step: Callable[[], Taken]) -> tuple[Taken, str | None]:
        """See `Recorder`. What waits for the GPU reads a value on the host, and no graph can hold it."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                taken = step()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for other in caught:
            if other not in waits:
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        where = f"{Path(waits[0].filename).name}, line {waits[0].lineno}, reads a value from the GPU" if waits else None
        return taken, where

    def record(self, step: Callable[[], Taken]) -> tuple[Taken, Callable[[], Any]]:
        """See `Recorder`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
        graph, stream, current = torch.cuda.CUDAGraph(), self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                taken = step()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return taken, graph.replay


class CapturedStep:
    """Trains a Distiller by recorded steps; see the module's docstring. Made when training starts, after a restore."""

    def __init__(self, distiller: Distiller, recorder: Recorder):
        self.distiller, self.recorder = distiller, recorder
        self.optimizer: Optimizer = distiller.optimizers().optimizer  # type: ignore[union-attr]
        use_fused(self.optimizer)
        self.reason: str | None = None  # why no step is recorded any more
        self.replayed = 0  # steps
        self._rates = [torch.zeros((), device=distiller.device) for _ in self.optimizer.param_groups]
        self._read: dict[Any, tuple[Batch, Outputs | None]] = {}  # the tensors that steps read, by shapes
        # By key; None: to record at the next minibatch.
        self._steps: dict[Any, tuple[Taken, Callable[[], Any]] | None] = {}
        self._doubtful: set[Any] = set()
        self._constants: Any = None
        self._epoch = -1
        self._written = [math.nan for _ in self._rates]
        self._begun, self._watched = False, 0

    def train(self, batch: Batch, teacher: Outputs | None) -> Tensor | None:
        """Takes the step of a minibatch; returns its loss, a scalar that the next step overwrites. None: nothing was done.

        `teacher`: its outputs, where they are known. The first step of all creates the optimizer's state, and is left to the
        caller; so are all where a step cannot be recorded.
        """
        begun, self._begun = self._begun, True
        if not begun or self.reason is not None or not self._same_constants():
            return None
        shapes = _shapes(batch, teacher)
        key = shapes, _options(self.optimizer)
        if key not in self._steps and self._watched == self.replayed + SPARE:
            self._give_up("a constant of the step, such as an option of the optimizer, changes too often")
            return None
        self._fill(shapes, batch, teacher)
        step = functools.partial(self._step, *self._read[shapes])
        if key not in self._steps:
            self._watched += 1
            taken, reason = self._counted(lambda: self.recorder.watch(step))
            if reason is None:
                self._steps[key] = None
            elif key in self._doubtful:
                self._give_up(reason)
            else:
                self._doubtful.add(key)  # it may have been compiled: it is watched again
        else:
            found = self._steps[key]
            if found is None:
                found = self._steps[key] = self.recorder.record(step)
            taken, replay = found
            self._counted(replay)
            self.replayed += 1
        self._note(shapes, taken, batch, teacher)
        return taken.loss

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

    def _counted(self, step: Callable[[], Any]) -> Any:
        """Takes a step as the closure of the optimizer, so that Lightning counts it; returns what the step returns.

        The optimizer then finds no gradient, and updates nothing itself.
        """
        found: list[Any] = []
        self.distiller.optimizers().step(closure=lambda: found.append(step()))  # type: ignore[union-attr]
        return found[0]

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._steps.clear()
        log.info(SAID, reason)

    def _fill(self, shapes: Any, batch: Batch, teacher: Outputs | None) -> None:
        """Writes the minibatch and the learning rates into the tensors that the step reads."""
        if shapes not in self._read:
            self._read[shapes] = _alike(batch, teacher)
        for static, given in zip(_tensors(*self._read[shapes]), _tensors(batch, teacher), strict=True):
            static.copy_(given)
        for i, (rate, group) in enumerate(zip(self._rates, self.optimizer.param_groups, strict=True)):
            if group["lr"] != self._written[i]:
                rate.fill_(group["lr"])
                self._written[i] = group["lr"]

    def _step(self, batch: Batch, teacher: Outputs | None) -> Taken:
        """Takes a step on the tensors that are read, with the learning rates from theirs."""
        distiller, groups = self.distiller, self.optimizer.param_groups
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
        self.optimizer.zero_grad()  # see `_counted`
        distiller.update_average()
        terms = torch.stack([value.detach().float() for value in seen.terms.values()])
        # Detached, so that no graph of gradients is kept.
        student = Outputs({name: head.detach() for name, head in seen.student.heads.items()})
        return Taken(loss.detach(), seen._replace(student=student), terms)

    def _note(self, shapes: Any, taken: Taken, batch: Batch, teacher: Outputs | None) -> None:
        """Adds copies of what a step leaves to the means: the next replay overwrites it."""
        seen, read = taken.seen, self._read[shapes]
        terms = dict(zip(seen.terms, taken.terms.clone().unbind(), strict=True))
        if teacher is None or seen.teacher is not read[1]:  # computed in the step, or those of some places
            teacher = _copied(seen.teacher)
        targets = batch.targets if seen.targets is read[0].targets else seen.targets.clone()
        watched = {name: value.detach().clone() for name, value in seen.watched.items()}
        self.distiller.means.add(Seen(terms, seen.student, teacher, targets, seen.samples, watched))


def _copied(outputs: Outputs | None) -> Outputs | None:
    return None if outputs is None else Outputs({name: head.clone() for name, head in outputs.heads.items()})


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
    if distiller.trainer.world_size > 1:
        return "processes exchange gradients"
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
    """Returns the numbers that are constants of a recorded step and change between epochs; None while gradients are measured
    for `balance`."""
    method, balance, epoch = distiller.method, distiller.balance, distiller.current_epoch
    if balance is not None and not balance.finished and epoch >= method.init_epochs:
        return None
    factors = () if balance is None else tuple(balance.factors.items())
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


def _tensors(batch: Batch, teacher: Outputs | None) -> list[Tensor]:
    outputs = [] if teacher is None else [*teacher.heads.values(), *teacher.features.values()]
    return [x for x in (batch.inputs, batch.targets, batch.ids, batch.views) if x is not None] + outputs


def _shapes(batch: Batch, teacher: Outputs | None) -> Any:
    return tuple((x.shape, x.dtype) for x in _tensors(batch, teacher))


def _options(optimizer: Optimizer) -> Any:
    """Returns the options of an optimizer that a recorded step has as constants: all but the learning rate."""
    left_out = ("params", "lr", "initial_lr")
    return tuple(tuple(v for k, v in group.items() if k not in left_out) for group in optimizer.param_groups)


def _alike(batch: Batch, teacher: Outputs | None) -> tuple[Batch, Outputs | None]:
    """Returns new tensors with the shapes, types and strides of a minibatch and of the teacher's outputs."""
    new = lambda x: None if x is None else torch.empty_like(x)  # noqa: E731
    static = Batch(new(batch.inputs), new(batch.targets), new(batch.ids), new(batch.views))
    if teacher is None:
        return static, None
    heads, features = ({k: torch.empty_like(v) for k, v in x.items()} for x in (teacher.heads, teacher.features))
    return static, Outputs(heads, features, static.ids)
