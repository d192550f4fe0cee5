"""Restores the structure of a compressed network from its steps (`litdistill.compress.structure`)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import nn

from litdistill.compress.low_rank import set_ranks
from litdistill.compress.prune import SIZES, set_sizes, sizes
from litdistill.compress.quantize import fake_quantized
from litdistill.compress.structure import Step, tag_structure
from litdistill.models.finetune import head_of
from litdistill.utils.errors import UserError


def restore(net: nn.Module, steps: Sequence[Step], images: torch.Tensor, new_head: bool = False) -> nn.Module:
    """Returns a newly built network with the structure of a compressed one; the caller loads the weights.

    `images`: a few (N, C, H, W) for the network. `new_head`: the classifier keeps the number of outputs that it was built
    with, and is not factorized. Raises `UserError` for a structure that this network cannot have.
    """
    head = head_of(net, images) if new_head and steps else None
    for step in steps:
        try:
            step = step if head is None else _with_own_head(net, step, head)
            if step["kind"] == "low_rank":
                smaller = set_ranks(net, step["layers"])
            elif step["kind"] == "prune":
                smaller = set_sizes(net, step["layers"])
            elif step["kind"] == "int8":
                smaller = fake_quantized(net, images)
            else:
                raise UserError(f"{step['kind']!r} is no way of compressing a network.")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The structure {json.dumps(step)[:200]} is none of this network ({type(error).__name__}: {error}). "
                "Choose the network that was compressed, with the same options."
            ) from error
        net = tag_structure(net, smaller, dict(step))
    return net


def _with_own_head(net: nn.Module, step: Step, head: str) -> Step:
    """Returns the step without its changes to the outputs of the classifier `head`, which may have several layers."""
    if step["kind"] == "int8":
        raise UserError(
            "student.head=new: an int8 network is one traced graph, whose classifier cannot be exchanged. Start from the "
            "float run that it was made of, with student.head=new and compress=int8."
        )
    parts = [name for name, m in net.named_modules() if f"{name}.".startswith(f"{head}.") and type(m) in SIZES]
    if step["kind"] == "low_rank":
        return {**step, "layers": {name: rank for name, rank in step["layers"].items() if name not in parts}}
    layers = dict(step["layers"])
    for name in set(parts[-1:]) & layers.keys():
        layers[name] = {**layers[name], **{k: n for k, n in sizes(net)[name].items() if k.startswith("out_")}}
    return {**step, "layers": layers}
