"""Running statistics of batch normalization that lag behind the weights: computed anew over training samples.

In its first steps a run's statistics are still those of the start: after n steps their share is (1 - momentum)^n, which is
0.3 for 120 steps of a network with momentum 0.01 (torchvision's MobileNetV3). In eval mode such a network predicts one class
for all. So before each validation, as long as that share is above `LAG`, the statistics of the weights that are validated
and kept are computed anew. Training is unaffected, since it normalizes by the statistics of each batch.

The way is that of `torch.optim.swa_utils.update_bn`, on training samples without augmentation.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from litdistill.data import augment as aug
from litdistill.data.protocol import IndexedData
from litdistill.distillation.inference import NORMS
from litdistill.types import Batch
from litdistill.utils.logging import FILE
from litdistill.utils.modes import eval_mode

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller

log = logging.getLogger(__name__)

LAG = 1e-4  # the largest share of the start in statistics that are used: 1e-2 is too much where layers are many
SAMPLES = 512  # over which statistics are computed anew; of fewer all
BYTES = 2**28  # maximum size of the batches that are remembered where samples have no ids


class LaggingStatistics:
    """Computes the statistics of a Distiller's evaluated network anew where they lag behind.

    Where samples have ids, over the same samples on all processes, each run, and after a resume. Otherwise over the last
    batches of the epoch, which `remember` holds: another pass through a stranger's loader could change its order.
    """

    def __init__(self) -> None:
        self.batches: deque[Batch] = deque()
        self._step = -1  # at which statistics were last computed
        self._until: int | None = None  # the first step at which nothing lags
        self._said = False

    def remember(self, distiller: Distiller, batch: Batch) -> None:
        """Keeps a training batch for `refresh` where samples have no ids, as long as statistics lag."""
        if distiller.data is not None or not self._lag(distiller):
            self.batches.clear()
            return
        self.batches.append(batch)
        while len(self.batches) > 1 and sum(map(_bytes, self.batches)) > BYTES:
            self.batches.popleft()
        while sum(len(b.targets) for b in self.batches) - len(self.batches[0].targets) >= SAMPLES:
            self.batches.popleft()

    def refresh(self, distiller: Distiller) -> None:
        """Computes the lagging statistics anew, once for each step of a fit, and gives all processes those of rank 0.

        Must be called in the modes of training: batch normalization that is in eval mode is frozen and stays as it is.
        """
        trainer = distiller.trainer
        if (
            trainer.state.fn == TrainerFn.FITTING
            and trainer.global_step not in (0, self._step)
            and self._lag(distiller)
        ):
            self._step = trainer.global_step
            self._recompute(distiller)
        if trainer.world_size > 1:
            for buffer in distiller.evaluated.buffers():  # ranks have batch statistics of different batches
                torch.distributed.broadcast(buffer, 0)

    def _lag(self, distiller: Distiller) -> bool:
        if self._until is None:
            norms = [m for m in distiller.evaluated.modules() if has_lag(m)]
            self._until = max((steps_of_lag(norm, decay_of(distiller)) for norm in norms), default=0)
        return distiller.trainer.global_step < self._until

    def _recompute(self, distiller: Distiller) -> None:
        step, decay = distiller.trainer.global_step, decay_of(distiller)
        found = [m for m in distiller.evaluated.modules() if has_lag(m) and m.training]
        norms = [m for m in found if step < steps_of_lag(m, decay)]
        batches = self.batches if distiller.data is None else training_batches(distiller.data, distiller.device)
        with distiller.trainer.precision_plugin.forward_context():
            recompute(norms, distiller, (b for b in batches if len(b.targets) > 1))
        if norms and not self._said:
            self._said = True
            log.info(
                "Statistics of batch normalization lag behind the weights in a run's first %d steps: until then they are "
                "computed anew over training samples for each validation.",
                self._until,
                extra=FILE,
            )


def has_lag(module: nn.Module) -> bool:
    """Returns whether a module is a layer of batch normalization with exponential averages (momentum None: exact means)."""
    return isinstance(module, NORMS) and module.running_mean is not None and module.momentum is not None


def steps_of_lag(norm: Any, decay: float = 0.0) -> int:
    """Returns the number of steps n after which the share of the start in the statistics, (1 - momentum)^n, is `LAG`.

    `decay`: of the average of weights whose layer this is, if it is one.
    """
    slowest = max(1 - norm.momentum, decay)
    if not 0 < slowest < 1:
        return 0 if slowest <= 0 else sys.maxsize
    return math.ceil(math.log(LAG) / math.log(slowest))


def decay_of(distiller: Distiller) -> float:
    """Returns the decay of the average of weights that is evaluated; 0 without one."""
    return float(distiller.hparams.get("ema") or 0.0)


def training_batches(data: IndexedData, device: torch.device) -> Iterator[Batch]:
    """Yields `SAMPLES` training samples without augmentation, the same in each call, in batches of a training's size."""
    ids = aug.order(0, 0, data.train_ids)[:SAMPLES]
    for chunk in ids.tensor_split(-(-len(ids) // data.batch_size)):
        yield data.get_batch("train", chunk.to(device), None)


@torch.no_grad()
def recompute(norms: Iterable[Any], distiller: Distiller, batches: Iterable[Batch]) -> None:
    """Sets the statistics of `norms` to their means over `batches`; all other modules run in eval mode, as validated.

    A layer that no batch passes keeps its statistics.
    """
    net, norms = distiller.evaluated, list(norms)
    before = [
        (n, n.momentum, *(x.clone() for x in (n.running_mean, n.running_var, n.num_batches_tracked))) for n in norms
    ]
    try:
        # A few batches are not worth another compilation.
        with eval_mode(net), torch.compiler.set_stance("force_eager"):
            for norm in norms:
                norm.training, norm.momentum = True, None  # the mean over all batches
                norm.reset_running_stats()
            for batch in batches:
                distiller.task.forward(net, batch, False)
    finally:
        for norm, momentum, mean, var, count in before:
            if not norm.num_batches_tracked:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)
            norm.num_batches_tracked.copy_(count)
            norm.momentum = momentum


def _bytes(batch: Batch) -> int:
    return batch.inputs.nbytes if isinstance(batch.inputs, Tensor) else 0
