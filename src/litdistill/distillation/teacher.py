"""The frozen teacher: any network, always in eval mode, without gradients, known by the hash of what it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.distillation.inference import fuse_batchnorm, prepack
from litdistill.features.feature_extractor import FeatureExtractor
from litdistill.tasks.base import Task
from litdistill.tasks.classification import Classification
from litdistill.types import Batch, Outputs
from litdistill.utils.hashing import network_sha256


class Ensemble(nn.Module):
    """Several networks as one: their logits averaged, which is the geometric mean of what they predict.

    Hinton, Vinyals & Dean 2015 (arXiv 1503.02531), section 3, allow either mean; the arithmetic one of probabilities
    is `probabilities=True`, whose logits are the logarithms of the mean.
    """

    def __init__(self, members: Sequence[nn.Module], probabilities: bool = False):
        super().__init__()
        self.members, self.probabilities = nn.ModuleList(members), probabilities

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([member(images) for member in self.members])
        if self.probabilities:
            return torch.logsumexp(logits.log_softmax(2), 0) - math.log(len(logits))
        return logits.mean(0)


class FrozenTeacher(nn.Module):
    """Wraps any network. Nothing that is done to the module around it can unfreeze it.

    `no_grad` and not `inference_mode`: losses save its outputs for their backward pass.

    Args:
        net: any module that the task can run.
        task: runs it.
        taps: names of the nodes whose features are read (`litdistill.features.feature_extractor.resolve_taps`).
        example: a batch on which a faster form of the network is compared with it before it is used; without one, or with
            taps, it is run as it is.
        compile: a mode of `torch.compile`, or "prepacked", which lays weights out once, on CPUs and without taps; last bits
            then depend on the place in a batch.
        faster: whether a faster form of the network may be run: one whose batch normalizations are folded away.
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
        self.net, self.task = net.requires_grad_(False), task or Classification()
        self.mode, self.faster = compile, faster
        super().train(False)
        run = net
        if example is not None and faster:
            net.to(memory_format=torch.channels_last)
            if not taps and isinstance(example.inputs, Tensor):  # nothing can be tapped that is folded away
                run = fuse_batchnorm(net, example.inputs)
        self.run, self.extractor = run, FeatureExtractor(run, taps)
        super().train(False)  # what was made for a faster form too
        if compile not in (None, "prepacked"):
            run.compile(mode=compile)
        self._packed: list[nn.Module] = []  # no submodule: it cannot be moved to another device

    @property
    def taps(self) -> tuple[str, ...]:
        """The names of the nodes whose features are read."""
        return self.extractor.names

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode: a BatchNorm that saw the student's batches would drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        """The heads and the tapped features for a batch."""
        inputs = batch.inputs
        packs = self.mode == "prepacked" and not self.taps and isinstance(inputs, Tensor)
        if packs and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            if not self._packed:
                self._packed = [prepack(self.run, inputs)]
            return self.task.forward(self._packed[0], batch, False)
        out = self.extractor.run(lambda net: self.task.forward(net, batch, False))
        if self.mode in (None, "default", "prepacked"):
            return out
        # A CUDA graph writes its next outputs over these.
        heads, features = ({k: v.clone() for k, v in x.items()} for x in (out.heads, out.features))
        return Outputs(heads, features)

    @property
    def sha256(self) -> str:
        """Of its weights, its structure and its preprocessing."""
        return network_sha256(self.net)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        """Shared, not copied: what averages a student's weights copies the module that holds its teacher."""
        return self
