"""The global batch size of a run, and the learning rate scaled by it."""

from __future__ import annotations

from typing import NamedTuple

from lightning import Trainer
from omegaconf import DictConfig

from litdistill.utils.errors import UserError

# Exponents of the batch size in the learning rate. Linear: Goyal et al. 2017 (arXiv 1706.02677), section 2.1, for
# SGD. Square root: Krizhevsky 2014 (arXiv 1404.5997), section 5; Malladi et al. 2022 (arXiv 2205.10287) derive it for Adam.
RULES = {"linear": 1.0, "sqrt": 0.5}


class Scale(NamedTuple):
    """The parts of a run's global batch size and learning rate; `str()` gives a sentence for the log."""

    batch_size: int  # of each process
    processes: int
    accumulated: int  # batches whose gradients are accumulated for a step
    reference: int | None  # the global batch size that `given` is meant for
    rule: str
    given: float | None  # learning rate; None: the optimizer's own

    @property
    def batch(self) -> int:
        """Returns the number of samples in a step, over all processes."""
        return self.batch_size * self.processes * self.accumulated

    @property
    def factor(self) -> float:
        return 1.0 if self.reference is None else (self.batch / self.reference) ** RULES[self.rule]

    @property
    def lr(self) -> float | None:
        """Returns the scaled learning rate; None for the optimizer's own."""
        return None if self.given is None else self.given * self.factor

    def __str__(self) -> str:
        parts = f"{self.batch_size} x {self.processes} process{'es' if self.processes > 1 else ''}"
        if self.accumulated > 1:
            parts += f" x {self.accumulated} accumulated"
        if self.given is None:
            return f"Global batch {self.batch} = {parts}; the optimizer's own learning rate."
        text = f"Global batch {self.batch} = {parts}; learning rate {self.given:g}"
        if self.reference is None:
            return f"{text}, whatever the batch (scale.reference_batch is null)."
        return f"{text} x {self.factor:g} ({self.rule} in the batch, from {self.reference}) = {self.lr:g}."


def read_scale(cfg: DictConfig, trainer: Trainer, batch_size: int) -> Scale:
    """Returns the scale of a run of `conf/train.yaml` under this trainer, with minibatches of `batch_size` in each process.

    Raises `UserError` for an invalid option.
    """
    lr = cfg.optimizer.get("lr")
    if lr is not None and not isinstance(lr, (int, float)):
        raise UserError(f"optimizer.lr={lr} is no number.")
    options = cfg.get("scale") or {}
    reference, rule = options.get("reference_batch"), options.get("rule", "linear")
    if rule not in RULES:
        raise UserError(f"scale.rule={rule}: choose {' or '.join(RULES)}.")
    if reference is not None and reference < 1:
        raise UserError(
            f"scale.reference_batch={reference} is no number of samples. It is the global batch that optimizer.lr is meant "
            "for, or null."
        )
    return Scale(batch_size, trainer.world_size, trainer.accumulate_grad_batches, reference, rule, lr)
