"""Reading and writing weights: tensors and plain values only, atomic writes, and errors that name what does not fit."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from litdistill.utils.errors import UserError
from litdistill.utils.files import write_atomically

STUDENT = "student.safetensors"
FILES = (".pth", ".pt", ".ckpt", ".safetensors")  # extensions of files of weights
COUNTER = "num_batches_tracked"  # of a batch normalization: it changes no output, and frozen ones do not count


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints by `write_atomically`.

    Lightning's own writer uses the system's folder for temporary files: where that is on another disk than the run's, the
    final move is a copy, and a kill during the copy leaves a truncated checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)

        write_atomically(path, write)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes one checkpoint file. A checkpoint may hold this path, so folders and other files are never removed.

        Raises `UserError` for a path that does not end in .ckpt or that contains `..`.
        """
        if Path(path).suffix != ".ckpt" or ".." in Path(path).parts:
            raise UserError(
                f"{path} is no checkpoint of this run, and is not removed. A checkpoint that names it was changed."
            )
        if "://" in str(path):
            return super().remove_checkpoint(path)
        if not Path(path).is_dir():
            Path(path).unlink(missing_ok=True)


def save_student(net: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the network's state dict as safetensors with `metadata`; deployment needs no other file.

    Equal weights and metadata give equal bytes.
    """
    state = {k: v.detach().cpu().contiguous().clone() for k, v in net.state_dict().items()}
    content = in_order(save(state, dict(metadata)))

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write)


def in_order(content: bytes) -> bytes:
    """Returns the bytes of a safetensors file with its metadata sorted by name; safetensors writes them in random order."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + content[start:]


def _numbers(found: Any, low: float, high: float, kinds: tuple[type, ...] = (int, float)) -> bool:
    return isinstance(found, list) and all(type(n) in kinds and low <= n <= high for n in found)  # NaN is not


# What the metadata of a network may hold, which can come from anywhere.
METADATA: dict[str, Callable[[Any], bool]] = {
    "classes": lambda found: isinstance(found, list) and all(isinstance(name, str) for name in found),
    "input_shape": lambda found: _numbers(found, 1, 2**20, (int,)),
    "size": lambda found: _numbers(found, 1, 2**14, (int,)) and len(found) == 2,
    **dict.fromkeys(("mean", "data_mean"), lambda found: _numbers(found, -1e300, 1e300)),
    **dict.fromkeys(("std", "data_std"), lambda found: _numbers(found, 0, 1e300)),
    "units": lambda found: (
        isinstance(found, dict) and all(_numbers(found.get(k), -1e300, 1e300) for k in ("mean", "std"))
    ),
}


def read_metadata(source: str | Path, key: str) -> Any:
    """Returns the JSON value under `key` in the metadata of a run folder's student or a `.safetensors` file; None without one.

    For a checkpoint in a run folder, reads the metadata of that run's student. Raises `UserError` for a damaged file.
    """
    path = Path(source)
    if path.is_dir():
        path = path / STUDENT
    elif path.suffix == ".ckpt" and path.resolve().parent.name == "checkpoints":
        path = path.resolve().parent.parent / STUDENT
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get(key, "null"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: the {key} of its network cannot be read. ({error})") from error
    if found is not None and not METADATA.get(key, lambda _: True)(found):
        raise UserError(f"{path} is damaged: the {key} of its network is {str(found)[:100]}.")
    return found


# A number of NumPy, as training loops keep their best accuracy beside the weights: what rebuilds one from its bytes, under both
# names that NumPy gave it, and the types of numbers. No array, and no dtype of Python objects.
_REBUILD: Any = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    *((_REBUILD, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns what `torch.save` wrote to `path`, if it holds only tensors and plain values; no code in it is executed.

    Raises `UserError` for a file that is missing, damaged or holds other Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.{_nearby(path)}")
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read, or is damaged: {error.strerror or error}") from error
    except Exception as error:  # torch raises almost any type for a damaged file, and advises to load it unsafely
        objects = re.search(r"(?:GLOBAL|class|function) ([A-Za-z_][\w.]*)", str(error))
        if not isinstance(error, pickle.UnpicklingError) or objects is None:
            raise UserError(f"{path} is damaged, or no file that torch.save wrote.") from error
        raise UserError(
            f"{path} holds Python objects ({objects[1]}) besides tensors and plain values, and loading them could run any "
            "code: refused. Save the state dict alone (torch.save(net.state_dict(), …), or safetensors) where you trust the "
            "file."
        ) from error


def names_file(weights: str) -> bool:
    """Returns whether weights are named by a file, and not by a published name."""
    return Path(weights).suffix in FILES


def _nearby(path: Path) -> str:
    """Returns a sentence that lists up to four checkpoints in the nearest existing folder above `path`."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    patterns = ("*.ckpt", "*.safetensors", "*/*.ckpt", "*/student.safetensors")
    found = [p for pattern in patterns for p in sorted(folder.glob(pattern), reverse=True)]  # the newest runs first
    return (
        f" Near it: {', '.join(str(p) for p in found[:4])}."
        if found
        else f" There is no checkpoint in {folder} either."
    )


def load_weights(source: str | Path, keys: Collection[str] | None = None) -> dict[str, Tensor]:
    """Returns the state dict of a network from a run folder (its student), a checkpoint of this project, or a weights file.

    `keys`: the keys of the network's own state dict. With them, weights are found in the common wrappings: under a prefix
    of every key (`module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of a LightningModule), and in the one
    inner dict that fits (`model`, `net`, `model_state_dict`, …).
    Accepts `.safetensors` and files of `torch.save`. Raises `UserError` for a file that is missing, damaged or pickled, and
    where several parts of a file fit.
    """
    path = Path(source)
    if path.is_dir():
        path = path / STUDENT
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"There is no {path}. Was the run finished?{_nearby(path)}")
        try:
            loaded: Any = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    else:
        loaded = load_checkpoint(path)
    states = _state_dicts(loaded)
    if not states:
        raise UserError(f"{path} holds no state dict of a network.")
    if keys:
        fitting = {f"{name}{prefix}": part for name, state in states.items() for prefix, part in _fitting(state, keys)}
        for choice in ("", "state_dict.", "state_dict.student."):  # a bare state dict, and the two layouts of Lightning
            if choice in fitting:
                return fitting[choice]
        if len(fitting) > 1:
            raise UserError(
                f"{path} holds the weights of several such networks: {', '.join(fitting)}. Save the one that you mean "
                "alone, as a state dict."
            )
        if fitting:
            return next(iter(fitting.values()))
    return _unprefixed(states, path)


def _state_dicts(loaded: Any, name: str = "", depth: int = 3) -> dict[str, dict[str, Tensor]]:
    """Returns each dict of tensors inside a loaded file, by the path of keys that leads to it: `"model."` or `"state.net."`."""
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(k, str) for k in loaded):
        return {}
    if all(isinstance(v, Tensor) for v in loaded.values()):
        return {name: dict(loaded)}
    inner = {k: v for k, v in loaded.items() if depth and isinstance(v, dict)}
    return {n: s for k, v in inner.items() for n, s in _state_dicts(v, f"{name}{k}.", depth - 1).items()}


def _fitting(state: Mapping[str, Tensor], keys: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields each prefix of `state` under which its keys are `keys`, with that part of the state dict. Counters of batch
    normalization may be missing."""
    first = next(iter(keys))
    for prefix in sorted({k.removesuffix(first) for k in state if k == first or k.endswith(f".{first}")}):
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if part.keys() <= set(keys) and all(k.endswith(COUNTER) for k in set(keys) - part.keys()):
            yield prefix, part


def _unprefixed(states: Mapping[str, dict[str, Tensor]], path: Path) -> dict[str, Tensor]:
    """Returns the weights in a file for which no keys are given or none match. Raises `UserError` where several qualify."""
    state = states.get("", states.get("state_dict."))
    if state is None and len(states) == 1:
        (state,) = states.values()
    if state is None:
        raise UserError(
            f"{path} holds several state dicts, and none of this network: {', '.join(n[:-1] for n in states)}. Save the one "
            "that you mean alone."
        )
    student = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    return student or state


def load_state_dict_checked(net: nn.Module, state: Mapping[str, Tensor], source: str | Path, role: str) -> None:
    """Loads `state` into `net`, strictly but for counters of batch normalization, which may be missing. Raises `UserError` that
    lists missing, unexpected and mismatched keys."""
    own = net.state_dict()
    state = {k: v for k, v in own.items() if k.endswith(COUNTER)} | dict(state)
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    if not (shapes or missing or extra):
        net.load_state_dict(state)
        return
    lines = [f"{len(missing)} missing: {_abbreviate(missing)}"] if missing else []
    lines += [f"{len(extra)} not in this network: {_abbreviate(extra)}"] if extra else []
    lines += [
        f"{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the network" for k in shapes[:4]
    ]
    remedy = f"It is another network: choose the one it was saved from with net@{role}=… and the same options."
    if not missing and not extra and len(shapes) <= 2:
        saved, expected = state[shapes[0]].shape, own[shapes[0]].shape
        if all(state[k].ndim == own[k].ndim and state[k].shape[1:] == own[k].shape[1:] for k in shapes):
            remedy = (
                f"Only the classifier differs: the {role} was trained on {saved[0]} classes, and this data has {expected[0]}. "
                "Train one on these classes, or choose the same data.classes."
            )
        elif len(shapes) == 1 and saved[:1] == expected[:1]:
            remedy = (
                f"Only the first layer differs: the {role} was trained on images of another size, or another number "
                "of channels (gray has 1, RGB 3). Choose the same data.image_size and images of the same kind."
            )
    raise UserError(f"The weights in {source} do not fit the {role}: " + "; ".join(lines) + f". {remedy}")


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
