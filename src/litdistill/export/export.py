"""Exports the student of a finished run, and rejects a file whose outputs differ from the student's.

A file is written under a temporary name, loaded in its own runtime, compared with the student on the whole test set, and
only then renamed and entered into `manifest.json`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from litdistill.compress.quantize import Int8
from litdistill.compress.structure import structure_of
from litdistill.config.build import build_net
from litdistill.config.instantiate import NETWORK_META_KEYS, locate
from litdistill.config.origin import check_links
from litdistill.data.foreign import output_names, training_inputs
from litdistill.data.protocol import facts_of, input_dtype
from litdistill.evaluation.evaluate import load_run, rebuild, run_data
from litdistill.evaluation.predictions import local_metrics
from litdistill.export.predict import load, runtime
from litdistill.export.writers import write_format
from litdistill.methods.base import BERNOULLI, CATEGORICAL, REAL
from litdistill.models.preprocess import Preprocessed, bare, preprocess_of
from litdistill.tasks.base import Task, has_places
from litdistill.tasks.classification import Classification
from litdistill.tasks.findings import judge
from litdistill.types import EMBEDDING, Batch, Outputs
from litdistill.utils.checkpoint import read_metadata
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_atomically, write_text
from litdistill.utils.hashing import weights_sha256
from litdistill.utils.manifest import (
    BOXES,
    MANIFEST,
    MASK,
    SUFFIXES,
    check_facts,
    check_names,
    read_manifest,
)
from litdistill.utils.modality import IMAGE, TABLE, TOKENS, Modality, modality_of
from litdistill.utils.units import named
from litdistill.utils.versions import versions

OUTPUTS = {
    CATEGORICAL: "logits, float32: their softmax gives probabilities",
    BERNOULLI: "logits, float32: the sigmoid of each gives its probability",
    REAL: "float32: output * std + mean of units gives values",
    EMBEDDING: "float32: one vector a sample",
    BOXES: "boxes (N, K, 4) float32: x1, y1, x2, y2 in pixels of the input; scores (N, K) float32, best first, 0 for none; "
    "labels (N, K) int64, the class counted from 0, -1 for none",
    MASK: "mask (N, H, W) int64: the class of each pixel, counted from 0",
}
PRECISIONS = {
    "onnx": ("fp32", "fp16", "int8"),
    "pt2": ("fp32", "fp16"),
    "safetensors": ("fp32", "fp16"),
    "torchscript": ("fp32",),
}
# The largest difference of any logit, relative to the student's largest absolute logit, and the least agreement.
# int8 has no useful bound on the difference of logits.
TOLERANCES = {"fp32": (1e-4, 0.999), "fp16": (2e-2, 0.99), "int8": (float("inf"), 0.95)}
CHECKED = 64  # samples that are run at once
Limits = tuple[float | None, float | None]


def export(
    folder: str | Path,
    format: str = "onnx",
    precision: str = "fp32",
    preprocessing: bool = True,
    calibration: int = 512,
    limits: Limits = (None, None),
    overrides: DictConfig | None = None,
    trust: Sequence[str] = (),
) -> tuple[Path, dict[str, Any]]:
    """Writes `<folder>/export/student….<suffix>` and its entry in `manifest.json`; returns the path and the check.

    `limits` replaces `TOLERANCES` where not None. `overrides` are merged into the run's config, for data that has moved.
    `trust`: packages that the config of a run made elsewhere may name.
    Raises `UserError` for a student that cannot be exported, and for a file that differs from the student beyond the
    tolerance; an existing file of that name is then unchanged.
    """
    if precision not in PRECISIONS.get(format, ()):
        offered = "; ".join(f"format={f} with precision={' or '.join(p)}" for f, p in PRECISIONS.items())
        raise UserError(f"format={format} precision={precision} is not offered. There is {offered}.")
    if not isinstance(preprocessing, bool):
        raise UserError(f"preprocessing={preprocessing} must be true or false.")
    if type(calibration) is not int or calibration < 1:
        raise UserError(f"calibration={calibration} must be a number of images, at least 1.")
    check_limits(limits)
    folder = Path(folder)
    student, data, task, net_options = student_of_run(folder, overrides, trust)
    path, entry = export_student(
        folder, student, data, format, precision, preprocessing, calibration, limits, net_options, task
    )
    return path, entry["check"]


def modality_facts(modality: Modality) -> dict[str, Any]:
    """Returns the entry of the manifest about the kind of data: its options, and digests of the files that it needs."""
    files = {name: hashlib.sha256(content).hexdigest() for name, content in modality.files.items()}
    return {"kind": modality.kind, **modality.options, "files": files}


def _write_companions(folder: Path, modality: Modality) -> None:
    for name, content in modality.files.items():
        write_atomically(folder / name, functools.partial(_write_bytes, content))


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def check_limits(limits: Limits) -> None:
    """Raises `UserError` for a tolerance that is neither null nor a number of at least 0."""
    for name, value in zip(("difference", "agreement"), limits, strict=True):
        if value is not None and (type(value) not in (int, float) or not value >= 0):
            raise UserError(f"tolerance.{name}={value} must be a number of at least 0, or null for the usual one.")


def export_student(
    folder: Path,
    student: nn.Module,
    data: Any,
    format: str = "onnx",
    precision: str = "fp32",
    preprocessing: bool = True,
    calibration: int = 512,
    limits: Limits = (None, None),
    net_options: Mapping[str, Any] | None = None,
    task: Task | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Exports a student in memory; returns the path and the manifest's entry. See `export`.

    `net_options`: the network's builder and options, for safetensors. `task`: gives the kind of outputs and the metric that
    compares the file with the student; classification where None.
    """
    task = task or Classification()
    check_names(data.class_names)
    check_links(folder)
    names, shape = names_and_shape(student, data, task)
    kind, preprocess, modality = task.output_kind, preprocess_of(student), modality_of(data, shape)
    check_student(student, shape, format, precision, preprocessing, kind)
    # safetensors holds weights alone
    preprocessing = preprocessing and preprocess is not None and format != "safetensors"
    about = preprocess.facts() if preprocess is not None else {"mean": [], "std": [], "size": None}
    entry: dict[str, Any] = {
        "format": format,
        "precision": precision,
        "preprocessing": preprocessing,
        "kind": kind,
        "units": task.units(),
        "classes": names,
        **about,
        "input_shape": shape,
        "modality": modality_facts(modality),
        "input": described(shape, modality.kind, preprocessing, preprocess is not None, input_dtype(data)),
        "output": OUTPUTS[kind] + "; (N, T, tokens)" * (modality.kind == TOKENS),
    }
    if format == "safetensors":
        entry["net"] = dict(net_options or {})
    facts = check_facts(entry, Path("student" + SUFFIXES[format]))
    plain = preprocessing or format == "safetensors" or preprocess is None
    name = "student" + f"-{precision}" * (precision != "fp32") + "-normalized" * (not plain) + SUFFIXES[format]
    path = folder / "export" / name

    def write(temporary: Path) -> None:
        write_format(student, data, temporary, entry, facts, calibration, task)
        content = temporary.read_bytes()
        entry["check"] = check(runtime(content, facts, path), student, data, precision, limits, task)
        _refuse_mismatch(path, entry["check"])
        entry["bytes"], entry["sha256"] = len(content), hashlib.sha256(content).hexdigest()

    write_atomically(path, write)
    _write_companions(path.parent, modality)
    entry["student_sha256"], entry["versions"] = weights_sha256(student.state_dict()), versions()
    _enter(path, entry)
    return path, entry


