"""The structure of a compressed network as plain values, and how a network is given that structure again.

A structure is a list of steps, in the order in which they were taken:

    {"kind": "low_rank", "layers": {"layer2.0": 5}}                               the rank of each factorised layer
    {"kind": "prune", "layers": {"layer1.0": {"in_channels": 1, "out_channels": 9, "groups": 1}}}      the sizes that are left
    {"kind": "int8"}

It is kept in the metadata of `student.safetensors`. Nothing in it is executed: it may come from a stranger.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litdistill.compress.low_rank import set_ranks
from litdistill.compress.prune import SIZES, set_sizes, sizes
from litdistill.compress.quantize import fake_quantized
from litdistill.models.finetune import head_of
from litdistill.utils.checkpoint import read_metadata
from litdistill.utils.errors import UserError

Step = dict[str, Any]


def structure_of(net: nn.Module) -> list[Step]:
    """The steps that made `net`, or the network inside it, what it is; empty for one that was not compressed."""
    return next((m.__dict__["structure"] for m in net.modules() if "structure" in m.__dict__), [])


def tag_structure(net: nn.Module, smaller: nn.Module, step: Step) -> nn.Module:
    """`smaller`, which knows that it is `net` after one more step."""
    smaller.__dict__["structure"] = [*structure_of(net), step]
    return smaller


def load_structure(source: str | Path) -> list[Step]:
    """The structure of the student that a run folder or a `.safetensors` file holds; empty for any other file."""
    steps = read_metadata(source, "structure") or []
    if not isinstance(steps, list):
        raise UserError(f"{source} is damaged: the structure of its network is no list.")
    return steps


def restore(net: nn.Module, steps: Sequence[Step], images: torch.Tensor, new_head: bool = False) -> nn.Module:
    """Gives a network as built the structure of a compressed one; its weights are to be loaded afterwards.

    `images`: a few (N, C, H, W) that it takes. `new_head`: its classifier keeps the outputs that it was built with, and is
    not factorised. Raises `UserError` for a structure that this network cannot have.
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
    """The step without what it does to the outputs of the classifier `head`, a layer or several."""
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
