"""The global batch of a run, and the learning rate that goes with it."""

from __future__ import annotations

from typing import NamedTuple

from lightning import Trainer
from omegaconf import DictConfig

from litdistill.utils.errors import UserError

# How the learning rate follows the global batch: exponents. Linear: Goyal et al. 2017 (arXiv 1706.02677), section 2.1, for
# SGD. Square root: Krizhevsky 2014 (arXiv 1404.5997), section 5; Malladi et al. 2022 (arXiv 2205.10287) derive it for Adam.
RULES = {"linear": 1.0, "sqrt": 0.5}


class Scale(NamedTuple):
    """What a run's step is made of. Prints as a sentence."""

    batch_size: int  # of each process
    processes: int
    accumulated: int  # batches whose gradients make a step
    reference: int | None  # the global batch that `given` is meant for
    rule: str
    given: float | None  # learning rate; None: the optimizer's own

    @property
    def batch(self) -> int:
        """Samples of a step, over all processes."""
        return self.batch_size * self.processes * self.accumulated

    @property
    def factor(self) -> float:
        return 1.0 if self.reference is None else (self.batch / self.reference) ** RULES[self.rule]

    @property
    def lr(self) -> float | None:
        """The learning rate that is trained with."""
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
    """That of a run of `conf/train.yaml` under this trainer. Raises `UserError` for an unknown rule or no batch."""
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
