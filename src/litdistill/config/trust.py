"""Checks that the config of a foreign run folder can execute no code beyond an allowlist of classes and functions.

A run folder is evaluated, exported, reported and resumed, and its config decides which classes are instantiated. A config of
this user's own run is their code. A foreign config is resolved and compared with an exact list of classes and functions; any
other name is refused. `trust=[my_package]` adds packages by name.

In such a config
- no interpolation calls a resolver (`${oc.env:…}`, `${hydra:…}`), which could read the environment or hide a node;
- each `_target_` is written in full, so that merging a recipe cannot change it, and each member of an ensemble is checked
  with the class that it is merged into;
- callbacks and loggers write only inside the run folder, and send nothing elsewhere;
- options that a library's builder takes unchecked are numbers.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import numbers
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from litdistill.config.instantiate import NETWORK_META_KEYS, locate
from litdistill.config.members import merged_member
from litdistill.utils.errors import UserError

PLAIN = re.compile(r"\$\{\.*\w+(\.\w+|\[\d+\])*\}")  # an interpolation of another key
OUTSIDE = re.compile(r"^[/~\\]|(^|[/\\])\.\.([/\\]|$)|::|:/|\$")  # a text that may be a path outside of the run folder
PATH = re.compile(r"[/\\$]|\.\.")
# Packages with functions that can execute arbitrary code, which `trust` may not name.
NEVER = sys.stdlib_module_names | {
    *("builtins", "litdistill", "torch", "torchvision", "torchaudio", "torchmetrics", "timm", "lightning", "hydra"),
    *("lightning_fabric", "lightning_utilities", "pytorch_lightning", "omegaconf", "numpy", "scipy", "sklearn", "PIL"),
    *("pandas", "matplotlib", "yaml", "jinja2", "onnx", "onnxruntime", "onnxscript", "optuna", "sqlalchemy", "alembic"),
    *("fsspec", "joblib", "cloudpickle", "dill", "pickle5", "streaming", "tensorboard", "rich", "pip", "setuptools"),
    *("pkg_resources", "filelock", "safetensors", "huggingface_hub", "transformers", "IPython", "pytest", "antlr4"),
    *("requests", "urllib3", "aiohttp", "boto3", "botocore", "psutil", "sympy", "networkx", "triton", "pexpect", "sh"),
}
LIGHTNING = (
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    *(
        f"lightning.pytorch.callbacks.{name}"
        for name in (
            *("ModelCheckpoint", "EarlyStopping", "LearningRateMonitor", "DeviceStatsMonitor", "Timer", "ModelSummary"),
            *("RichModelSummary", "RichProgressBar", "TQDMProgressBar", "GradientAccumulationScheduler"),
            *("EMAWeightAveraging", "StochasticWeightAveraging"),
        )
    ),
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.CSVLogger",
)
DATA = (
    *("augment.Crop", "augment.Flip", "augment.Cutout", "randaugment.RandAugment", "mixing.Mixup", "mixing.CutMix"),
    *("crops.RandomResizedCrop", "crops.RandomErasing", "colors.ColorJitter"),
    *(f"sound_views.{name}" for name in ("TimeShift", "TimeMask", "FrequencyMask", "Gain", "Noise")),
)
TENSORS = (
    *(f"tables.{name}" for name in ("breast_cancer", "wine", "diabetes", "multilabel")),
    "own_table.table",
    "text.sets.movie_reviews",
    "text.sets.texts",
    "sound.sounds",
    "sound.spoken_digits",
    "text.sequences.docstrings",
    "text.sequences.token_sequences",
)  # functions that return a `TensorData`
TASKS = ("Classification", "Detection", "Embedding", "LanguageModel", "MultiLabel", "Regression", "Segmentation")
OWN = (
    "litdistill.data.datamodule.ImageData",
    *(f"litdistill.data.{name}" for name in TENSORS),
    "litdistill.tasks.segmentation.data.digit_masks",
    "litdistill.tasks.segmentation.data.masks",
    *(f"litdistill.tasks.detection.{n}" for n in ("scenes.digit_scenes", "bccd.bccd", "coco.coco", "voc.voc")),
    *(f"litdistill.data.{name}" for name in DATA),
    *(f"litdistill.compress.{name}" for name in ("low_rank.low_rank", "prune.prune", "quantize.int8")),
    *(f"litdistill.tasks.{name}" for name in TASKS),
    *(
        f"litdistill.tasks.detection.{name}"
        for name in ("crosskd.CrossKD", "dense_kd.DenseKD", "fgd.FGD", "ld.LD", "pseudo_boxes.PseudoBoxes")
    ),
    "litdistill.distillation.balance.Balance",
    "litdistill.distillation.uncertainty.Uncertainty",
    "litdistill.distillation.schedules.warmup_cosine",
    "litdistill.distillation.schedules.MomentumRamp",
    "litdistill.training.callbacks.ClassBias",
    "litdistill.training.tensorboard.TensorBoard",
    "litdistill.distillation.sharding.ShardedTeacher",
)
FOLDERS = ("dirpath", "save_dir", "default_root_dir")  # options of Lightning's classes that are output folders
NOT_GIVEN = ("plugins", "model_registry", "profiler")  # may load code or send weights; a profiler may be a plain name
SWITCHES = ("_partial_", "_recursive_", "_convert_")
BUILDERS = (
    "lightning.",
    "torchvision.",
    "litdistill.models.",
    "litdistill.tasks.detection.backbones.",
    "litdistill.tasks.detection.fcos.",
    "litdistill.tasks.detection.torchvision.",
    "litdistill.distillation.sharding.",
    "litdistill.training.tensorboard.",
)  # pass options on to libraries
# Options of networks that may be texts: names that the library itself looks up.
NAMES = {
    "name": re.compile(r"[\w.-]*"),
    "weights": re.compile(r"\w+(\.\w+)?"),
    "pretrained": re.compile(r"(?!)"),
    "global_pool": re.compile(r"\w*"),
}


# -- the allowlist ------------------------------------------------------------------------------------------------------


@functools.cache
def allowed() -> frozenset[str]:
    """Returns the dotted paths of all classes and functions that a foreign config may name."""
    import torch
    import torchvision

    rates = torch.optim.lr_scheduler
    optimizers = _classes(torch.optim, torch.optim.__all__, torch.optim.Optimizer)
    schedulers = _classes(rates, rates.__all__, rates.LRScheduler)
    zoo = torchvision.models.list_models(module=torchvision.models)
    networks = (
        f"torchvision.models.{name}" for name in zoo if inspect.isfunction(getattr(torchvision.models, name, None))
    )
    return frozenset((*LIGHTNING, *OWN, *_own_networks(), *_own_methods(), *optimizers, *schedulers, *networks))


def _classes(module: Any, names: Iterable[str], base: type) -> Iterator[str]:
    for name in names:
        found = getattr(module, name, None)
        if inspect.isclass(found) and issubclass(found, base) and found is not base:
            yield f"{module.__name__}.{name}"


def _own(package: str) -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and the object of each public definition in the modules of a package of this project."""
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        for name, found in vars(importlib.import_module(info.name)).items():
            if not name.startswith("_") and getattr(found, "__module__", None) == info.name:
                yield f"{info.name}.{name}", found