def _enter(path: Path, entry: Mapping[str, Any]) -> None:
    """Writes the entry of an exported file into the manifest beside it."""
    manifest = path.parent / MANIFEST
    with FileLock(path.parent / f".{MANIFEST}.lock"):
        files = read_manifest(manifest) if manifest.is_file() else {}
        write_text(manifest, json.dumps({"files": {**files, path.name: entry}}, indent=2) + "\n")


@torch.no_grad()
def names_and_shape(student: nn.Module, data: Any, task: Task) -> tuple[list[str], list[int]]:
    """Returns the names of the student's outputs, and the shape of one input sample.

    Raises `UserError` for a student that cannot be exported: with several inputs, or without logits (N, outputs).
    """
    inputs = training_inputs(data, 2)
    if not isinstance(inputs, Tensor):
        raise UserError(
            "An exported file has one input, and this student takes several: load it with litdistill.load_student(<run>) and "
            "write it with torch.onnx.export."
        )
    if task.output_kind in (BOXES, MASK):
        return list(data.class_names), list(data.input_shape)
    outputs = task.forward(student.cpu().eval(), Batch(inputs.cpu(), None), False).heads
    given = outputs.get("logits" if task.reads_labels else EMBEDDING)
    if given is None or given.ndim != (3 if has_places(task) else 2):
        raise UserError(f"An exported file gives logits (N, outputs), and this student gives {', '.join(outputs)}.")
    names = output_names(data, given.shape[-1]) if task.reads_labels else map(str, range(given.shape[-1]))
    return list(names), list(data.input_shape or inputs.shape[1:])


