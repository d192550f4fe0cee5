"""The frozen teacher: always in eval mode, without gradients, known by the hash of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.distillation.inference import fuse_batchnorm, prepack
from litdistill.features.feature_extractor import FeatureExtractor
from litdistill.types import Outputs
from litdistill.utils.hashing import weights_sha256


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
    """Wraps any network that gives logits. Nothing that is done to the module around it can unfreeze it.

    `no_grad` and not `inference_mode`: losses save its outputs for their backward pass.

    `example`: a few images (N, C, H, W) on which a faster form of the network is compared with it before it is used.
    """

    def __init__(self, net: nn.Module, taps: Sequence[str] = (), example: Tensor | None = None):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.train(False)
        run = net
        if example is not None:
            net.to(memory_format=torch.channels_last)
            run = net if taps else fuse_batchnorm(net, example)  # nothing can be tapped that is folded away
        self.tapped = FeatureExtractor(run, taps)
        self.run = run
        self.mode: str | None = None  # in which it is compiled
        self._packed: list[nn.Module] = []  # no submodule: it cannot be moved to another device

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode: a BatchNorm that saw the student's batches would drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """(N, C, H, W) -> logits (N, classes) and the tapped features."""
        packs = self.mode == "prepacked" and not self.tapped.names
        if not packs or images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            out = self.tapped(images)
            if self.mode in (None, "default", "prepacked"):
                return out
            # A CUDA graph writes its next outputs over these.
            return Outputs(out.logits.clone(), {k: v.clone() for k, v in out.features.items()})
        if not self._packed:
            self._packed = [prepack(self.run, images)]
        return Outputs(self._packed[0](images))

    @property
    def sha256(self) -> str:
        return weights_sha256(self.net.state_dict())

    def compile(self, mode: str = "default") -> None:
        """Compiles the form that is run, in place, in one of the modes of `torch.compile`. `prepacked` is one more, for CPUs,
        without an effect where features are tapped."""
        self.mode = mode
        if mode != "prepacked":
            self.run.compile(mode=mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        """Shared, not copied: what averages a student's weights copies the module that holds its teacher."""
        return self
