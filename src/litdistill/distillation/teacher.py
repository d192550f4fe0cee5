"""The frozen teacher: any network, always in eval mode and without gradients, identified by a hash of its contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.distillation.dry_run import freeze
from litdistill.distillation.inference import fuse_batchnorm, prepack
from litdistill.distillation.mixed import logits_of_each, reads_ids
from litdistill.distillation.recorded import RecordedTeacher
from litdistill.features.feature_extractor import FeatureExtractor, resolve_taps
from litdistill.models.ensemble import Ensemble, Members
from litdistill.tasks.base import Task
from litdistill.tasks.classification import Classification
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.hashing import network_sha256


class FrozenTeacher(nn.Module):
    """Wraps any network in eval mode without gradients; `train()` on an outer module does not change that.

    Uses `no_grad`, not `inference_mode`, since losses save the outputs for their backward pass.

    Args:
        net: any module that the task can run, or a `RecordedTeacher`, whose outputs are looked up by the batch's ids.
        task: defines the forward pass.
        taps: names of the nodes whose features are read (`litdistill.features.feature_extractor.resolve_taps`).
        example: a batch on which a faster form of the network is compared with it before it is used; without one, or with
            taps, the network is run unchanged.
        compile: a mode of `torch.compile`, or "prepacked", which prepacks weights on CPUs without taps; the last bits of
            outputs then depend on the position in a batch.
        faster: whether to run a faster form of the network, with batch normalizations folded into convolutions.
    """

    def __init__(
        self,
        net: nn.Module,
        task: Task | None = None,
        taps: Sequence[str] = (),
        example: Batch | None = None,
        compile: str | None = None,
        faster: bool = True,
    ):
        super().__init__()
        self.net, self.task = freeze(net), task or Classification()
        self.mode, self.faster = compile, faster
        super().train(False)
        run = net
        self.recorded = isinstance(net, RecordedTeacher)
        self._recorded_taps = tuple(taps) if self.recorded else ()
        self.by_ids = reads_ids(net)
        if example is not None and faster and not self.recorded:
            net.to(memory_format=torch.channels_last)
            if not taps and not self.by_ids and isinstance(example.inputs, Tensor):  # folded layers cannot be tapped
                run = fuse_batchnorm(net, example.inputs)
        self.run, self.extractor = run, FeatureExtractor(run, () if self._recorded_taps else taps)
        super().train(False)  # again, for the modules of the faster form
        if compile not in (None, "prepacked") and not self.by_ids:
            run.compile(mode=compile)
        self._packed: list[nn.Module] = []  # not a submodule, since it cannot be moved to another device

    @property
    def taps(self) -> tuple[str, ...]:
        """Returns the names of the nodes whose features are read."""
        return self._recorded_taps or self.extractor.names

    @property
    def recordable(self) -> bool:
        """Returns whether a graph may hold its forward over many samples at once: it is a network that records none itself,
        and no features, which take much memory, are read."""
        return not (self.recorded or self.by_ids or self.taps) and self.mode in (None, "default")

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode: in train mode BatchNorm would update its statistics from the student's batches."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        """Returns the heads and the tapped features for a batch."""
        if isinstance(self.net, RecordedTeacher):
            return self.net.outputs(batch)
        if self.by_ids:
            return self.extractor.run(lambda net: Outputs(net.heads(logits_of_each(net, self.task, batch))))  # type: ignore
        inputs = batch.inputs
        packs = self.mode == "prepacked" and not self.taps and isinstance(inputs, Tensor)
        if packs and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            if not self._packed:
                self._packed = [prepack(self.run, inputs)]
            return self.task.forward(self._packed[0], batch, False)
        out = self.extractor.run(lambda net: self.task.forward(net, batch, False))
        if self.mode in (None, "default", "prepacked"):
            return out
        # The next replay of a CUDA graph overwrites these.
        heads, features = ({k: v.clone() for k, v in x.items()} for x in (out.heads, out.features))
        return Outputs(heads, features)

    @torch.no_grad()
    def with_members(self, batch: Batch, split: str = "train") -> Outputs:
        """Returns the heads for a batch of a split; for an ensemble with those of each member
        (`litdistill.models.ensemble.Members`)."""
        if isinstance(self.net, RecordedTeacher):
            return self.net.outputs(batch, split)
        if not isinstance(self.run, Ensemble):
            return self(batch)
        if self.by_ids:
            each = logits_of_each(self.run, self.task, batch, split)
            return Outputs({"logits": self.run.combined(each), "members": each})
        return self.task.forward(Members(self.run), batch, False)

    @property
    def sha256(self) -> str:
        """Returns the SHA-256 of its weights, structure and preprocessing."""
        return network_sha256(self.net)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Returns what is equal for two teachers only if their outputs are, in one precision."""
        return self.sha256, tuple(self.taps), self.mode

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        """Returns itself: averaging the student's weights copies the module that holds the teacher."""
        return self


def teacher_taps(net: nn.Module | None, inputs: Any, taps: Taps, run: Callable[[nn.Module, Any], Outputs]) -> list[str]:
    """Returns the names of the features that a method reads of a teacher. `run`: calls a network on `inputs`."""
    if net is None:
        return []
    return net.taps_for(taps) if isinstance(net, RecordedTeacher) else resolve_taps(net, inputs, taps.teacher, run)
