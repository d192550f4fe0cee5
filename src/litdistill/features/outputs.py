"""How any network is called on any inputs, and how whatever it gives becomes `Outputs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.types import Outputs
from litdistill.utils.errors import UserError


def run_network(net: nn.Module, inputs: Any) -> Outputs:
    """Calls `net` on a tensor, on a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return to_outputs(net(**inputs))
    return to_outputs(net(*inputs) if isinstance(inputs, (tuple, list)) else net(inputs))


def to_outputs(raw: Any) -> Outputs:
    """`Outputs` of a tensor, of a tuple that begins with the logits, of a mapping or of an object that have `logits`.

    Further tensors of a mapping are heads of their names. Raises `UserError` that says what a network should give.
    """
    if isinstance(raw, Outputs):
        return raw
    if isinstance(raw, Tensor):
        return Outputs.of(raw)
    if isinstance(raw, Mapping):
        heads = {str(k): v for k, v in raw.items() if isinstance(v, Tensor) and v.ndim > 0}
        if "logits" not in heads and len(heads) == 1:
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
        f"The network gives {kind}, in which no logits are to be found. It should give a tensor (N, classes), a tuple that "
        "begins with it, or a dict or an object with logits: wrap it in a module that does."
    )


def first_tensor(inputs: Any) -> Tensor:
    """The first tensor among the inputs of a network: its length is the number of samples, its device theirs."""
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
    """Types and shapes of a network's inputs as JSON, from which `inputs_like` makes some of the same."""

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
    """Inputs of zeros of the types and shapes that `describe_inputs` wrote down. Raises `UserError` for another text."""

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
