"""Int8 by torchao's PT2E: fake quantization, which simulates the int8 form and can be trained, and conversion to it.

Weights are quantized to 7 bits per channel, activations to uint8 per tensor, in the graph that torch.export captures of the
network in eval mode, with batch normalization folded into convolutions (Jacob et al. 2018, arXiv 1712.05877, sections 2 and
3). After calibration alone this is post-training quantization; with training it is quantization-aware training with
straight-through gradients and frozen batch normalization. `converted` returns the form with int8 weights, for ONNX export.
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
from litdistill.models.parts import evaluating
from litdistill.utils.errors import UserError


class Int8(nn.Module):
    """An exported graph as a module. In train mode observers update the quantization ranges; in eval mode these are fixed."""

    def __init__(self, graph: nn.Module):
        super().__init__()
        self.program = graph

    def train(self, mode: bool = True) -> Int8:
        """Sets the mode of this module only: an exported graph has no mode."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (N, classes) for normalized images (N, C, H, W)."""
        for module in self.program.modules():
            flag = dict(module.named_buffers(recurse=False)).get("observer_enabled")
            if flag is not None:
                flag.fill_(self.training)
        return self.program(images)


def int8(net: nn.Module, images: Tensor) -> nn.Module:
    """Returns a trained network with fake quantization, calibrated on normalized `images` (N, C, H, W)."""
    small = tag_structure(net, fake_quantized(net, images), {"kind": "int8"})
    return small.train(net.training)


def fake_quantized(net: nn.Module, images: Tensor) -> Int8:
    """Returns `net` with fake quantization of all weights and activations of the int8 form, calibrated on `images`."""
    with evaluating(net):
        out = net(images[:2])
    if not isinstance(out, Tensor):
        raise UserError(
            f"compress=int8: this network gives several outputs ({', '.join(out)}), as detectors do, and only networks with "
            "one are trained in int8. Train it in float, then write its int8 file: litdistill export run=<its run folder> "
            "precision=int8."
        )
    with quiet():
        try:
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
        except ModuleNotFoundError as error:
            raise UserError("Quantization needs torchao: pip install 'litdistill[compress]'.") from error
        try:
            program = torch.export.export(
                copy.deepcopy(net).eval(), (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
            )
        except Exception as error:  # torch.export raises many types for code that it cannot trace
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"torch.export cannot trace this network, which int8 needs. {reason}") from error
        graph = prepare_pt2e(program.module(check_guards=False), _quantizer())
    small = Int8(graph.requires_grad_(True))  # folded biases as well
    with torch.no_grad():
        small.train()(images)
    return small.eval()


def converted(net: Int8) -> Int8:
    """Returns the int8 form on the CPU: weights as int8 tensors, with quantize and dequantize operations between layers."""
    with quiet():
        from torchao.quantization.pt2e import FakeQuantize
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        program = copy.deepcopy(net.program).cpu()
        for module in program.modules():
            if isinstance(module, FakeQuantize):
                # The values used in its forward. The observer's differ in the last bit, and have another minimum scale.
                module.calculate_qparams = partial(_scale_and_zero, module)
        return Int8(convert_pt2e(program)).eval()


def _scale_and_zero(module: Any) -> tuple[Tensor, Tensor]:
    return module.scale, module.zero_point


def _quantizer() -> Any:
    """Returns torchao's quantizer for x86 CPUs, with 7-bit weights whose ranges always follow the current weights.

    With 8 bits, sums of products overflow 16 bits on CPUs without VNNI, where a file would then give other outputs.
    """
    from torchao.quantization.pt2e import FakeQuantize, MovingAveragePerChannelMinMaxObserver
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    default = get_default_x86_inductor_quantization_config(is_qat=True)
    # Not the fused operation, whose scale differs by 1/127 from that of a converted graph. The minimum scale `eps` is far
    # below that of any channel that matters, since all weights of a channel below it are rounded to zero.
    rounding = FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, eps=1e-8)
    weight = dataclasses.replace(default.weight, quant_min=-63, quant_max=63, observer_or_fake_quant_ctr=rounding)
    return X86InductorQuantizer().set_global(dataclasses.replace(default, weight=weight, is_qat=False))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences logs and warnings of torch's exporters, which need no action by the user; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
