"""Writes the outputs of a finished run's network for all samples of its data: a file that teaches in place of the network."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from litdistill.config.distiller import example_batch
from litdistill.data.foreign import ForeignData
from litdistill.data.protocol import IndexedData
from litdistill.distillation.mixed import reads_ids
from litdistill.distillation.outputs_tables import MANIFEST
from litdistill.distillation.outputs_writer import Shape, write_outputs
from litdistill.distillation.recorded import ALL_ROUNDS, view_facts
from litdistill.distillation.teacher import FrozenTeacher, teacher_taps
from litdistill.evaluation.evaluate import load_run, pick_device, rebuild
from litdistill.evaluation.predictions import predict_split
from litdistill.methods.base import CATEGORICAL
from litdistill.models.ensemble import Ensemble
from litdistill.tasks.base import Task
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import file_sha256, weights_sha256
from litdistill.utils.manifest import BOXES, MASK
from litdistill.utils.units import quantity
from litdistill.utils.versions import versions

log = logging.getLogger(__name__)


class Form(NamedTuple):
    """How outputs are kept. `views`: of each training sample; 0: as it is. `top`: the k largest logits; None: all."""

    views: int = 0
    precision: str = "float32"
    top: int | None = None
    rest: str = "spread"
    embedding: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of the numbers."""
        return torch.float16 if self.precision == "float16" else torch.float32


def record(
    run: str | Path,
    to: str | Path,
    of: str = "student",
    form: Form = Form(),  # noqa: B008
    device: str = "auto",
    overrides: DictConfig | None = None,
    trust: Sequence[str] = (),
) -> list[str]:
    """Writes the outputs of a finished run's student, or its teacher, to a safetensors file; returns lines on it.

    Training samples are all that are not validated on, whatever subset the run has used. Raises `UserError` for a run without
    sample ids, or without such a network or such views.
    """
    folder, to = Path(run), Path(to)
    if to.suffix != ".safetensors":
        raise UserError(f"to={to}: outputs are written as .safetensors.")
    if to.exists():
        raise UserError(f"to={to} is there already: name another file, or remove it.")
    cfg, summary = load_run(folder, trust)
    if form.views:
        overrides = OmegaConf.merge(overrides or {}, {"data": {"fixed_views": form.views}})  # type: ignore[assignment]
        if "fixed_views" not in cfg.data:
            raise UserError(f"views={form.views}: {cfg.data.get('_target_')} has no fixed_views. Leave views at 0.")
    torch.set_float32_matmul_precision("high")  # as in training
    if cfg.get("threads") is not None:
        torch.set_num_threads(cfg.threads)
    data, distiller = rebuild(folder, overrides, trust)
    if isinstance(data, ForeignData):
        raise UserError(
            f"{data.name} has no sample ids, by which a file of outputs is read: see docs/own.md, or data=folder."
        )
    net = distiller.deployed_student if of == "student" else distiller.teacher.net if distiller.teacher else None
    if net is None or reads_ids(net) or (isinstance(net, Ensemble) and net.partial):
        what = "has no teacher" if net is None else "was taught by networks of other classes than its own"
        what = "was taught by a file of outputs" if reads_ids(net) else what
        raise UserError(f"of=teacher: {folder} {what}. Write the outputs of its student, of=student.")
    _check_form(form, data, distiller.task)
    place = torch.device(pick_device(device))
    teacher = FrozenTeacher(net, distiller.task, _taps(net, form, data, distiller.task), example_batch(data)).to(place)
    ids = {"train": training_ids(data), "val": data.val_ids, "test": data.test_ids}
    first = _with_embedding(teacher, data.get_batch("train", ids["train"][:2].to(place)))
    facts = _manifest(cfg, summary, folder, of, form, data, distiller.task, net)
    mass: list[float] = []  # of the kept classes, by batch

    def fill(tensors: Mapping[str, Tensor]) -> None:
        for split, rows in ids.items():
            tensors[f"{split}.ids"].copy_(rows)
            views = form.views if split == "train" else 0
            for view in range(views) if views else (None,):
                for start, outputs in _run(teacher, data, split, rows, view, place):
                    at = slice(start, start + len(outputs.logits))
                    mass.append(_store(tensors, split, at if view is None else (at, view), outputs, form))

    metadata = {MANIFEST: json.dumps(facts), "rest": form.rest} | (
        {"classes": json.dumps(list(data.class_names))} if data.class_names else {}
    )
    write_outputs(to, _arrays(ids, first, form), metadata, fill)
    return _report(to, ids, first, form, data, mass)


