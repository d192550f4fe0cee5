"""Classes by name: which output of a network stands for which class of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.models.ensemble import UNKNOWN
from litdistill.models.finetune import head_of
from litdistill.models.parts import evaluating
from litdistill.utils.errors import UserError

FEWEST = 2  # classes of the data that a teacher must know: of one alone it says nothing


def class_columns(
    trained: Sequence[str] | None, names: Sequence[str], source: str | Path, role: str
) -> list[int] | None:
    """Returns for each class name of the data its index in `trained`, the names of the weights' classes.

    None where the two are equal, or where either is unknown. A teacher may know more classes than the data have, which are
    left out, and fewer, whose index is `UNKNOWN`; a student has the same.

    Raises `UserError` for a student of other classes, for a teacher that knows fewer than two of the data's, and for names
    that are equal but for upper and lower case.
    """
    if not trained or not names or list(trained) == list(names):
        return None
    there, here = ([c for c in a if c not in b] for a, b in ((trained, names), (names, trained)))
    alike = [(a, b) for a in there for b in here if a.casefold() == b.casefold()]
    if alike:
        raise UserError(
            f"The {role} in {source} knows {some([a for a, _ in alike])}, and these data have {some([b for _, b in alike])}: "
            "names of classes are compared with their upper and lower case. Rename the data's as they are there, if they are "
            "the same."
        )
    twice = len(set(trained)) != len(trained)
    known = len(names) - len(here)
    if twice or (known < FEWEST if role == "teacher" else there or here):
        raise UserError(
            f"The {role} in {source} was trained on other classes than these data have: only there {some(there)}, only here "
            f"{some(here)}. Choose data of the same classes (data.classes, or the names of their folders), train a {role} on "
            f"these" + (", or start its classifier anew with student.head=new." if role == "student" else ".")
        )
    place = {name: i for i, name in enumerate(trained)}
    return [place.get(name, UNKNOWN) for name in names]


def published_columns(
    trained: Sequence[str], names: Sequence[str], node: Mapping[str, Any], role: str
) -> list[int] | None:
    """Returns `class_columns` of the classes that published weights bring. Raises `UserError` for a student of others."""
    if role == "student" and set(trained) != set(names):
        raise UserError(
            f"The student's weights know {some([c for c in trained if c not in names])}, which these data do not have, and not "
            f"{some([c for c in names if c not in trained])}, which they do: start its classifier anew, student.classifier=new."
        )
    return class_columns(trained, names, str(node.get("path") or node.get("name")), role)


def describe_columns(columns: Sequence[int], trained: Sequence[str], names: Sequence[str], who: str) -> str:
    """Returns in a sentence how the classes of a network's weights fit those of the data. `who`: what it is called."""
    left = [c for c in trained if c not in names]
    missing = [c for c in names if c not in trained]
    said = f"{who} knows {len(columns) - len(missing)} of the data's {len(names)} classes"
    if not missing and not left:
        return f"{who}'s classes are those of the data in another order: its outputs are put into the data's."
    if missing:
        said += f", and not {some(missing)}: of these it says nothing"
    if left:
        said += f"; its outputs for {some(left)}, which the data do not have, are left out"
    return f"{said}."


def with_columns(net: nn.Module, columns: Sequence[int], example: Tensor) -> bool:
    """Selects outputs of `net` in its last layer, in place: the new output i is the old output `columns[i]`.

    `example`: a few images (N, C, H, W). Returns whether it could: the outputs must be those of a single layer, and `columns`
    know all classes; where not, `net` is unchanged. A network that has `keep_classes(columns)` does it itself.
    """
    if callable(own := getattr(net, "keep_classes", None)):
        own(list(columns))
        return True
    if UNKNOWN in columns:
        return False
    with evaluating(net):
        before = net(example)
    layers = [m for m in _head(net, example) if isinstance(m, (nn.Linear, nn.Conv2d))]
    if not layers or not isinstance(before, Tensor):
        return False
    layer, count = layers[-1], before.shape[1]
    kept = dict(layer.named_parameters(recurse=False))
    if any(len(p) != count for p in kept.values()):
        return False
    for name, p in kept.items():
        setattr(layer, name, nn.Parameter(p.detach()[list(columns)].clone(), p.requires_grad))
    _count_outputs(layer, len(columns))
    with evaluating(net):
        after, expected = net(example), before[:, list(columns)]
    if after.shape == expected.shape and torch.allclose(
        after, expected, rtol=1e-4, atol=1e-5 * float(before.abs().max())
    ):
        return True
    for name, p in kept.items():
        setattr(layer, name, p)
    _count_outputs(layer, count)
    return False


def _count_outputs(layer: nn.Module, count: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features = count
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels = count


def _head(net: nn.Module, example: Tensor) -> list[nn.Module]:
    try:
        return list(net.get_submodule(head_of(net, example)).modules())
    except UserError:  # no classifier is found in a traced graph, for example
        return []


def some(names: Sequence[str]) -> str:
    """Returns up to ten names for a message."""
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "") or "none"
