"""Int8: a network that computes as its int8 form does, and can be trained so; through torchao's PT2E.

Weights are rounded to 7 bits a channel, activations to uint8 a tensor, in a graph that torch.export takes of the network
in eval mode, batch normalisation folded into convolutions (Jacob et al. 2018, arXiv 1712.05877, sections 2 and 3). As it
is after calibration, this is post-training quantisation; trained on, quantisation-aware training with straight-through
gradients and batch normalisation frozen. `converted` is the same with int8 weights, and exports to ONNX as it stands.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.compress.structure import tag_structure
from litdistill.utils.errors import UserError


class Int8(nn.Module):
    """An exported graph, usable like any module. While it trains, ranges follow what it sees; in eval mode they stand."""

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.program = graph

    def train(self, mode: bool = True) -> Int8:
        """Sets the mode of this module alone: an exported graph has none."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) normalised -> logits (N, classes)."""
        for module in self.program.modules():
            flag = dict(module.named_buffers(recurse=False)).get("observer_enabled")
            if flag is not None:
                flag.fill_(self.training)
        return self.program(images)


def int8(net: nn.Module, images: Tensor) -> nn.Module:
    """A trained network as its int8 form computes, its ranges those of `images` (N, C, H, W), normalised."""
    small = tag_structure(net, fake_quantized(net, images), {"kind": "int8"})
    return small.train(net.training)


def fake_quantized(net: nn.Module, images: Tensor) -> Int8:
    """`net` with rounding after every weight and activation that the int8 form rounds, ranges those of `images`."""
    with quiet():
        try:
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
        except ModuleNotFoundError as error:
            raise UserError("Quantisation needs torchao: pip install 'litdistill[compress]'.") from error
        try:
            program = torch.export.export(
                copy.deepcopy(net).eval(), (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
            )
        except Exception as error:  # whatever the network's code does that torch.export cannot follow
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"torch.export cannot trace this network, which int8 needs. {reason}") from error
        graph = prepare_pt2e(program.module(check_guards=False), _quantizer())
    small = Int8(graph.requires_grad_(True))  # folded biases as well
    with torch.no_grad():
        small.train()(images)
    return small.eval()


def converted(net: Int8) -> Int8:
    """The int8 form itself, on the CPU: rounded weights as int8 tensors, quantise and dequantise operations between layers."""
    with quiet():
        from torchao.quantization.pt2e import FakeQuantize
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        program = copy.deepcopy(net.program).cpu()
        for module in program.modules():
            if isinstance(module, FakeQuantize):
                # What it has computed with. Its observer's own differ in the last bit, and have another least scale.
                module.calculate_qparams = partial(_scale_and_zero, module)
        return Int8(convert_pt2e(program)).eval()


def _scale_and_zero(module: Any) -> tuple[Tensor, Tensor]:
    return module.scale, module.zero_point


def _quantizer() -> Any:
    """torchao's for x86 CPUs, with weights of 7 bits whose ranges are always those of the weights as they are.

    With 8, sums of products overflow 16 bits on CPUs without VNNI, and a file would give other answers there.
    """
    from torchao.quantization.pt2e import FakeQuantize, MovingAveragePerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    default = get_default_x86_inductor_quantization_config(is_qat=True)
    # Not the fused operation, whose scale differs by 1/127 from the one that a converted graph gets. The least scale is far
    # below that of any channel that does something: all weights of one below it are rounded to zero.
    rounding = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, eps=1e-8)
    weight = dataclasses.replace(default.weight, quant_min=-63, quant_max=63, observer_or_fake_quant_ctr=rounding)
    return X86InductorQuantizer().set_global(dataclasses.replace(default, weight=weight, is_qat=False))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress and advice of torch's exporters, which ask nothing of the user; their errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