def training_ids(data: IndexedData) -> Tensor:
    """Returns the ids of all samples of the training files that are not validated on; of `data.classes` if set."""
    kept = torch.ones(len(data.train_targets), dtype=torch.bool)
    if getattr(data, "only", None) is not None:
        kept = data.train_targets >= 0
        kept[data.train_ids] = True  # those without labels that are trained on
    kept[data.val_ids] = False
    return kept.nonzero().flatten()


def _run(
    teacher: FrozenTeacher, data: IndexedData, split: str, ids: Tensor, view: int | None, device: torch.device
) -> Iterator[tuple[int, Outputs]]:
    """Yields the first place and the outputs of `ids` (N,), computed as a run with this teacher computes them.

    Kernels round differently at other sizes of a batch, and a student of the file is to be that of the network: training
    samples go in batches of the size that is trained with, the others as they go where a teacher is judged.
    """
    if split != "train" and not teacher.taps:
        assert teacher.task is not None
        yield 0, predict_split(teacher.net, data, split, device, teacher.task)[0]
        return
    size = data.batch_size
    console = Console(stderr=True)
    what = f"{split} samples" if view is None else f"{split} samples, view {view}"
    starts = range(0, len(ids), size)
    for start in track(starts, what, console=console, transient=True, disable=not console.is_terminal):
        part = ids[start : start + size]
        full = torch.cat([part, part[:1].expand(size - len(part))]).to(device)
        views = None if view is None else torch.full_like(full, view)
        outputs = _with_embedding(teacher, data.get_batch("test" if split == "test" else "train", full, views))
        yield start, outputs.rows(slice(0, len(part)))


def _with_embedding(teacher: FrozenTeacher, batch: Batch) -> Outputs:
    """Returns the heads of a batch; the pooled feature is one of them where it is tapped."""
    found = teacher(batch)
    heads = {"logits": found.heads["logits"].float()}
    for feature in found.features.values():
        heads["embedding"] = feature.float()
    return Outputs(heads)


def _taps(net: nn.Module, form: Form, data: IndexedData, task: Task) -> list[str]:
    run = lambda net, _: task.forward(net, example_batch(data), False)  # noqa: E731
    return teacher_taps(net, example_batch(data).inputs, Taps((), "pooled"), run) if form.embedding else []


def _check_form(form: Form, data: IndexedData, task: Task) -> None:
    if task.output_kind in (BOXES, MASK):
        raise UserError(
            f"A file of outputs holds one row of logits a sample, and networks of {type(task).__name__} give them at every "
            "place: teach from the network itself, whose outputs are cached while training."
        )
    if form.views and not data.draws_views:
        raise UserError(f"views={form.views}: these data have one view of each sample, as it is. Leave views at 0.")
    if form.views and data.view_count(ALL_ROUNDS) != form.views:
        raise UserError(f"views={form.views}: these data draw {data.view_count(ALL_ROUNDS)}.")
    if form.top is not None and task.kind != CATEGORICAL:
        raise UserError(
            f"top={form.top}: the largest logits are kept where a sample has one label; here they are {task.kind}."
        )
    count: int = getattr(data, "num_classes", 0)
    if form.top is not None and form.top >= count:
        raise UserError(f"top={form.top}: there are {count} classes. Leave top out to keep them all.")


def _arrays(ids: Mapping[str, Tensor], first: Outputs, form: Form) -> dict[str, Shape]:
    """Returns the arrays of the file, by name: their dtypes and shapes."""
    arrays: dict[str, Shape] = {}
    for split, rows in ids.items():
        lead = (len(rows), form.views) if form.views and split == "train" else (len(rows),)
        shape = tuple(first.logits.shape[1:])
        arrays[f"{split}.ids"] = torch.int64, (len(rows),)
        if form.top is not None:
            short = torch.int16 if shape[-1] < 2**15 else torch.int32
            arrays[f"{split}.indices"] = short, (*lead, *shape[:-1], form.top)
            if form.rest == "spread":
                arrays[f"{split}.rest"] = form.dtype, (*lead, *shape[:-1])
            shape = (*shape[:-1], form.top)
        arrays[f"{split}.logits"] = form.dtype, (*lead, *shape)
        if "embedding" in first.heads:
            arrays[f"{split}.embedding"] = form.dtype, (*lead, *first.heads["embedding"].shape[1:])
    return arrays


