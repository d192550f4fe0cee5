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


def network_sha256(net: nn.Module) -> str:
    """SHA-256 over all that decides what a network gives: its weights, its structure and its preprocessing."""
    state = net.state_dict()
    state |= {name: buffer for name, buffer in net.named_buffers() if name not in state}  # those that are not saved
    facts = [weights_sha256(state), repr(net), stable_repr(net)]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def stable_repr(obj: Any, ancestors: tuple[int, ...] = ()) -> Any:
    """The plain values in an object, for a hash that is the same in another process: numbers and words as they are, tensors by
    their bytes, functions by name, modules and whatever else by type and public attributes.

    `ancestors`: the objects that this one lies in, which are not described again inside it.
    """
    if isinstance(obj, (str, int, float, complex, bool, bytes, type(None))):
        return repr(obj)
    if isinstance(obj, Tensor):
        return weights_sha256({"": obj})
    if id(obj) in ancestors:
        return "ancestor"
    inside = functools.partial(stable_repr, ancestors=(*ancestors, id(obj)))
    if isinstance(obj, Mapping):
        return [(str(k), inside(v)) for k, v in obj.items()]
    if isinstance(obj, (list, tuple)):
        return [inside(v) for v in obj]
    if isinstance(obj, functools.partial):
        return [inside(v) for v in (obj.func, obj.args, obj.keywords)]
    if callable(obj) and hasattr(obj, "__qualname__"):
        return f"{obj.__module__}.{obj.__qualname__}"
    # Of a module the weights have a hash of their own.
    parts = obj.named_modules() if isinstance(obj, nn.Module) else [("", obj)]
    return [(name, f"{type(part).__module__}.{type(part).__qualname__}", inside(_public(part))) for name, part in parts]


def _public(obj: Any) -> dict[str, Any]:
    """The attributes that decide what an object does."""
    own = getattr(obj, "__dict__", {})
    return {k: own[k] for k in sorted(own) if not k.startswith("_") and k not in ("training", "inplace")}


def digest(facts: dict[str, Any]) -> str:
    """Ten hex digits of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
