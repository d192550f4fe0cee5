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
from safetensors import SafetensorError, safe_open
from torch import nn

from litdistill.checkpoint import STUDENT
from litdistill.compress.low_rank import set_ranks
from litdistill.compress.prune import set_sizes
from litdistill.compress.quantise import fake_quantised
from litdistill.errors import UserError

Step = dict[str, Any]


def structure_of(net: nn.Module) -> list[Step]:
    """The steps that made `net`, or the network inside it, what it is; empty for one that was not compressed."""
    return next((m.__dict__["structure"] for m in net.modules() if "structure" in m.__dict__), [])


def compressed(net: nn.Module, smaller: nn.Module, step: Step) -> nn.Module:
    """`smaller`, which knows that it is `net` after one more step."""
    smaller.__dict__["structure"] = [*structure_of(net), step]
    return smaller


def load_structure(source: str | Path) -> list[Step]:
    """The structure of the student that a run folder or a `.safetensors` file holds; empty for any other file."""
    path = Path(source)
    path = path / STUDENT if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            steps = json.loads((file.metadata() or {}).get("structure", "[]"))
        if not isinstance(steps, list):
            raise ValueError("it is no list")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: the structure of its network cannot be read. ({error})") from error
    return steps


def restore(net: nn.Module, steps: Sequence[Step], images: torch.Tensor) -> nn.Module:
    """Gives a network as built the structure of a compressed one; its weights are to be loaded afterwards.

    `images`: a few (N, C, H, W) that it takes. Raises `UserError` for a structure that this network cannot have.
    """
    for step in steps:
        try:
            if step["kind"] == "low_rank":
                smaller = set_ranks(net, step["layers"])
            elif step["kind"] == "prune":
                smaller = set_sizes(net, step["layers"])
            elif step["kind"] == "int8":
                smaller = fake_quantised(net, images)
            else:
                raise UserError(f"{step['kind']!r} is no way of compressing a network.")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"The structure {json.dumps(step)[:200]} is none of this network ({type(error).__name__}: {error}). "
                "Choose the network that was compressed, with the same options."
            ) from error
        net = compressed(net, smaller, dict(step))
    return net
