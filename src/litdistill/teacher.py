"""The frozen teacher: always in eval mode, without gradients, known by the hash of its weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.data.augment import count_views
from litdistill.data.datamodule import ImageData
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


class FrozenTeacher(nn.Module):
    """Wraps any network that gives logits. Nothing that is done to the module around it can unfreeze it.

    `no_grad` and not `inference_mode`: losses save its outputs for their backward pass.
    """

    def __init__(self, net: nn.Module, taps: Sequence[str] = ()):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.tapped = Tapped(net, taps)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode: a BatchNorm that saw the student's batches would drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Outputs:
        """(N, C, H, W) -> logits (N, classes) and the tapped features."""
        return self.tapped(images)

    @property
    def sha256(self) -> str:
        return weights_sha256(self.net.state_dict())

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        """Shared, not copied: what averages a student's weights copies the module that holds its teacher."""
        return self


TABLE_BYTES = 2**30


def tabulate(teacher: FrozenTeacher, data: ImageData, device: torch.device, passes: float) -> Tensor | None:
    """The teacher's logits for every view of every training image, (views, M, classes), or None where that does not pay.

    It pays where training is going to look at an image more often (`passes`) than there are views of it, and is refused
    beyond 1 GiB. Batches are cut from the sorted ids, so that the table is the same to the bit whatever the order of
    training, and a resumed run finds again what it had.
    """
    views = count_views(data.augment)
    rows = len(data.train_targets)
    if views > passes or views * rows * data.num_classes * 4 > TABLE_BYTES:
        return None
    table = torch.zeros(views, rows, data.num_classes, device=device)
    for view in range(views):
        for ids in data.train_ids.to(device).split(data.eval_batch_size):
            seen = data.seen("train", ids, torch.full_like(ids, view) if data.augment else None)
            table[view, ids] = teacher(seen.images).logits.float()
    return table
