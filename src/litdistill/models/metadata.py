"""What weights carry with them: how their images are preprocessed, and the names of the classes that they were trained on.

Classes are those of the same name, whatever their order in the data that the weights meet.
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
    """The metadata of a network's file of weights, as `litdistill.utils.checkpoint.read_metadata` reads them.

    `classes` and `input_shape` of the data that it was trained on, and their `data_mean` and `data_std` where they have some;
    `mean`, `std` and `size` of its own preprocessing where it has one; its `structure` where it was compressed
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
    """For each of the data's class names its index among those that the weights were `trained` on; None where they are the
    same, or where the weights or the data do not say.

    Raises `UserError` that names the classes which only the one or only the other has.
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
    """The network whose i-th output is what output `order[i]` was, changed in its classifier, in place.

    `example`: a few images (N, C, H, W) that it takes. Raises `UserError` where no one layer gives the outputs.
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
    except UserError:  # which shows no classifier, as a traced graph
        return []


def some(names: Sequence[str]) -> str:
    """A few names for a message."""
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") or "none"
