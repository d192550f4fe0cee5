"""Metadata of weights files: the preprocessing, and the names of the classes of the training data.

Classes are matched by name, so the data may have them in another order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.models.finetune import head_of
from litdistill.models.parts import evaluating
from litdistill.models.preprocess import preprocess_of
from litdistill.utils.errors import UserError


def student_metadata(
    net: nn.Module,
    data: Any,
    structure: Sequence[dict[str, Any]] = (),
    units: dict[str, list[float]] | None = None,
) -> dict[str, str]:
    """Returns the metadata of a network's weights file, for `litdistill.utils.checkpoint.read_metadata`.

    `classes` and `input_shape` of the training data, and its `data_mean` and `data_std` if it has them; `mean`, `std` and
    `size` of the network's preprocessing if it has one; the `structure` of a compressed network
    (`litdistill.compress.structure.structure_of`); and the `units` of its outputs (`litdistill.tasks.base.Task.units`).
    """
    shape = data.input_shape
    facts: dict[str, Any] = {"classes": list(data.class_names), "input_shape": None if shape is None else list(shape)}
    for key in ("mean", "std"):
        if getattr(data, key, None) is not None:
            facts[f"data_{key}"] = list(getattr(data, key))
    preprocess = preprocess_of(net)
    if preprocess is not None:
        facts |= preprocess.facts()
    if units:
        facts["units"] = units
    if structure:
        facts["structure"] = list(structure)
    return {k: json.dumps(v) for k, v in facts.items()}


def class_order(trained: Sequence[str] | None, names: Sequence[str], source: str | Path, role: str) -> list[int] | None:
    """Returns for each class name of the data its index in `trained`, the names of the weights' classes.

    None where the two are equal, or where either is unknown. Raises `UserError` where they are not the same set of names.
    """
    if not trained or not names or list(trained) == list(names):
        return None
    if set(trained) != set(names) or len(set(trained)) != len(trained) or len(trained) != len(names):
        there, here = ([c for c in a if c not in b] for a, b in ((trained, names), (names, trained)))
        raise UserError(
            f"The {role} in {source} was trained on other classes than these data have: only there {some(there)}, only here "
            f"{some(here)}. Choose data of the same classes (data.classes, or the names of their folders), train a {role} on "
            f"these" + (", or start its classifier anew with student.head=new." if role == "student" else ".")
        )
    return [list(trained).index(name) for name in names]


def with_class_order(net: nn.Module, order: Sequence[int], example: Tensor, role: str) -> nn.Module:
    """Permutes the outputs of `net` in its last layer, in place: the new output i is the old output `order[i]`.

    `example`: a few images (N, C, H, W). Raises `UserError` where the outputs are not those of a single layer.
    """
    with evaluating(net):
        before = net(example)[:, list(order)]
    layers = [m for m in _head(net, example) if isinstance(m, (nn.Linear, nn.Conv2d))]
    if layers:
        with torch.no_grad():
            for parameter in layers[-1].parameters():
                if len(parameter) == len(order):
                    parameter.copy_(parameter[list(order)])
        with evaluating(net):
            if torch.allclose(net(example), before, rtol=1e-4, atol=1e-5 * float(before.abs().max())):
                return net
    raise UserError(
        f"The {role} was trained on these classes in another order, and its outputs cannot be put into another. Give the data "
        "the order of its training (data.classes)."
    )


def _head(net: nn.Module, example: Tensor) -> list[nn.Module]:
    try:
        return list(net.get_submodule(head_of(net, example)).modules())
    except UserError:  # no classifier is found in a traced graph, for example
        return []


def some(names: Sequence[str]) -> str:
    """Returns up to ten names for a message."""
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") or "none"
