"""Configs and folders of the runs that train a teacher or a starting point; folders are named by a hash of the recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from litdistill.config.instantiate import NETWORK_META_KEYS
from litdistill.config.origin import PLACES
from litdistill.data.labels import labels_file
from litdistill.data.listing import contents_digest
from litdistill.distillation.boosting import FOLDS
from litdistill.utils.checkpoint import STUDENT
from litdistill.utils.hashing import digest, file_sha256

# Keys of a config that decide the final weights of a run; their hash identifies a teacher.
RECIPE = (
    *("data", "student", "compress", "teacher", "task", "method", "optimizer", "scheduler", "schedule", "ema", "seed"),
    *("trainer", "min_steps", "balance", "adversarial", "method_lr"),
)
NO_RECIPE = {  # options of these that change only paths and speed
    "teacher": ("cache",),
    "data": ("root", "download", "eval_batch_size", "resident", "memory_gb", "workers"),
    "trainer": (
        "accelerator",
        "devices",
        "num_nodes",
        "log_every_n_steps",
        "enable_model_summary",
        "enable_progress_bar",
    ),
}


# Data whose files are the user's, and the options that name them.
OWN_FILES = {
    **dict.fromkeys(("folder", "shards", "sounds"), ("root",)),
    **dict.fromkeys(("table", "token_sequences"), ("root", "test")),
    "texts": ("root", "test", "validation", "unlabelled"),
    **dict.fromkeys(("coco", "voc", "masks"), ("root",)),
}
# Extensions of files beside pictures that say what these show.
ANNOTATIONS = {"coco": (".json",), "voc": (".xml", ".txt")}
OWN_CALLBACKS = ("best", "last", "learning_rate")  # those of conf/callbacks, which do not change the weights


def teacher_config(cfg: DictConfig) -> DictConfig:
    """Returns the config of the run that trains the teacher of `cfg`: teacher as student, labels only, then its recipe."""
    recipe: Any = OmegaConf.to_container(cfg.teacher.recipe, resolve=False) if cfg.teacher.get("recipe") else {}
    teacher = cfg.copy()
    with open_dict(teacher):
        teacher.student = {k: v for k, v in cfg.teacher.items() if k not in NETWORK_META_KEYS}
        teacher.student.checkpoint, teacher.student.preprocess = None, cfg.teacher.get("preprocess")
        teacher.compress = teacher.technique = None
        # It is trained on labels alone. Of texts the others stay in the data, of which a tokenizer may be made.
        if "only_labelled" in teacher.data:
            teacher.data.only_labelled = True
        else:
            for key in {"unlabelled", "labelled"} & teacher.data.keys():
                teacher.data[key] = None
        _drop_callbacks(teacher)
        if cfg.teacher.get("generations", 1) > 1:  # born-again: a teacher distilled from a teacher like it
            teacher.teacher.generations -= 1
            teacher.teacher.recipe = {**recipe, "seed": recipe.get("seed", cfg.seed) + 1}  # other initial weights
        else:
            teacher.teacher = None
            teacher.method = {"_target_": "litdistill.methods.Supervised"}
            teacher.balance = teacher.adversarial = teacher.method_lr = None
        teacher.schedule, teacher.ema, teacher.resume = {}, None, None
        _drop_replaced(teacher, recipe, ("optimizer", "scheduler"))
    return _by_recipe(teacher, _fitting(recipe, cfg), "teachers")


def student_config(cfg: DictConfig) -> DictConfig:
    """Returns the config of the run that `student.checkpoint: auto` refers to: `cfg` without a checkpoint, then its recipe."""
    recipe: Any = OmegaConf.to_container(cfg.student.recipe, resolve=False) if cfg.student.get("recipe") else {}
    source = cfg.copy()
    with open_dict(source):
        for key in ("checkpoint", "head", "trainable", "recipe"):
            source.student[key] = None
        source.compress = source.technique = source.resume = None
        _drop_callbacks(source)
        _drop_replaced(source, recipe, ("task", "teacher", "method", "optimizer", "scheduler"))
    return _by_recipe(source, _fitting(recipe, cfg), "students")


def _drop_replaced(cfg: DictConfig, recipe: dict[str, Any], keys: Sequence[str]) -> None:
    """Removes the nodes of which a recipe names another class and its options: options of the old class do not apply."""
    for key in keys:
        own, whole = cfg.get(key), recipe.get(key) or {}
        if own is not None and {"_target_"} < whole.keys() and whole["_target_"] != own.get("_target_"):
            cfg[key] = None


def _by_recipe(cfg: DictConfig, recipe: dict[str, Any], name: str) -> DictConfig:
    """Returns `cfg` with a recipe merged in, and `name` as its name; the recipe's keys of `PLACES` are ignored."""
    with open_dict(cfg):
        merged = OmegaConf.merge(cfg, {k: v for k, v in recipe.items() if k not in PLACES})
        merged.name = name
    assert isinstance(merged, DictConfig)
    return merged