def _own_networks() -> Iterator[str]:
    for path, found in (*_own("litdistill.models"), *_own("litdistill.tasks.detection")):
        takes = list(inspect.signature(found).parameters) if inspect.isfunction(found) else []
        if takes[:2] == ["num_classes", "input_shape"]:
            yield path


def _own_methods() -> Iterator[str]:
    import litdistill.methods
    from litdistill.methods.base import Method

    short = ((f"litdistill.methods.{name}", getattr(litdistill.methods, name)) for name in litdistill.methods.__all__)
    for path, found in (*_own("litdistill.methods"), *short):
        if inspect.isclass(found) and issubclass(found, Method) and found is not Method:
            yield path


def packages(trust: Any) -> tuple[str, ...]:
    """Returns the package names in `trust`. Raises `UserError` if it is not a list of names, or names one of `NEVER`."""
    names = OmegaConf.to_container(trust) if OmegaConf.is_config(trust) else trust
    names = [] if names is None else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n.isidentifier() for n in names):
        raise UserError(f"trust={trust}: give a list of names of packages, trust=[my_package].")
    for name in names:
        if name in NEVER or name.startswith("_"):
            raise UserError(
                f"trust=[{name}]: {name} offers functions that run whatever they are told. Trust a package that holds "
                "the classes of such runs alone, trust=[my_package]."
            )
    return tuple(names)