def _store(tensors: Mapping[str, Tensor], split: str, at: Any, outputs: Outputs, form: Form) -> float:
    """Writes a batch's outputs to the rows `at`; returns the sum over samples of the probability of the classes that are kept.

    Raises `UserError` for numbers that cannot be kept.
    """
    logits = outputs.logits.float()
    if not bool(logits.isfinite().all()):
        raise UserError("The network gives NaN or infinity for a sample: its weights are damaged, or of other data.")
    found, mass = {"logits": logits}, 0.0
    if form.top is not None:
        values, indices = logits.topk(form.top, -1)
        others = logits.scatter(-1, indices, -math.inf).logsumexp(-1)
        mass = float((values.logsumexp(-1) - logits.logsumexp(-1)).exp().double().sum())
        found = {"logits": values, "indices": indices} | ({"rest": others} if form.rest == "spread" else {})
    if "embedding" in outputs.heads:
        found["embedding"] = outputs.heads["embedding"]
    for name, values in found.items():
        kept = values.to(tensors[f"{split}.{name}"].dtype).cpu()
        if not bool(kept.isfinite().all()):
            raise UserError(
                f"precision=float16 holds numbers up to 65,504, and the network gives more ({name}): use float32."
            )
        tensors[f"{split}.{name}"][at] = kept
    return mass


def _manifest(
    cfg: DictConfig,
    summary: dict[str, Any],
    folder: Path,
    of: str,
    form: Form,
    data: IndexedData,
    task: Task,
    net: nn.Module,
) -> dict[str, Any]:
    """Returns what a file says of itself: the network, the data, the views, what its numbers are, and the versions."""
    about = {key: summary[of].get(key) for key in ("name", "params", "macs", "bytes")}
    views = None
    if form.views:
        views = {"count": form.views, **view_facts(data)}
    return {
        "format": 1,
        "network": {**about, "sha256": weights_sha256(net.state_dict()), "run": folder.name, "of": of},
        "data": {
            "name": getattr(data, "name", None),
            "train": data.identity("train") if form.views else None,
            **{split: data.identity(split) for split in ("val", "test")},
        },
        "task": type(task).__name__,
        "kind": "logits",
        "temperature": None,
        "units": task.units(),
        "views": views,
        "precision": form.precision,
        "top": form.top,
        "batch_size": data.batch_size,
        "versions": versions(),
    }


def _report(
    to: Path, ids: Mapping[str, Tensor], first: Outputs, form: Form, data: Any, mass: Sequence[float]
) -> list[str]:
    arrays = _arrays(ids, first, form)
    lead = len(ids["train"]) * max(1, form.views)
    size = sum(
        math.prod(shape) * dtype.itemsize // lead
        for name, (dtype, shape) in arrays.items()
        if name.startswith("train.") and not name.endswith(".ids")
    )
    counts = ", ".join(
        f"{len(rows):,} {word}" for word, rows in zip(("training", "validation", "test"), ids.values(), strict=True)
    )
    seen = f", training samples in {quantity(form.views, 'view')}" if form.views else ""
    classes = first.logits.shape[-1]
    kept = f"the top {form.top} of {classes:,} logits" if form.top is not None else quantity(classes, "logit")
    each = "a view" if form.views else "a sample"
    more = f" and an embedding of {first.heads['embedding'].shape[-1]:,}" if "embedding" in first.heads else ""
    lines = [
        f"{to}: {counts} samples{seen}. {size} bytes {each} ({kept}{more}, {form.precision}), {to.stat().st_size:,} bytes, "
        f"SHA-256 {file_sha256(to)[:12]}…"
    ]
    if form.top is not None:
        rows = lead + len(ids["val"]) + len(ids["test"])
        share = sum(mass) / (rows * math.prod(first.logits.shape[1:-1]))
        lines.append(f"The top {form.top} hold {100 * share:.2f} % of the probability, in the mean over all samples.")
    options = f" data.fixed_views={form.views} data.view_seed={data.view_seed}" if form.views else ""
    lines.append(
        f"A student learns from it by: litdistill train data={data.name} teacher.outputs={literal(str(to))}{options}"
    )
    return lines
