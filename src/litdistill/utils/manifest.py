"""`manifest.json`: metadata and SHA-256 of each exported file, checked before the file is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from litdistill.utils.errors import UserError
from litdistill.utils.modality import KINDS
from litdistill.utils.text import CONTROL_CHARACTERS

MANIFEST = "manifest.json"

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors", "torchscript": ".pt"}

# The named outputs of a file by the kind of its outputs (`ExportMetadata.kind`); of any other kind it is `logits`. In ONNX
# names are given once, and a lookup of tokens is a node called embedding.
BOXES, MASK = "boxes", "mask"
OUTPUT_NAMES = {"embedding": ("embeddings",), BOXES: ("boxes", "scores", "labels"), MASK: ("mask",)}

MISSING = "{} is not installed. Install what exported files need with pip install 'litdistill[export]'."


class ExportMetadata(NamedTuple):
    """Checked metadata of an exported file: all that is needed to run it."""

    format: str
    preprocessing: bool  # whether the file contains the normalization and takes uint8
    classes: list[str]  # the name of each output
    mean: list[float]  # per channel on the scale 0 to 1; empty for a network without normalization
    std: list[float]
    size: list[int] | None  # height and width to which images are resized; None: they are taken as they are
    input_shape: list[int]  # of the inputs before that: (C, H, W) of images, (F,) of a table's rows
    net: dict[str, Any]  # safetensors: the function of litdistill.models that builds the network, and its options
    kind: str = "categorical"  # how outputs are read (`litdistill.tasks.base.Task.output_kind`)
    # The kind of data and its options (`litdistill.utils.modality`), and the digests of its `files`.
    modality: Mapping[str, Any] = MappingProxyType({"kind": "image", "files": {}})
    # "real": output · std + mean is in the targets' units, one of each for every output.
    units: dict[str, Any] | None = None


def verified(path: Path) -> tuple[bytes, ExportMetadata]:
    """Returns the bytes of an exported file and its metadata. Raises `UserError` where they differ from the manifest."""
    manifest = path.parent / MANIFEST
    if not path.is_file():
        raise UserError(f"There is no {path}. Write it with litdistill export run=<run folder>.")
    if not manifest.is_file():
        raise UserError(f"There is no {manifest}: copy {MANIFEST} from where {path.name} was exported to beside it.")
    entry = read_manifest(manifest).get(path.name)
    if not isinstance(entry, dict):
        raise UserError(f"{manifest} has no entry for {path.name}: export it again.")
    content = path.read_bytes()  # read once, so that the bytes that are hashed are those that are opened
    if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise UserError(
            f"{path} is not the file that was exported: its SHA-256 differs from the one in {manifest}. "
            "Fetch both files anew, or export the run again."
        )
    return content, check_facts(entry, path)


def read_manifest(manifest: Path) -> dict[str, Any]:
    """Returns the entries of a manifest by file name. Raises `UserError` for a damaged one."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(f"{manifest} is damaged: export again. ({type(error).__name__})") from error
    if not isinstance(files, dict):
        raise UserError(f"{manifest} is damaged: export again.")
    return files


def check_facts(entry: Mapping[str, Any], path: Path) -> ExportMetadata:
    """Returns a manifest entry as `ExportMetadata`. Raises `UserError` for values that no network can have."""
    stated: dict[str, Any] = {name: entry.get(name) for name in ExportMetadata._fields}
    facts = ExportMetadata(**(stated | {"net": entry.get("net", {})}))

    def numbers(value: Any, low: float, high: float, kinds: tuple[type, ...]) -> bool:
        return isinstance(value, list) and all(
            type(v) in kinds and low <= v <= high for v in value
        )  # NaN fails the comparison

    right = {
        "format": isinstance(facts.format, str) and SUFFIXES.get(facts.format) == path.suffix,
        "preprocessing": isinstance(facts.preprocessing, bool),
        "classes": isinstance(facts.classes, list)
        and 1 <= len(facts.classes) <= 100_000
        and all(isinstance(c, str) for c in facts.classes)
        and not unfit_names(facts.classes),
        "input_shape": numbers(facts.input_shape, 1, 10_000_000, (int,)) and 1 <= len(facts.input_shape) <= 3,
        "size": facts.size is None or (numbers(facts.size, 1, 4096, (int,)) and len(facts.size) == 2),
        "mean": numbers(facts.mean, -1e6, 1e6, (int, float)),
        "std": numbers(facts.std, 1e-6, 1e6, (int, float)),
        "net": isinstance(facts.net, dict),
        "kind": facts.kind in ("categorical", "bernoulli", "real", *OUTPUT_NAMES),
        "modality": isinstance(facts.modality, Mapping)
        and facts.modality.get("kind") in KINDS
        and isinstance(facts.modality.get("files"), dict)
        and all(Path(name).name == name for name in facts.modality["files"]),
    }
    if facts.units is not None:
        mean, std = (facts.units.get(k) if isinstance(facts.units, dict) else None for k in ("mean", "std"))
        right["units"] = (
            numbers(mean, -1e300, 1e300, (int, float))
            and numbers(std, 0, 1e300, (int, float))
            and isinstance(facts.classes, list)
            and len(mean) == len(std) == len(facts.classes)  # type: ignore[arg-type]
        )
    wrong = [name for name, fine in right.items() if not fine]
    if not wrong and facts.mean + facts.std:
        channels, *sides = facts.input_shape
        right_channels = len(facts.mean) == len(facts.std) and channels in (1, len(facts.mean))
        table = not sides and channels == len(facts.mean)
        if not right_channels or not (table or (len(sides) == 2 and max(facts.input_shape) <= 4096)):
            wrong = ["mean", "std", "input_shape"]
    if wrong:
        raise UserError(f"The entry of {path.name} in {MANIFEST} is invalid ({', '.join(wrong)}): export it again.")
    return facts


def companion(folder: Path, facts: ExportMetadata, name: str) -> bytes:
    """Returns the content of a file that lies beside an exported one, such as a tokenizer's, by its name.

    Raises `UserError` where it is missing or differs from the one that was exported.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(
            f"There is no {path}, which reading inputs needs: copy {name} from where the student was exported."
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != facts.modality["files"].get(name):
        raise UserError(f"{path} is not the file that was exported with the student: fetch it anew, or export again.")
    return content


def unfit_names(classes: Sequence[str]) -> list[str]:
    """Returns the class names that no exported file may hold: over 200 characters, or with control characters."""
    return [name for name in classes if len(name) > 200 or CONTROL_CHARACTERS.search(name)]


def check_names(classes: Sequence[str]) -> None:
    """Raises `UserError` for a class name that no exported file may hold."""
    if unfit := unfit_names(classes):
        raise UserError(
            f"The class {unfit[0]!r} cannot be exported: its name is longer than 200 characters or has one that controls a "
            "terminal. Rename its folder, and train again."
        )


def check_int8(classes: Sequence[str]) -> None:
    """Raises `UserError` where an int8 student of these classes could not be exported: a class name or a missing package."""
    check_names(classes)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"An int8 student is shipped as ONNX: {MISSING.format(package)}")
