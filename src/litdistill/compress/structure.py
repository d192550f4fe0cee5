"""The structure of a compressed network as plain values (`litdistill.compress.restore` gives it to a network again).

A structure is a list of steps, in the order in which they were taken:

    {"kind": "low_rank", "layers": {"layer2.0": 5}}                               the rank of each factorised layer
    {"kind": "prune", "layers": {"layer1.0": {"in_channels": 1, "out_channels": 9, "groups": 1}}}      the sizes that are left
    {"kind": "int8"}

It is kept in the metadata of `student.safetensors`. Nothing in it is executed: it may come from a stranger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

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
