"""The peers of mutual learning."""

from __future__ import annotations

import torch
from torchvision.models import VisionTransformer

from litdistill.methods.mutual import Mutual


def test_peers_start_from_weights_of_their_own_in_attention_and_positions_too():
    torch.manual_seed(0)
    student = VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    torch.nn.init.normal_(student.heads.head.weight)  # zero in torchvision
    torch.nn.init.normal_(student.class_token)  # likewise
    (peer,) = Mutual().prepare(student, None, torch.randn(1, 3, 8, 8)).peers
    for (name, own), other in zip(student.named_parameters(), peer.parameters(), strict=True):
        if own.std() > 0:
            assert not torch.equal(own, other), name
    place = "encoder.pos_embedding"
    assert torch.equal(*(net.get_parameter(place).flatten().sort().values for net in (student, peer)))
