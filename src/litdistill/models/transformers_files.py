"""The folder of a model of transformers: config.json, preprocessor_config.json and safetensors, read and checked."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from litdistill.models.adaptations import Published
from litdistill.models.preprocess import Preprocess
from litdistill.utils.errors import UserError
from litdistill.utils.text import one_line

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.pkl")
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Of how the model was run and stored elsewhere, not of what it is; the first names code.
LEFT_OUT = ("auto_map", "attn_implementation", "transformers_version", "dtype", "torch_dtype")


class Config(NamedTuple):
    """The configuration of a model."""

    name: str  # the folder's, or the type of the model
    values: dict[str, Any]  # as in config.json, with the user's own
    made: Any  # the object of transformers


class Classes(NamedTuple):
    """The classes of a folder's classifier."""

    number: int
    names: tuple[str, ...]  # empty where they are LABEL_0, LABEL_1, …


def folder_of(path: str, hub: bool) -> Path:
    """Returns the folder `path`, or with `hub` that of a model of the Hugging Face Hub, fetched once.

    Raises `UserError` where there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"path={one_line(path)} is a file: name the folder that holds it and {CONFIG}.")
    if not hub:
        raise UserError(
            f"path={one_line(path)}: there is no such folder. To fetch a model of that name from the Hugging Face Hub, add "
            "hub: true to the network."
        )
    client = importlib.import_module("huggingface_hub")
    try:
        found = client.snapshot_download(path, allow_patterns=[CONFIG, PREPROCESSOR, "*.safetensors", WEIGHTS[1]])
    except Exception as error:  # clients raise many kinds of errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"path={one_line(path)} could not be fetched from the Hugging Face Hub ({reason}): is there a network? Or name a "
            "folder."
        ) from error
    return Path(found)


def read_config(folder: Path | None, given: Mapping[str, Any] | None) -> Config:
    """Returns the configuration in `folder` with the values in `given`. Raises `UserError` where it is none of transformers."""
    if folder is None and not given:
        raise UserError("net=transformers needs a folder (path), or a config with model_type and its values.")
    values = _json(folder / CONFIG, folder) if folder is not None else {}
    if "quantization_config" in values:
        raise UserError(
            f"{folder} holds quantized weights ({CONFIG} has quantization_config): take the folder of the float model."
        )
    coded = "auto_map" in values
    # An underscore begins what is private to transformers.
    values = {k: v for k, v in values.items() if k not in LEFT_OUT and not k.startswith("_")} | dict(given or {})
    kind, known = values.get("model_type"), importlib.import_module("transformers").CONFIG_MAPPING
    where = f"{folder / CONFIG}" if folder is not None else "config"
    if kind not in known:
        near = difflib.get_close_matches(str(kind), list(known), 3)
        raise UserError(
            f"{where}: model_type={one_line(kind)} is not known to the installed transformers"
            + (f"; is it {' or '.join(near)}?" if near else ".")
            + (" Code of the folder is not run." if coded else "")
            + " Install a newer transformers, or take another model."
        )
    try:
        made = known[kind].from_dict(values | {"attn_implementation": "eager"})  # others are no ONNX, or fetched code
    except Exception as error:  # each model checks its values in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} is no valid configuration of {kind} ({reason}): correct it.") from error
    return Config(folder.resolve().name if folder is not None else str(kind), values, made)


def check_weights_file(folder: Path) -> None:
    """Raises `UserError` for a folder without safetensors: other files of weights may run code, and are not opened."""
    if any((folder / name).is_file() for name in WEIGHTS):
        return
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in folder.glob(pattern))
    if others:
        raise UserError(
            f"{folder} has {others[0]} and no {WEIGHTS[0]}: a pickle may run code when it is opened, and is not. Write it as "
            "safetensors where you trust it, with transformers' save_pretrained, or fetch the model's safetensors."
        )
    raise UserError(
        f"{folder} has no weights ({WEIGHTS[0]}): copy them there, or start from nothing, pretrained=false."
    )


def classes_of(values: Mapping[str, Any]) -> Classes:
    """Returns the classes that config.json names."""
    labels = values.get("id2label")
    if not isinstance(labels, Mapping) or not labels:
        return Classes(int(values.get("num_labels") or 2), ())
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return Classes(len(names), () if generic else names)


def image_preprocessing(
    folder: Path, config: Any, images: Sequence[int], size: int | Sequence[int] | None
) -> tuple[Preprocess, Published] | None:
    """Returns the preprocessing of preprocessor_config.json for images (C, H, W), and what it says of size, interpolation and
    crop; None without that file.

    `size`: to which images are resized in place of its own. Pixels are multiplied by `rescale_factor` there and are on the
    scale 0 to 1 here, so that mean and std are divided by 255 times that. Raises `UserError` for images of other channels.
    """
    if not (folder / PREPROCESSOR).is_file():
        return None
    facts = _json(folder / PREPROCESSOR, folder)
    channels = int(getattr(config, "num_channels", 3))
    scale = 255 * (float(facts.get("rescale_factor", 1 / 255)) if facts.get("do_rescale", True) else 1.0)
    normalizes = facts.get("do_normalize", True)
    mean, std = (
        _per_channel(facts.get(key, default) if normalizes else default, channels)
        for key, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    resized, cropped = _side(facts.get("size")), _side(facts.get("crop_size"))
    crops = facts.get("do_center_crop", False) and cropped is not None
    own = cropped if crops else resized if facts.get("do_resize", True) else None
    own = own or _side(getattr(config, "image_size", None))
    if images[0] not in (1, channels):
        raise UserError(
            f"The model in {folder} takes images of {channels} channels, and these have {images[0]}: choose data of as "
            "many, or another model."
        )
    share = cropped[0] / resized[0] if crops and cropped and resized else 1.0
    preprocess = Preprocess([m / scale for m in mean], [s / scale for s in std], size or own or tuple(images[1:]))
    how = RESAMPLING.get(facts.get("resample", 2), "other")
    return preprocess, Published(own or tuple(preprocess.size or ()), how, share)  # type: ignore[arg-type]


def _per_channel(value: Any, channels: int) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)]
    return values * channels if len(values) == 1 else values


def _side(size: Any) -> tuple[int, int] | None:
    """Returns height and width of a size as image processors write it: a number, both, or the shortest edge."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _json(path: Path, folder: Path) -> dict[str, Any]:
    """Returns a file of a folder. Raises `UserError` where it is missing or damaged."""
    if not path.is_file():
        have = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "it is empty"
        raise UserError(
            f"{folder} has no {path.name} ({have}): name a folder that transformers' save_pretrained wrote."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it anew.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no mapping. Copy it anew.")
    return found
