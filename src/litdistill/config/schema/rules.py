"""Rules that join several options: a line for each that a config in plain values breaks. Each option fits alone there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from litdistill.utils.command_line import literal

# Options of methods that are weights of terms of the loss.
WEIGHTS = (
    *("hard", "soft", "hint", "tckd", "nckd", "inter", "intra", "instance", "batch", "classes", "pseudo", "distance"),
    *("target", "others", "adversarial", "angle", "box", "centerness"),
    *("foreground", "background", "attention", "context"),
)
WITHOUT_TEACHER = ("Supervised", "Mutual", "Online", "TeacherFree")  # methods of this project
# Whose own terms read the label of every sample.
READ_LABELS = ("CRD", "DKD", "MFT", "NKD", "Shuffled", "TeacherFree", "WKD")
OWN_CALLBACKS = {"best", "last", "learning_rate"}  # those of conf/callbacks, which change no weight


def broken(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line for each rule that a config of any command breaks."""
    for rule in (data, statistics, schedule, method, optimizer, student, teacher, trainer, sweep, export):
        yield from rule(cfg)


def data(cfg: Mapping[str, Any]) -> Iterator[str]:
    node = cfg.get("data")
    if not isinstance(node, dict):
        return
    yield from _unlabelled(node, cfg.get("method"))
    if node.get("fraction") is not None and node.get("per_class") is not None:
        yield "data.fraction and data.per_class both choose a subset: set one of them, and the other to null."
    for key in ("classes", "omit"):
        values = node.get(key) or []
        if isinstance(values, list) and len({str(value) for value in values}) < len(values):
            yield f"data.{key}={literal(values)}: a class stands there twice."


def _unlabelled(node: Mapping[str, Any], method: Any) -> Iterator[str]:
    """Images without labels, and what needs labels. `Distiller` checks methods again, those inside others too."""
    if node.get("unlabelled") is None:
        if node.get("labelled") is False:
            yield "data.labelled=false leaves nothing to train on: give other images, data.unlabelled=<folder>."
        return
    for key, what in (("mix", "mixes labels"), ("balanced", "draws by labels")):
        if node.get(key):
            yield f"data.{key} {what}, and images of data.unlabelled have none: leave out one of them."
    name = _name(method)
    parts = (method.get("methods") or {}).values() if isinstance(method, dict) and name == "Sum" else [method]
    for read in sorted({str(_name(part)) for part in parts} & set(READ_LABELS)):
        yield (
            f"{read} compares the labels of all samples, and the images of data.unlabelled have none: use method=kd or another "
            "that reads the teacher alone, or leave data.unlabelled out."
        )
    if node.get("labelled") is False and name in WITHOUT_TEACHER and name not in READ_LABELS:
        yield f"{name} learns from labels, and no image has one (data.labelled=false): use method=kd with a teacher."


def statistics(cfg: Mapping[str, Any]) -> Iterator[str]:
    """A mean without a deviation, or of another length, would be measured anew without a word."""
    for place, node in _with_mean(cfg):
        mean, std = node.get("mean"), node.get("std")
        given, other = ("mean", "std") if mean is not None else ("std", "mean")
        if (mean is None) != (std is None):
            yield (
                f"{place}.{given}={literal(node[given])} alone: set {place}.{other} too, to as many numbers, or both to null."
            )
        elif mean is not None and std is not None and len(mean) != len(std):
            yield f"{place}.mean has {len(mean)} numbers and {place}.std {len(std)}: give as many of both."


