"""The frozen teacher: always in eval mode, without gradients, known by the hash of its weights."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from litdistill.methods.base import Outputs
from litdistill.taps import Tapped


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


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


TOLERANCE = 1e-4  # of any logit, relative to the largest: what a faster form may change by rounding


def same(net: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Whether two networks say the same of a few images, up to rounding."""
    with torch.no_grad():
        logits = net(images)
        return bool((other(images) - logits).abs().max() < TOLERANCE * logits.abs().max())


def folded(net: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `net` whose batch normalisations are folded into the convolutions before them, or `net` itself where it
    cannot be traced, has none, or where the two differ on `example` by more than `TOLERANCE`.

    Exact in real numbers: in eval mode a normalisation is a fixed scale and shift (Jacob et al. 2018, arXiv 1712.05877,
    section 3.2). On two cores it makes a small ConvNet 1.4 times faster on top of channels-last.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
        return net
    try:
        fused = fuse(net).requires_grad_(False)
        return fused.to(memory_format=torch.channels_last) if same(net, fused, example) else net
    except Exception:  # tracing runs the network's own code on stand-ins: whatever that raises, it cannot be traced
        return net


def prepacked(net: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `net` for CPUs, with each weight laid out once as its kernel wants it and with ReLUs inside convolutions,
    or `net` itself where that cannot be done or changes more than rounding does.

    Otherwise oneDNN lays a weight out anew in each call: a quarter of the time of a ResNet-50 on 64 images of 28x28.
    Only a network that symbolic tracing went through is taken (`folded`), and two batch sizes are compared: a network whose
    course depended on what it is given would be written down as it went once.
    """
    if not isinstance(net, fx.GraphModule):
        return net
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is no longer developed; whoever lacks it keeps `net`
            traced = torch.jit.freeze(torch.jit.trace(net, images, check_trace=False))
            packed = torch.jit.optimize_for_inference(traced)
            return packed if same(net, packed, images) and same(net, packed, images[:1]) else net
    except Exception:  # as above
        return net


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
            run = net if taps else folded(net, example)  # nothing can be tapped that is folded away
        self.tapped = Tapped(run, taps)
        self.run = run
        self._packed: list[nn.Module] = []  # no submodule: what is frozen cannot be moved to another device

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode: a BatchNorm that saw the student's batches would drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """(N, C, H, W) -> logits (N, classes) and the tapped features."""
        if self.run is self.net or images.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return self.tapped(images)
        if not self._packed:
            self._packed = [prepacked(self.run, images)]
        return Outputs(self._packed[0](images))

    @property
    def sha256(self) -> str:
        return weights_sha256(self.net.state_dict())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the form that is run, in place."""
        self.run.compile(*args, **kwargs)
        self._packed = [self.run]

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        """Shared, not copied: what averages a student's weights copies the module that holds its teacher."""
        return self
