"""Deep mutual learning: networks that teach each other from scratch. Zhang et al. 2018 (arXiv 1706.00384), section 3."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from litdistill.methods.base import Method, check_temperature, check_weights, hard_loss
from litdistill.methods.kd import soft_loss
from litdistill.types import Outputs, Taps
from litdistill.utils.errors import UserError


class Cohort(nn.Module):
    """A student and its peers, which see the same images; gives the student's logits (N, classes)."""

    def __init__(self, student: nn.Module, peers: list[nn.Module]):
        super().__init__()
        self.student, self.peers = student, nn.ModuleList(peers)

    def forward(self, images: Tensor) -> Tensor:
        for peer in self.peers:
            peer(images)  # read by tap
        return self.student(images)


class Mutual(Method):
    """For each network of the cohort: `hard` · CE(labels) + `soft` · T² · mean over the others of KL(other ‖ it).

    Needs no teacher. The peers have the student's architecture and other first weights, learn at the same time (the
    paper updates one network after the other) and are not shipped.
    """

    needs_teacher = False

    def __init__(self, hard: float = 1.0, soft: float = 1.0, temperature: float = 1.0, peers: int = 1):
        super().__init__()
        check_weights(hard=hard, soft=soft)
        check_temperature(temperature)
        if peers < 1:
            raise UserError(f"method.peers={peers}: a student needs at least one peer to learn with.")
        self.hard, self.soft, self.temperature, self.peers = hard, soft, temperature, peers

    def prepare(self, student: nn.Module, teacher: nn.Module | None, example: Tensor) -> nn.Module:
        return Cohort(student, [_fresh(student) for _ in range(self.peers)])

    def taps(self) -> Taps:
        return Taps(student=[f"peers.{i}" for i in range(self.peers)])

    def ship(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, Cohort)
        return student.student

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor) -> dict[str, Tensor]:
        everyone = [student.logits, *student.features.values()]
        terms = {}
        if self.hard:
            terms["hard"] = self.hard * torch.stack([hard_loss(logits, target) for logits in everyone]).sum()
        if self.soft:
            pairs = [(a, b) for a in everyone for b in everyone if a is not b]
            losses = [soft_loss(a, b.detach(), self.temperature) for a, b in pairs]
            terms["soft"] = self.soft * torch.stack(losses).sum() / self.peers
        return terms


def _fresh(net: nn.Module) -> nn.Module:
    """A copy with first weights of its own, drawn by each layer's own rule.

    Attention has its rule under another name. A parameter without any, as an embedding of positions that a network holds
    itself, is shuffled: the same numbers in other places are as likely a draw.
    """
    peer = copy.deepcopy(net)
    for module in peer.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for module in peer.modules():  # afterwards: what comes before is what it has always been for networks without these
        if callable(getattr(module, "reset_parameters", None)):
            continue
        if callable(reset := getattr(module, "_reset_parameters", None)):
            reset()
            continue
        for parameter in module.parameters(recurse=False):
            flat = parameter.data.flatten()
            parameter.data = flat[torch.randperm(len(flat)).to(flat.device)].view_as(parameter)
    return peer