def _with_mean(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in ("data", "task"):
        node = cfg.get(key)
        if isinstance(node, dict) and str(node.get("_target_")).startswith("litdistill."):
            yield key, node
    for key in ("student", "teacher"):
        node = cfg.get(key)
        if isinstance(node, dict) and isinstance(node.get("preprocess"), dict):
            yield f"{key}.preprocess", node["preprocess"]


def schedule(cfg: Mapping[str, Any]) -> Iterator[str]:
    for term, points in (cfg.get("schedule") or {}).items():
        epochs = [epoch for epoch, _ in points]
        if any(second <= first for first, second in itertools.pairwise(epochs)):
            yield f"schedule.{term}={literal(points)}: epochs rise from point to point, [[0, 0], [20, 1]]."
        if not any(factor for _, factor in points):
            yield f"schedule.{term}={literal(points)}: every factor is 0. To leave the term out, set method.{term}=0."


def method(cfg: Mapping[str, Any]) -> Iterator[str]:
    node = cfg.get("method")
    if not isinstance(node, dict) or not str(node.get("_target_")).startswith("litdistill."):
        return
    weights = {key: node[key] for key in WEIGHTS if isinstance(node.get(key), (int, float))}
    if len(weights) > 1 and not any(weights.values()):
        yield f"{', '.join(f'method.{key}=0' for key in weights)}: nothing is learned. Give one of them a weight."


def optimizer(cfg: Mapping[str, Any]) -> Iterator[str]:
    node, callbacks = cfg.get("optimizer"), cfg.get("callbacks") or {}
    if isinstance(node, dict) and node.get("lr") == 0 and callbacks.keys() <= OWN_CALLBACKS:
        yield f"optimizer.lr={node['lr']}: a number above 0; nothing is learned at a rate of 0. Usual is 0.001."


def student(cfg: Mapping[str, Any]) -> Iterator[str]:
    for role in ("student", "teacher"):
        node = cfg.get(role)
        if isinstance(node, dict) and node.get("head") == "new" and node.get("checkpoint") is None:
            yield (
                f"{role}.head={node['head']} without weights to take: set {role}.checkpoint, or {role}.head=null, "
                "which starts from nothing as a whole."
            )
    node = cfg.get("student")
    if isinstance(node, dict) and node.get("checkpoint") == "teacher" and cfg.get("teacher") is None:
        yield "student.checkpoint=teacher: there is no teacher. Name one (net@teacher=…)."


def teacher(cfg: Mapping[str, Any]) -> Iterator[str]:
    node, name = cfg.get("teacher"), _name(cfg.get("method"))
    if node is None and "teacher" in cfg and name is not None and name not in (*WITHOUT_TEACHER, "Sum"):
        yield (
            f"{name} learns from a teacher, and there is none: name one (net@teacher=conv4_wide), or train on the labels alone "
            "with method=supervised."
        )
    if not isinstance(node, dict):
        return
    diffs = node.get("ensemble") or []
    whole = {key: value for key, value in node.items() if key != "ensemble"}
    members = [_merged(whole, diff) for diff in diffs]
    if any(member in members[:i] for i, member in enumerate(members)):
        yield (
            f"teacher.ensemble={literal(diffs)}: a teacher stands there twice. Members differ, say by their seeds: "
            "[{recipe:{seed:0}},{recipe:{seed:1}}]."
        )
    if diffs and node.get("outputs") is not None:
        yield (
            "teacher.outputs with teacher.ensemble: a file that is one of several teachers stands in the list, "
            "teacher.ensemble=[{outputs: teacher.safetensors}, {recipe: {seed: 1}}]."
        )
    if any(diff.get("ensemble") is not None for diff in diffs):
        yield "teacher.ensemble: each of its members is one teacher. List all of them in one list."
    weights = node.get("ensemble_weights")
    if weights is not None and len(weights) != len(diffs):
        yield (
            f"teacher.ensemble_weights={literal(weights)}: one for each network of teacher.ensemble, which has {len(diffs)}. "
            "Give as many, or null, which counts them equally."
        )
    if (node.get("generations") or 1) > 1 and node.get("checkpoint") != "auto":
        yield (
            f"teacher.generations={node['generations']} with teacher.checkpoint={literal(node.get('checkpoint'))}: only "
            "teacher.checkpoint=auto trains teachers. Set one or the other back."
        )
    if "trainable" in node:
        yield "teacher.trainable: a teacher is frozen as a whole. What its own training trains is student.trainable there."


def trainer(cfg: Mapping[str, Any]) -> Iterator[str]:
    node = cfg.get("trainer")
    if not isinstance(node, dict):
        return
    if node.get("max_epochs") == -1 and (node.get("max_steps") or -1) < 0 and node.get("max_time") is None:
        yield "trainer.max_epochs=-1 never ends: set trainer.max_steps or trainer.max_time too."
    if (node.get("min_epochs") or 0) > (node.get("max_epochs") or 0) > 0:
        yield f"trainer.min_epochs={node['min_epochs']} is above trainer.max_epochs={node['max_epochs']}."


def sweep(cfg: Mapping[str, Any]) -> Iterator[str]:
    node = cfg.get("sweep")
    if not isinstance(node, dict):
        return
    if node.get("trials") is None and node.get("sampler") != "grid":
        yield (f"sweep.trials=null goes with sweep=grid. For {node.get('sampler')} say how many: sweep.trials=20.")
    for key in ("seeds", "objectives"):
        values = node.get(key) or []
        if len(set(values)) < len(values):
            yield f"sweep.{key}={literal(values)}: one stands there twice."


def export(cfg: Mapping[str, Any]) -> Iterator[str]:
    if cfg.get("verify") is not True and cfg.get("allow_code") is True:
        yield "allow_code=true goes with verify=true: nothing is opened otherwise."


def _name(node: Any) -> str | None:
    """Returns the name of an object's class, if it is of this project."""
    target = str(node.get("_target_")) if isinstance(node, dict) else ""
    return target.rpartition(".")[2] if target.startswith("litdistill.") else None


def _merged(node: Any, diff: Any) -> Any:
    if not (isinstance(node, dict) and isinstance(diff, dict)):
        return diff
    return {**node, **{key: _merged(node.get(key), value) for key, value in diff.items()}}
