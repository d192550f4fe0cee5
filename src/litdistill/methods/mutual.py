"""Deep mutual learning: networks that teach each other from scratch. Zhang et al. 2018 (arXiv 1706.00384), section 3."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights, summed
from litdistill.methods.kd import soft_loss
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError


class Cohort(nn.Module):
    """A student and its peers, which are given the same inputs; gives what the student gives."""

    def __init__(self, student: nn.Module, peers: list[nn.Module]):
        super().__init__()
        self.student, self.peers = student, nn.ModuleList(peers)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        for peer in self.peers:
            peer(*inputs, **named)  # read by tap
        return self.student(*inputs, **named)


class Mutual(Method):
    """For each network of the cohort: `hard` · labels' loss + `soft` · T² · mean over the others of KL(other ‖ it).

    Needs no teacher. The peers have the student's architecture and other first weights, learn at the same time (the
    paper updates one network after the other) and are not deployed.
    """

    needs_teacher = False
    kinds = (CATEGORICAL,)

    def __init__(self, hard: float = 1.0, soft: float = 1.0, temperature: float = 1.0, peers: int = 1):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        if peers < 1:
            raise UserError(f"peers={peers}: a student needs at least one peer to learn with.")
        self.soft, self.temperature, self.peers = soft, temperature, peers

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        return Cohort(student, [_fresh(student) for _ in range(self.peers)])

    def taps(self) -> Taps:
        return Taps(student=[f"peers.{i}" for i in range(self.peers)])

    def ship(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, Cohort)
        return student.student

    def companions(self, student: Outputs) -> list[Outputs]:
        """The peers' outputs."""
        return [Outputs.of(logits) for logits in student.features.values()]

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        everyone = [student.logits, *student.features.values()]
        pairs = [(a, b) for a in everyone for b in everyone if a is not b]
        losses = [soft_loss(a, b.detach(), self.temperature) for a, b in pairs]
        return {"soft": self.soft * summed(losses) / self.peers}


def _fresh(net: nn.Module) -> nn.Module:
    """A copy with first weights of its own, drawn by each layer's own rule.

    torch's attention has its rule under no public name. A parameter without any, as an embedding of positions that a
    network holds itself, is shuffled: the same numbers in other places are as likely a draw.
    """
    peer = copy.deepcopy(net)
    for module in peer.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for module in peer.modules():  # afterwards: what comes before is what it has always been for networks without these
        if callable(getattr(module, "reset_parameters", None)):
            continue
        if isinstance(module, nn.MultiheadAttention):
            _reset_attention(module)
            continue
        for parameter in module.parameters(recurse=False):
            flat = parameter.data.flatten()
            parameter.data = flat[torch.randperm(len(flat)).to(flat.device)].view_as(parameter)
    return peer


def _reset_attention(attention: nn.MultiheadAttention) -> None:
    """Draws its weights as its constructor does; those of its output are a layer of their own."""
    for name, parameter in attention.named_parameters(recurse=False):
        if name in ("bias_k", "bias_v"):
            nn.init.xavier_normal_(parameter)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    if attention.out_proj.bias is not None:
        nn.init.zeros_(attention.out_proj.bias)
