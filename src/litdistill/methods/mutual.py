"""Deep mutual learning: networks trained from scratch on each other's predictions. Zhang et al. 2018 (arXiv 1706.00384)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.losses import kl
from litdistill.methods.base import CATEGORICAL, Method, check_temperature, check_weights, summed
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError


class Cohort(nn.Module):
    """A student and its peers, which run on the same inputs; returns the student's output."""

    def __init__(self, student: nn.Module, peers: list[nn.Module]):
        super().__init__()
        self.student, self.peers = student, nn.ModuleList(peers)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        for peer in self.peers:
            peer(*inputs, **named)  # its output is read by a tap
        return self.student(*inputs, **named)


class Mutual(Method):
    """For each network of the cohort: `hard` · labels' loss + `soft` · T² · mean over the others of KL(other ‖ network).

    Section 3 of the paper. Needs no teacher. The peers have the student's architecture and other initial weights, are
    trained simultaneously (the paper updates one network after the other) and are not deployed.
    """

    needs_teacher = False
    kinds = (CATEGORICAL,)
    takes_places = True

    def __init__(self, hard: float = 1.0, soft: float = 1.0, temperature: float = 1.0, peers: int = 1):
        super().__init__(hard)
        check_weights(soft=soft)
        check_temperature(temperature)
        if peers < 1:
            raise UserError(f"peers={peers}: a student needs at least one peer to learn with.")
        self.soft, self.temperature, self.peers = soft, temperature, peers

    def prepare(self, student: nn.Module, teacher: Any, example: Any) -> nn.Module:
        return Cohort(student, [_reinitialized(student) for _ in range(self.peers)])

    def taps(self) -> Taps:
        return Taps(student=[f"peers.{i}" for i in range(self.peers)])

    def ship(self, student: nn.Module) -> nn.Module:
        assert isinstance(student, Cohort)
        return student.student

    def companions(self, student: Outputs) -> list[Outputs]:
        """Returns the peers' outputs."""
        return [Outputs.of(logits) for logits in student.features.values()]

    def forward(self, student: Outputs, teacher: Any, batch: Batch) -> dict[str, Tensor]:
        if not self.soft:
            return {}
        logits = [student.logits, *student.features.values()]
        pairs = [(a, b) for a in logits for b in logits if a is not b]
        losses = [kl(a, b.detach(), self.temperature) for a, b in pairs]
        return {"soft": self.soft * summed(losses) / self.peers}


def _reinitialized(net: nn.Module) -> nn.Module:
    """Returns a copy with new initial weights, drawn by each layer's own initialization.

    torch's attention has no public method for it. A parameter without an initialization, such as a position embedding that
    a network holds itself, is shuffled: a permutation of the same numbers is as likely a draw.
    """
    peer = copy.deepcopy(net)
    for module in peer.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    for module in peer.modules():  # a second loop, after all draws of the first
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
    """Draws an attention module's weights as its constructor does; its output projection is a layer with its own reset."""
    for name, parameter in attention.named_parameters(recurse=False):
        if name in ("bias_k", "bias_v"):
            nn.init.xavier_normal_(parameter)
        elif parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    if attention.out_proj.bias is not None:
        nn.init.zeros_(attention.out_proj.bias)
