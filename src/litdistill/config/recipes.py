"""Which run trains a teacher or a starting point, and where it lies: found again by the hash of its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from litdistill.config.origin import PLACES
from litdistill.utils.checkpoint import STUDENT
from litdistill.utils.hashing import digest

# Keys beside a network's own options.
NETWORK_META_KEYS = (
    "checkpoint",
    "head",
    "preprocess",
    "trainable",
    "allow_chance",
    "recipe",
    "ensemble",
    "generations",
    "cache",
    "tabulate",
)

# What of a config decides the weights that a run ends with: the key of a teacher that is found again.
RECIPE = (
    *("data", "student", "compress", "teacher", "task", "method", "optimizer", "scheduler", "schedule", "ema", "seed"),
    "trainer",
)
NO_RECIPE = {  # ... but for where things are and how fast they go
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


OWN_CALLBACKS = ("best", "last", "learning_rate")  # those of conf/callbacks, which decide no weight


def teacher_config(cfg: DictConfig) -> DictConfig:
    """The config of the run that trains the teacher of `cfg`: the teacher as the student, labels alone, then its recipe."""
    recipe: Any = OmegaConf.to_container(cfg.teacher.recipe, resolve=False) if cfg.teacher.get("recipe") else {}
    teacher = cfg.copy()
    with open_dict(teacher):
        teacher.student = {k: v for k, v in cfg.teacher.items() if k not in NETWORK_META_KEYS}
        teacher.student.checkpoint, teacher.student.preprocess = None, cfg.teacher.get("preprocess")
        teacher.compress = teacher.technique = None
        _drop_callbacks(teacher)
        if cfg.teacher.get("generations", 1) > 1:  # a teacher that was taught by its like
            teacher.teacher.generations -= 1
            teacher.teacher.recipe = {**recipe, "seed": recipe.get("seed", cfg.seed) + 1}  # with other first weights
        else:
            teacher.teacher = None
            teacher.method = {"_target_": "litdistill.methods.Supervised"}
        teacher.schedule, teacher.ema, teacher.resume = {}, None, None
        for key in ("optimizer", "scheduler"):
            # The options of one class mean nothing to another: a recipe that has one with its options has all of it.
            own, whole = teacher.get(key), recipe.get(key) or {}
            if own is not None and {"_target_"} < whole.keys() and whole["_target_"] != own.get("_target_"):
                teacher[key] = None
    return _by_recipe(teacher, _fitting(recipe, cfg), "teachers")


def student_config(cfg: DictConfig) -> DictConfig:
    """The config of the run that `student.checkpoint: auto` starts from: that of `cfg` without its start, then the recipe."""
    recipe: Any = OmegaConf.to_container(cfg.student.recipe, resolve=False) if cfg.student.get("recipe") else {}
    source = cfg.copy()
    with open_dict(source):
        for key in ("checkpoint", "head", "trainable", "recipe"):
            source.student[key] = None
        source.compress = source.technique = source.resume = None
        _drop_callbacks(source)
    return _by_recipe(source, _fitting(recipe, cfg), "students")


def _by_recipe(cfg: DictConfig, recipe: dict[str, Any], name: str) -> DictConfig:
    """`cfg` with a recipe merged in. Where things lie and what is trusted stays as the run has it: no recipe says that."""
    with open_dict(cfg):
        merged = OmegaConf.merge(cfg, {k: v for k, v in recipe.items() if k not in PLACES})
        merged.name = name
    assert isinstance(merged, DictConfig)
    return merged


def _fitting(recipe: dict[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """A recipe without the nulls among its `data` that these data have no option for."""
    data = {k: v for k, v in (recipe.get("data") or {}).items() if v is not None or k in cfg.data}
    return {**recipe, "data": data}


def _drop_callbacks(cfg: DictConfig) -> None:
    """What was added for the student is not the other run's; its recipe can name its own."""
    cfg.callbacks = {k: v for k, v in (cfg.get("callbacks") or {}).items() if k in OWN_CALLBACKS}


def student_folder(cfg: DictConfig) -> Path:
    """Where the run that `student.checkpoint: auto` starts from is kept."""
    return starting_point_dir(student_config(cfg))


def starting_point_dir(recipe: DictConfig) -> Path:
    """Where a run of that config lies if it is one that others start from."""
    return Path(recipe.runs) / "students" / f"{net_name(recipe.student)}-{data_name(recipe.data)}-{recipe_hash(recipe)}"


def recipe_hash(cfg: DictConfig) -> str:
    """Ten hex digits that are equal for two configs if their runs train the same weights."""
    return digest(recipe(cfg))


def recipe(cfg: DictConfig) -> dict[str, Any]:
    """What of a config decides the weights that its run ends with, as plain values.

    On how many processes is no part of it, so that a teacher that eight devices have trained is found on one.
    """
    kept: dict[str, Any] = {}
    for key in RECIPE:
        node = cfg.get(key)
        if node is None and key == "compress":
            continue
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if isinstance(value, dict):
            # A key that is null is as good as absent: one that is added later changes no hash.
            value = {k: v for k, v in value.items() if v is not None and k not in NO_RECIPE.get(key, ())}
        kept[key] = value
    if kept["data"].get("fraction") is None and kept["data"].get("per_class") is None:
        kept["data"]["subset_seed"] = cfg.seed  # all of it, whatever the seed
    if any(k not in OWN_CALLBACKS for k in cfg.get("callbacks") or {}):
        nowhere = cfg.copy()
        OmegaConf.update(nowhere, "folder", "", force_add=True)  # where they write to decides nothing
        found: Any = OmegaConf.to_container(nowhere.callbacks, resolve=True)
        kept["callbacks"] = {k: v for k, v in found.items() if k not in OWN_CALLBACKS}
    if (scale := cfg.get("scale")) and scale.reference_batch is not None:
        kept["scale"] = OmegaConf.to_container(scale)
    return short_names(kept)


def short_names(node: Any) -> Any:
    """Plain values in which each `_target_` is its last name: where a class lies decides no weight."""
    if isinstance(node, dict):
        return {k: v.rpartition(".")[2] if k == "_target_" else short_names(v) for k, v in node.items()}
    return [short_names(v) for v in node] if isinstance(node, list) else node


def teacher_folder(cfg: DictConfig) -> Path:
    """Where the teacher that `teacher.checkpoint: auto` trains is kept."""
    recipe = teacher_config(cfg)
    return Path(cfg.runs) / "teachers" / f"{net_name(recipe.student)}-{data_name(cfg.data)}-{recipe_hash(recipe)}"


def net_name(node: DictConfig) -> str:
    """A short name of a network: its function, and whatever option has the name's look."""
    name = str(node["_target_"]).rsplit(".", 1)[-1]
    if "name" in node:
        return str(node["name"])
    for key in ("depth", "width", "widths", "hidden"):
        if key in node:
            value = node[key]
            name += "-" + ("x".join(map(str, value)) if OmegaConf.is_list(value) else str(value))
    return name


def data_name(node: DictConfig) -> str:
    """The name of a data set, or of the class of a data module of your own."""
    return str(node.get("name") or str(node["_target_"]).rpartition(".")[2])


def is_complete(folder: Path) -> bool:
    """Whether a run has left all that it leaves."""
    return (folder / "summary.json").is_file() and (folder / STUDENT).is_file()
