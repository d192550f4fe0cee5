"""Hashes of weights and of objects, equal in every process."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 in hexadecimal over names, dtypes, shapes and bytes of a state dict's tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def network_sha256(net: nn.Module) -> str:
    """Returns the SHA-256 in hexadecimal of a network: its weights, unsaved buffers, structure and preprocessing."""
    state = net.state_dict()
    state |= {name: buffer for name, buffer in net.named_buffers() if name not in state}  # non-persistent buffers
    facts = [weights_sha256(state), repr(net), stable_repr(net)]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def stable_repr(obj: Any, ancestors: tuple[int, ...] = ()) -> Any:
    """Returns a description of an object in plain values for hashing, equal in every process: numbers and strings by `repr`,
    tensors by a hash of their bytes, functions by name, modules and other objects by type and public attributes.

    `ancestors`: ids of the objects that contain this one; they are not described again inside it.
    """
    if isinstance(obj, (str, int, float, complex, bool, bytes, type(None), Enum, PurePath, torch.dtype)):
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
    if isinstance(obj, (set, frozenset)):
        return sorted((inside(v) for v in obj), key=str)
    if isinstance(obj, functools.partial):
        return [inside(v) for v in (obj.func, obj.args, obj.keywords)]
    if callable(obj) and hasattr(obj, "__qualname__"):
        return f"{obj.__module__}.{obj.__qualname__}"
    # A module's weights are hashed separately, by `weights_sha256`.
    parts = obj.named_modules() if isinstance(obj, nn.Module) else [("", obj)]
    return [(name, f"{type(part).__module__}.{type(part).__qualname__}", inside(_public(part))) for name, part in parts]


def _public(obj: Any) -> dict[str, Any]:
    """Returns an object's public attributes, without the mode flags `training` and `inplace`, sorted by name."""
    own = getattr(obj, "__dict__", {})
    return {k: own[k] for k in sorted(own) if not k.startswith("_") and k not in ("training", "inplace")}


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 in hexadecimal of a file's bytes; "" for one that cannot be read."""
    try:
        state = Path(path).stat()
        return _file_sha256(Path(path), state.st_size, state.st_mtime_ns)
    except OSError:
        return ""


@functools.lru_cache(maxsize=16)
def _file_sha256(path: Path, size: int, time_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(facts: dict[str, Any]) -> str:
    """Returns the first ten hex digits of the SHA-256 of `facts`, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
