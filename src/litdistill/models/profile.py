"""The size of a network: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from litdistill.models.parts import evaluating


def count_parameters(net: nn.Module) -> int:
    """Returns the number of elements of all parameters; a shared parameter counts once."""
    return sum(p.numel() for p in net.parameters())


def count_macs(net: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None) -> int:
    """Returns the multiply-accumulates for one sample in eval mode: convolutions, matrix products and attention.

    `input_shape`: of a sample, such as (C, H, W). `dtype`: of the inputs; that of the weights by default.
    Additions, normalization, activations and pooling are not counted, as is usual in papers.
    The network's mode is restored. It works on the meta device too, without computation.
    """
    like = next(net.parameters())
    sample = torch.zeros(1, *input_shape, device=like.device, dtype=dtype or like.dtype)
    with evaluating(net), FlopCounterMode(display=False) as counter:
        net(sample)
    return counter.get_total_flops() // 2


def weight_bytes(net: nn.Module) -> int:
    """Returns the bytes of all tensors in the state dict, parameters and buffers; a shared tensor counts once."""
    tensors = {id(t): t for t in net.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
