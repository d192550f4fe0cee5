"""The preprocessing of a network of a config: of its options, of the metadata of its weights, of its builder, of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from litdistill.models.preprocess import Preprocess, preprocess_of
from litdistill.utils.checkpoint import read_metadata
from litdistill.utils.errors import UserError


def wanted_preprocessing(node: DictConfig, source: str | Path | nn.Module | None, role: str) -> dict[str, Any]:
    """Returns what the config says of mean, std and size, else the metadata of the weights in `source`; no null values."""
    given = OmegaConf.to_container(node["preprocess"], resolve=True) if node.get("preprocess") is not None else {}
    if not isinstance(given, dict) or not given.keys() <= {"mean", "std", "size"}:
        raise UserError(f"{role}.preprocess={given} must be null, or hold mean, std and size.")
    if isinstance(source, nn.Module):
        known = preprocess_of(source)
        facts = known.facts() if known is not None else {}
    elif source is not None:
        facts = {k: read_metadata(source, k) for k in ("mean", "std", "size")}
    else:
        facts = {}
    return {k: v for k, v in (*facts.items(), *given.items()) if v is not None}


def shape_after(wanted: dict[str, Any], data: Any) -> Any:
    """Returns the shape of the data's inputs after the wanted resizing and means."""
    if not wanted or data.input_shape is None:
        return data.input_shape
    default = _of_data(data)
    channels = data.input_shape[0]
    facts = {"mean": [0.0] * channels, "std": [1.0] * channels} | (default.facts() if default is not None else {})
    facts |= wanted
    count = max(len(facts["mean"]), len(facts["std"]))
    mean, std = (list(facts[k]) * count if len(facts[k]) == 1 else facts[k] for k in ("mean", "std"))
    return Preprocess(mean, std, facts.get("size")).input_shape(data.input_shape)


def merged_preprocessing(own: Preprocess | None, wanted: dict[str, Any], data: Any, role: str) -> Preprocess | None:
    """Returns the preprocessing of the wanted values, else those of the network's builder (`own`), else those of the data."""
    default = _of_data(data)
    known = own.facts() if own is not None else default.facts() if default is not None else {}
    facts = known | wanted
    if not facts:
        return None
    if facts.get("mean") is None or facts.get("std") is None:
        raise UserError(f"{role}.preprocess needs mean and std, as these data have none of their own.")
    mean, std = list(facts["mean"]), list(facts["std"])
    if own is not None:  # one value for a network of several channels
        mean, std = (v * len(own.mean) if len(v) == 1 else v for v in (mean, std))
    return Preprocess(mean, std, facts.get("size"))


def _of_data(data: Any) -> Preprocess | None:
    """Returns the preprocessing by the data's mean and standard deviation; None if the data has none."""
    mean, std = getattr(data, "mean", None), getattr(data, "std", None)
    return Preprocess(mean, std) if mean is not None and std is not None else None