def _fitting(recipe: dict[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """Returns the recipe without those nulls in its `data` that are no option of the config's data."""
    data = {k: v for k, v in (recipe.get("data") or {}).items() if v is not None or k in cfg.data}
    return {**recipe, "data": data}


def _drop_callbacks(cfg: DictConfig) -> None:
    """Removes callbacks beyond `OWN_CALLBACKS`, which the user added for the student; a recipe can name its own.

    The epoch is chosen by the task's own metric: the student's may need a teacher (val/agreement), and is not in the hash.
    """
    cfg.callbacks = {k: v for k, v in (cfg.get("callbacks") or {}).items() if k in OWN_CALLBACKS}
    if (best := cfg.callbacks.get("best")) is not None:
        best.monitor = best.mode = None


def student_folder(cfg: DictConfig) -> Path:
    """Returns the folder of the run that `student.checkpoint: auto` refers to."""
    return starting_point_dir(student_config(cfg))


def starting_point_dir(recipe: DictConfig) -> Path:
    """Returns the folder of a run of this config as the starting point of other runs."""
    return Path(recipe.runs) / "students" / f"{net_name(recipe.student)}-{data_name(recipe.data)}-{recipe_hash(recipe)}"


def recipe_hash(cfg: DictConfig) -> str:
    """Returns ten hex digits that are equal for two configs if their runs train the same weights.

    Published data are the same wherever they lie. Folders of images are not: of these names and sizes of the files count, so
    that a teacher of other images, or of fewer, is not taken for theirs.
    """
    kept = recipe(cfg)
    own = [cfg.data[key] for key in OWN_FILES.get(data_name(cfg.data), ()) if cfg.data.get(key) is not None]
    if own:
        found = [contents_digest(Path(path), ANNOTATIONS.get(data_name(cfg.data), ())) for path in own]
        kept["files"] = found[0] if len(found) == 1 else found
    labels = cfg.data.get("labels")
    if isinstance(labels, str) and (place := labels_file(cfg.data.get("root") or "", labels)).is_file():
        kept["data"]["labels"] = hashlib.sha256(place.read_bytes()).hexdigest()[:10]
    return digest(kept)


def recipe(cfg: DictConfig) -> dict[str, Any]:
    """Returns the part of a config that decides the final weights of its run, as plain values.

    The number of processes is no part of it, so that a teacher trained on eight devices is found on one.
    """
    kept: dict[str, Any] = {}
    for key in RECIPE:
        node = cfg.get(key)
        if not node and key in ("compress", "min_steps", "balance", "adversarial", "method_lr"):
            continue
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if isinstance(value, dict):
            # A null key equals an absent one, so that an option added to the configs later changes no hash.
            value = {k: v for k, v in value.items() if v is not None and k not in NO_RECIPE.get(key, ())}
        kept[key] = value
    if (
        kept["teacher"] and (path := kept["teacher"].get("outputs")) is not None
    ):  # no network, whatever else stands there
        kept["teacher"] = {"outputs": _outputs_digest(path)}
    for member in (kept["teacher"] or {}).get("ensemble") or []:
        if member.get("outputs") is not None:
            member["outputs"] = _outputs_digest(member["outputs"])
    if kept["data"].get("fraction") is None and kept["data"].get("per_class") is None:
        kept["data"]["subset_seed"] = cfg.seed  # without a subset its seed changes nothing
    if any(k not in OWN_CALLBACKS and v is not None for k, v in (cfg.get("callbacks") or {}).items()):
        nowhere = cfg.copy()
        OmegaConf.update(
            nowhere, "folder", "", force_add=True
        )  # the folder that callbacks write to does not change the weights
        found: Any = OmegaConf.to_container(nowhere.callbacks, resolve=True)
        kept["callbacks"] = {k: v for k, v in found.items() if k not in OWN_CALLBACKS and v is not None}
    if (scale := cfg.get("scale")) and scale.reference_batch is not None:
        kept["scale"] = OmegaConf.to_container(scale)
    return short_names(kept)


def _outputs_digest(path: str) -> str:
    """Returns ten hex digits of a file of outputs; the name of a teacher that is fitted to the data."""
    return path if path in FOLDS else file_sha256(path)[:10]


def short_names(node: Any) -> Any:
    """Returns plain values with each `_target_` reduced to its last name: a class's module does not change the weights."""
    if isinstance(node, dict):
        return {k: v.rpartition(".")[2] if k == "_target_" else short_names(v) for k, v in node.items()}
    return [short_names(v) for v in node] if isinstance(node, list) else node


def teacher_folder(cfg: DictConfig) -> Path:
    """Returns the folder of the teacher's run that `teacher.checkpoint: auto` refers to."""
    recipe = teacher_config(cfg)
    return Path(cfg.runs) / "teachers" / f"{net_name(recipe.student)}-{data_name(cfg.data)}-{recipe_hash(recipe)}"


def teacher_by_weights(cfg: DictConfig, sha256: str) -> Path | None:
    """Returns the folder of a finished teacher's run whose student has these weights; None if there is none.

    It finds the teacher of a run whose data were changed or exchanged since.
    """
    for summary in sorted((Path(cfg.runs) / "teachers").glob("*/summary.json")):
        try:
            found = json.loads(summary.read_text(encoding="utf-8"))["student"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found == sha256 and is_complete(summary.parent):
            return summary.parent
    return None


def net_name(node: DictConfig) -> str:
    """Returns a short name of a network: its `name` option, or its function with its depth and width options."""
    if node.get("outputs") is not None:  # a teacher that is a file
        return Path(node["outputs"]).stem
    if "name" in node:
        return str(node["name"])
    if node.get("path") is not None:  # the folder of a model
        return Path(str(node["path"])).name
    name = str(node["_target_"]).rsplit(".", 1)[-1]
    for key in ("depth", "width", "widths", "hidden"):
        if key in node:
            value = node[key]
            name += "-" + ("x".join(map(str, value)) if OmegaConf.is_list(value) else str(value))
    return name


def data_name(node: DictConfig) -> str:
    """Returns the name of a data set, or of the data module's class."""
    return str(node.get("name") or str(node["_target_"]).rpartition(".")[2])


def is_complete(folder: Path) -> bool:
    """Returns whether a run is finished: its summary and its student exist."""
    return (folder / "summary.json").is_file() and (folder / STUDENT).is_file()