def described(
    shape: Sequence[int], kind: str, preprocessing: bool, normalizes: bool, dtype: torch.dtype = torch.float32
) -> str:
    """Returns a description of a file's inputs for the manifest."""
    if kind not in (IMAGE, TABLE):
        return f"{str(dtype).removeprefix('torch.')} ({', '.join(['N', *map(str, shape)])})"
    if kind == TABLE:
        return (
            "float32 (N, F), (x - mean) / std" if normalizes and not preprocessing else "float32 (N, F) as in the data"
        )
    return "uint8 NCHW" if preprocessing else "float32 NCHW, (pixel / 255 - mean) / std" if normalizes else "float32"


def verify(
    folder: str | Path,
    overrides: DictConfig | None = None,
    limits: Limits = (None, None),
    trust: Sequence[str] = (),
    allow_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Checks every exported file of a run: first its SHA-256, then its logits on the test set.

    Raises `UserError` for a changed file, one that requires `allow_code`, and one that differs beyond the tolerance.
    """
    check_limits(limits)
    if not isinstance(allow_code, bool):
        raise UserError(f"allow_code={allow_code} must be true or false.")
    folder = Path(folder)
    manifest = folder / "export" / MANIFEST
    if not manifest.is_file():
        raise UserError(f"Nothing was exported from {folder} yet: there is no {manifest}.")
    files = read_manifest(manifest)
    models = {name: load(manifest.parent / Path(name).name, allow_code) for name in files}
    student, data, task, _ = student_of_run(folder, overrides, trust)
    found = {}
    for name, model in models.items():
        precision = files[name].get("precision")
        if precision not in TOLERANCES:
            raise UserError(f"{manifest} is damaged: {name} has no precision. Export it again.")
        found[name] = check(model.run, student, data, precision, limits, task)
        _refuse_mismatch(manifest.parent / name, found[name])
    return found


def student_of_run(
    folder: Path, overrides: DictConfig | None, trust: Sequence[str] = ()
) -> tuple[nn.Module, Any, Task, dict[str, Any]]:
    """Returns a finished run's student in eval mode on the CPU, its data, its task, and the network's options.

    The teacher is only loaded where the student depends on it (a method that gives the student another head).
    """
    cfg, _ = load_run(folder, trust)
    if overrides is not None:
        cfg = OmegaConf.merge(cfg, overrides)  # type: ignore[assignment]
    options = OmegaConf.to_container(cfg.student, resolve=True)
    assert isinstance(options, dict)
    own = {str(k): v for k, v in options.items() if k not in (*NETWORK_META_KEYS, "weights", "pretrained")}
    data, task = run_data(cfg, folder)
    takes = inspect.signature(locate(str(own["_target_"]))).parameters
    own |= {k: v for k, v in facts_of(data).items() if k in takes and k not in own}
    try:
        width = read_metadata(folder, "outputs")
        student = build_net(OmegaConf.create(own), data, "student", folder, outputs=width)
    except UserError:
        data, distiller = rebuild(folder, overrides, trust)
        student = distiller.deployed_student
    return student.cpu().eval(), data, task, own


def check_student(
    student: nn.Module, shape: Sequence[int], format: str, precision: str, preprocessing: bool, kind: str = CATEGORICAL
) -> None:
    """Raises `UserError` where the format cannot represent the student or its preprocessing."""
    if kind in (BOXES, MASK) and format in ("safetensors", "torchscript"):
        raise UserError(
            f"format={format} has no place for the post-processing of a {kind} task: use format=onnx or pt2. In Python, "
            "litdistill.load_student(<run>) returns the network."
        )
    if isinstance(bare(student), Int8) and (format, precision) != ("onnx", "int8"):
        raise UserError("This student was trained to compute in int8: export it with format=onnx precision=int8.")
    if structure_of(student) and format == "safetensors":
        raise UserError("As safetensors nobody could rebuild this compressed network; use format=onnx.")
    preprocess = preprocess_of(student)
    if preprocess is None and any(isinstance(m, Preprocessed) for m in student.modules()):
        raise UserError(
            "The networks that this student is made of preprocess images in different ways: it cannot be exported."
        )
    if preprocess is not None and preprocess.size not in (None, tuple(shape[1:])) and not preprocessing:
        raise UserError(f"This network resizes its images to {preprocess.size}: export it with preprocessing=true.")


@torch.no_grad()
def check(
    run: Callable[[np.ndarray], np.ndarray],
    student: nn.Module,
    data: Any,
    precision: str,
    limits: Limits = (None, None),
    task: Task | None = None,
) -> dict[str, Any]:
    """Compares an exported model with the student on the whole test set; returns a plain dict with the tolerances.

    `metric`: the task's, with the values `exported` and `student`. `agreement`: the fraction of equal decisions; 1 for
    regression. `findings`: what is wrong with the exported model's predictions (`litdistill.tasks.findings.judge`).
    """
    task = task or Classification()
    exported, own, name = local_metrics(task), local_metrics(task), task.monitor[0]
    given: list[Outputs] = []
    expected: list[Outputs] = []
    targets = []
    student.eval()
    for batch in data.batches("test"):
        found = np.concatenate([run(some.numpy()) for some in batch.inputs.split(CHECKED)])
        given.append(task.read_exported(torch.from_numpy(found)))
        expected.append(task.keep(task.forward(student, batch, False)))
        truth = task.truth(batch.targets, expected[-1])  # without labels, the student's own outputs
        exported.update(given[-1], truth)
        own.update(expected[-1], truth)
        targets.append(truth)
    a, b, truth = _whole(given), _whole(expected), torch.cat(targets)
    difference, agreement = (
        default if limit is None else float(limit) for limit, default in zip(limits, TOLERANCES[precision], strict=True)
    )
    apart, largest, equal = task.compare_exported(a, b, truth, precision)
    value, reference = float(exported.compute()[name]), float(own.compute()[name])
    return {
        "difference": apart,
        "tolerance": {
            "difference": difference * largest if difference < float("inf") else None,
            "agreement": agreement,
            "metric": task.least_metric(reference, agreement, precision),
        },
        "agreement": equal,
        "compared": list((precision == "int8" and task.compared_in_int8) or task.compared),
        "metric": name,
        "exported": value,
        "student": reference,
        "samples": len(truth),
        "findings": judge(task, a, truth, value, names=data.class_names),
    }


def _whole(batches: Sequence[Outputs]) -> Outputs:
    """Returns the main heads of all batches as the outputs for a split."""
    return Outputs({name: torch.cat([outputs.heads[name] for outputs in batches]) for name in batches[0].heads})


def _refuse_mismatch(path: Path, found: Mapping[str, Any]) -> None:
    most, least, worst = (found["tolerance"][k] for k in ("difference", "agreement", "metric"))
    # NaN is never within tolerance
    near = np.isfinite(found["difference"]) and (most is None or found["difference"] <= most)
    if not near or not found["agreement"] >= least or (worst is not None and not found["exported"] >= worst):
        values, decisions = found["compared"]
        floor = "" if worst is None else f" (at least {worst:.4g})"
        raise UserError(
            f"{path.name} is not the student, so it is not kept: {values} differ by up to {found['difference']:.3g} "
            f"(tolerance {'any' if most is None else format(most, '.3g')}), {100 * found['agreement']:.2f} % of "
            f"{decisions} (at least {100 * least:.2f} %), {found['metric']} {found['exported']:.4g} against "
            f"{found['student']:.4g}{floor}. Of a student trained in float choose a higher precision, or for int8 "
            "another number of images (calibration); or allow it with tolerance.difference and tolerance.agreement."
        )


def check_table(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns head and rows of the checks of `export` and `verify`: a row for each file."""
    metric = next((named(c["metric"]) for c in found.values()), "")
    values = next((c["compared"][0] for c in found.values()), "logits")
    head = ["file", "test\nsamples", f"largest\ndifference\nof {values}", "agreement %"]
    head, rows = [*head, f"{metric},\nexported", f"{metric},\nstudent's"], []
    for name, c in found.items():
        most, least = c["tolerance"]["difference"], c["tolerance"]["agreement"]
        difference = f"{c['difference']:.2g}" + ("" if most is None else f"\n(≤ {most:.2g})")
        agreement = f"{100 * c['agreement']:.2f}\n(≥ {100 * least:g})"
        rows.append([name, f"{c['samples']:,}", difference, agreement, f"{c['exported']:.4f}", f"{c['student']:.4f}"])
    return head, rows