def check_trusted(cfg: DictConfig, folder: str | Path, trust: Any = ()) -> None:
    """Raises a `UserError` that names the key if a foreign config names or does anything outside of the allowlist.

    `folder`: the run folder, inside which callbacks and loggers may write. `trust`: packages that the config may name too.
    """
    trusted = packages(trust)
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    place = raw.pop("folder", "")
    # conf/train.yaml sets the folder to this interpolation.
    if place != "${hydra:runtime.output_dir}" and (not isinstance(place, str) or "$" in place):
        raise refusal("folder", place, folder, "It is a path")
    for key, value in _leaves(raw):
        if not isinstance(value, (str, int, float, type(None), dict, list)):  # YAML makes paths and bytes too
            raise refusal(key, value, folder, "A value is a number or a text")
        if isinstance(value, str) and "${" in PLAIN.sub("", value):
            raise refusal(key, value, folder, "An interpolation may name another key, and nothing else")
        if key.rpartition(".")[2] == "_target_" and (not isinstance(value, str) or "$" in value):
            raise refusal(key, value, folder, "A class is named in full, by no interpolation")
    for key, node in _nodes(raw):
        if any("_target_" in str(k) and k != "_target_" for k in node):
            raise refusal(key, list(node), folder, "A key that holds _target_ in its name is none of this project's")
        if "_target_" in node:
            _check_target(f"{key}._target_".lstrip("."), node["_target_"], folder, trusted)
    plain = OmegaConf.create({**raw, "folder": str(folder)})
    try:
        values = OmegaConf.to_container(plain, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{folder}: its config cannot be resolved, and so not be checked: {error}") from error
    for key, value in _leaves(values):
        if isinstance(value, str) and "${" in value:
            raise refusal(key, value, folder, "An interpolation may not make another")
    for key, node in _nodes(values):
        if "_target_" in node:
            _check_target(f"{key}._target_".lstrip("."), node["_target_"], folder, trusted)
            _check_options(key, node, Path(folder))
        for place, member in _members(key, node):
            _check_options(place, member, Path(folder))


def refusal(key: str, value: Any, folder: str | Path, why: str) -> UserError:
    return UserError(
        f"{key}: {value} is refused. {why}, in a run that was not made here, or was changed since: {folder}."
    )


def _check_target(key: str, target: Any, folder: str | Path, trusted: Sequence[str]) -> None:
    if isinstance(target, str) and target in allowed():
        return
    top = str(target).split(".")[0]
    if isinstance(target, str) and top in trusted and _of_package(target, top):
        return
    remedy = f" If {top} is a package of yours or of somebody you trust, add trust=[{top}]."
    if top in NEVER or not top.isidentifier():
        remedy = ""
    raise UserError(
        f"{key}: {target} is refused. {folder} was not made here, or was changed since: its config can name this project's "
        f"data, networks, methods and callbacks, torch's optimizers and schedulers, and Lightning's trainer.{remedy}"
    )


def _of_package(target: str, package: str) -> bool:
    """Returns whether `target` is a class or function defined in `package`, public, and an attribute of a module."""
    if any(part.startswith("_") for part in target.split(".")):
        return False
    found, holder = locate(target), locate(target.rpartition(".")[0])
    defined = inspect.isclass(found) or inspect.isfunction(found)
    return defined and inspect.ismodule(holder) and str(found.__module__).split(".")[0] == package


def _check_options(key: str, node: dict[str, Any], folder: Path) -> None:
    """Raises `UserError` for options by which an allowed class could write elsewhere, send data, or load a file."""
    target = str(node["_target_"])
    options = {str(k): v for k, v in node.items() if k not in ("_target_", "_args_", *SWITCHES)}
    if target.startswith(("litdistill.models.", "torchvision.")):
        options = {k: v for k, v in options.items() if k not in NETWORK_META_KEYS}
    if any(isinstance(v, str) for _, v in _leaves(node.get("_args_"))):
        raise refusal(f"{key}._args_", node["_args_"], folder, "Options that are text are given by name")
    for name, value in options.items():
        place = f"{key}.{name}".lstrip(".")
        if target.startswith(("lightning.", "litdistill.training.tensorboard.")):
            _check_places(place, name, value, folder)
            if name in NOT_GIVEN and not (value is None or (name == "profiler" and isinstance(value, str))):
                raise refusal(place, value, folder, "It could load code, or send weights away")
        elif target.startswith(BUILDERS) and any(isinstance(v, str) and PATH.search(v) for _, v in _leaves(value)):
            raise refusal(
                place, value, folder, "A network takes no path, and some texts are part of the name of its folder"
            )
        if target.startswith(BUILDERS):
            _check_handed_on(place, name, value, inspect.signature(locate(target)).parameters, folder)


def _check_handed_on(key: str, name: str, value: Any, takes: Mapping[str, inspect.Parameter], folder: Path) -> None:
    """Raises `UserError` for a non-numeric option outside of the signature, which a builder passes on to its library.

    Such options include timm's `pretrained_cfg_overlay` and `checkpoint_path`.
    """
    if name in NAMES:
        if not (_numeric(value) or (isinstance(value, str) and NAMES[name].fullmatch(value))):
            raise refusal(key, value, folder, "It is a name of the library's own, and no path")
    elif (name not in takes or takes[name].kind is inspect.Parameter.VAR_KEYWORD) and not _numeric(value):
        raise refusal(key, value, folder, "What is handed on to a library unchecked must be a number")


def _check_places(key: str, name: str, value: Any, folder: Path) -> None:
    root = folder.resolve()
    for _, text in _leaves(value):
        if not isinstance(text, str):
            continue
        inside = "://" not in text and "$" not in text and "~" not in text and Path(text).resolve().is_relative_to(root)
        if not inside and (name in FOLDERS or OUTSIDE.search(text)):
            raise refusal(key, text, folder, "Callbacks and loggers write inside the run's folder")


def _members(key: str, node: dict[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the key and node of each network in a node's `ensemble`, with its diff merged in, which names the class."""
    diffs = node.get("ensemble")
    if not isinstance(diffs, list):
        return
    for i, diff in enumerate(diffs):
        merged = OmegaConf.to_container(merged_member(node, diff if isinstance(diff, dict) else {}))
        for place, member in _nodes(merged, f"{key}.ensemble.{i}".lstrip(".")):
            if "_target_" in member:
                yield place, member
            yield from _members(place, member)


def _numeric(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_numeric, value))
    return value is None or isinstance(value, numbers.Number)


def _nodes(node: Any, key: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yields all dicts in plain values with their dotted keys."""
    if isinstance(node, dict):
        yield key, node
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _nodes(value, f"{key}.{name}".lstrip("."))


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all values in plain values that are neither dict nor list, with their dotted keys."""
    if not isinstance(node, (dict, list)):
        yield key, node
        return
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from _leaves(value, f"{key}.{name}".lstrip("."))
