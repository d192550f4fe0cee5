"""Calls a network on its inputs and converts its result to `Outputs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.types import DETECTIONS, EMBEDDING, Outputs
from litdistill.utils.errors import UserError


def run_network(net: nn.Module, inputs: Any) -> Outputs:
    """Calls `net` on a tensor, a tuple of positional arguments or a mapping of keyword arguments, and returns `Outputs`."""
    if isinstance(inputs, Mapping):
        return to_outputs(net(**inputs))
    return to_outputs(net(*inputs) if isinstance(inputs, (tuple, list)) else net(inputs))


def to_outputs(raw: Any) -> Outputs:
    """Converts a tensor, a tuple that begins with the logits, a mapping, or an object with `logits` to `Outputs`.

    The other tensors of a mapping become heads under their keys: `embedding` that of a network
    without classes. Raises `UserError` for any other type.
    """
    if isinstance(raw, Outputs):
        return raw
    if isinstance(raw, Tensor):
        return Outputs.of(raw)
    if isinstance(raw, Mapping):
        heads = {str(k): v for k, v in raw.items() if isinstance(v, Tensor) and v.ndim > 0}
        if "logits" not in heads and len(heads) == 1 and not heads.keys() & {EMBEDDING, DETECTIONS}:
            heads = {"logits": next(iter(heads.values()))}
        if heads:
            return Outputs(heads)
        kind = f"a mapping with {', '.join(map(str, raw)) or 'nothing'}"
    elif isinstance(logits := getattr(raw, "logits", None), Tensor):
        return Outputs.of(logits)
    elif isinstance(raw, (tuple, list)) and raw and isinstance(raw[0], Tensor):
        return Outputs.of(raw[0])
    else:
        kind = f"a {type(raw).__name__}"
    raise UserError(
        f"The network returns {kind}, without logits. It should return a tensor (N, classes), a tuple that begins with it, or "
        "a dict or an object with logits: wrap it in a module that does."
    )


def first_tensor(inputs: Any) -> Tensor:
    """Returns the first tensor among a network's inputs; its length is the batch size. Raises `UserError` without one."""
    if isinstance(inputs, Tensor):
        return inputs
    for value in (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    ):
        if isinstance(value, (Tensor, Mapping, tuple, list)):
            return first_tensor(value)
    raise UserError(
        f"A batch's inputs should be tensors, alone or in a tuple or a dict, and are {type(inputs).__name__}."
    )


def describe_inputs(inputs: Any) -> str:
    """Returns dtypes and shapes of a network's inputs as JSON; `inputs_like` creates inputs from it."""

    def spec(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype).removeprefix("torch."), list(value.shape)]
        if isinstance(value, Mapping):
            return {str(k): spec(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return {"tuple": [spec(v) for v in value]}
        return None

    return json.dumps(spec(inputs))


def inputs_like(description: str) -> Any:
    """Returns inputs of zeros with the dtypes and shapes of `describe_inputs`. Raises `UserError` for invalid text."""

    def make(spec: Any) -> Any:
        if isinstance(spec, list):
            name, shape = spec
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(name)
            return torch.zeros(shape, dtype=dtype)
        if isinstance(spec, dict):
            return (
                tuple(map(make, spec["tuple"])) if spec.keys() == {"tuple"} else {k: make(v) for k, v in spec.items()}
            )
        return spec

    try:
        return make(json.loads(description))
    except (ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise UserError(f"{description!r} describes no inputs of a network: give an example batch.") from error
