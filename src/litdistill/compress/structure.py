"""The structure of a compressed network as plain values (`litdistill.compress.restore` applies it to a new network).

A structure is a list of compression steps in the order of their application:

    {"kind": "low_rank", "layers": {"layer2.0": 5}}                               the rank of each factorized layer
    {"kind": "prune", "layers": {"layer1.0": {"in_channels": 1, "out_channels": 9, "groups": 1}}}      the remaining sizes
    {"kind": "int8"}

It is stored in the metadata of `student.safetensors`. Nothing in it is executed, since the file may be untrusted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from litdistill.utils.checkpoint import read_metadata
from litdistill.utils.errors import UserError

Step = dict[str, Any]


def structure_of(net: nn.Module) -> list[Step]:
    """Returns the compression steps of `net`, or of the network inside it; empty for one that was not compressed."""
    return next((m.__dict__["structure"] for m in net.modules() if "structure" in m.__dict__), [])


def tag_structure(net: nn.Module, smaller: nn.Module, step: Step) -> nn.Module:
    """Stores the steps of `net` and `step` as the structure of `smaller`, and returns `smaller`."""
    smaller.__dict__["structure"] = [*structure_of(net), step]
    return smaller


def load_structure(source: str | Path) -> list[Step]:
    """Returns the structure of the student in a run folder or a `.safetensors` file; empty for any other file."""
    steps = read_metadata(source, "structure") or []
    if not isinstance(steps, list):
        raise UserError(f"{source} is damaged: the structure of its network is no list.")
    return steps
