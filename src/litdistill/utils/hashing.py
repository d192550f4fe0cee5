"""Hashes of weights and of objects, equal in every process."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def stable_repr(thing: Any, above: tuple[int, ...] = ()) -> Any:
    """The plain values in an object, for a hash that is the same in another process: numbers and words as they are, tensors by
    their bytes, functions by name, modules and whatever else by type and public attributes.

    `above`: the objects that this one lies in, which are not described again inside it.
    """
    if isinstance(thing, (str, int, float, complex, bool, bytes, type(None))):
        return repr(thing)
    if isinstance(thing, Tensor):
        return weights_sha256({"": thing})
    if id(thing) in above:
        return "above"
    inside = functools.partial(stable_repr, above=(*above, id(thing)))
    if isinstance(thing, Mapping):
        return [(str(k), inside(v)) for k, v in thing.items()]
    if isinstance(thing, (list, tuple)):
        return [inside(v) for v in thing]
    if isinstance(thing, functools.partial):
        return [inside(v) for v in (thing.func, thing.args, thing.keywords)]
    if callable(thing) and hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    # Of a module the weights have a hash of their own.
    parts = thing.named_modules() if isinstance(thing, nn.Module) else [("", thing)]
    return [(name, f"{type(part).__module__}.{type(part).__qualname__}", inside(_public(part))) for name, part in parts]


def _public(thing: Any) -> dict[str, Any]:
    own = getattr(thing, "__dict__", {})
    return {k: own[k] for k in sorted(own) if not k.startswith("_") and k != "training"}


def digest(facts: dict[str, Any]) -> str:
    """Ten hex digits of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
