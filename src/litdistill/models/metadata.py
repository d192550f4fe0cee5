"""Metadata of weights files: the preprocessing, and the names of the classes of the training data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import nn

from litdistill.models.preprocess import preprocess_of


def student_metadata(
    net: nn.Module,
    data: Any,
    structure: Sequence[dict[str, Any]] = (),
    units: dict[str, list[float]] | None = None,
    outputs: int | None = None,
) -> dict[str, str]:
    """Returns the metadata of a network's weights file, for `litdistill.utils.checkpoint.read_metadata`.

    `classes` and `input_shape` of the training data, and its `data_mean` and `data_std` if it has them; `mean`, `std` and
    `size` of the network's preprocessing if it has one; the `structure` of a compressed network
    (`litdistill.compress.structure.structure_of`); the `units` of its outputs (`litdistill.tasks.base.Task.units`); and the
    number of `outputs` where they are not the classes.
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
    if outputs is not None:
        facts["outputs"] = outputs
    if structure:
        facts["structure"] = list(structure)
    return {k: json.dumps(v) for k, v in facts.items()}
