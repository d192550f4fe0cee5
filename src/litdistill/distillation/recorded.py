"""`RecordedTeacher`: a teacher that is a file of outputs by sample, in place of a network.

    teacher = RecordedTeacher(read_outputs("teacher.safetensors"), task, data)
    outputs = teacher.outputs(batch)                 Outputs(heads, features) of the batch's ids and views

What depends on the data is checked at once: which samples and views the file has, of which images, and with which classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.data.protocol import IndexedData, split_ids
from litdistill.distillation.outputs_numbers import log_rest, of_all_classes, to_logits
from litdistill.distillation.outputs_tables import OutputsFile, Table, chunks
from litdistill.distillation.sample_names import rows_by_name
from litdistill.methods.base import BERNOULLI, CATEGORICAL, REAL
from litdistill.tasks.base import Task
from litdistill.types import Batch, Outputs, Taps
from litdistill.utils.errors import UserError
from litdistill.utils.hashing import stable_repr
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

ALL_ROUNDS = 2**31  # more passes than any run has
EMBEDDING = "embedding"


class RecordedTeacher(nn.Module):
    """The outputs in `file`, for the classes of `data` and the kind of logits of `task`.

    It has no parameters; its state dict holds the file's digest, by which runs know their teacher. Without `data`, samples are
    found by the ids of each batch, outputs are taken as they are, and validation is left to `val.` entries of the file.

    Raises `UserError` for a file that does not belong to these data: ids that do not match, another width, other images, other
    or too few views.
    """

    contents: Tensor

    def __init__(self, file: OutputsFile, task: Task, data: IndexedData | None = None):
        super().__init__()
        self.file, self.kind, self.units, self.data = file, task.kind, task.units(), data
        self.reads_labels = task.reads_labels
        self.register_buffer("contents", torch.frombuffer(bytearray.fromhex(file.sha256), dtype=torch.uint8))
        if "train" not in file.tables:
            raise UserError(f"{file.path} has no outputs of training samples: a student learns from these.")
        # 0: one output a sample, whatever its view.
        self.views = int((file.manifest.get("views") or {}).get("count", 0))
        names = tuple(map(str, getattr(data, "class_names", None) or ()))
        count = getattr(data, "num_classes", None) or None
        if data is not None:
            self._check_images(data)
        self.width = len(file.classes) if file.classes is not None else count  # of the file's own outputs
        self.order = self._class_order(names)
        # Which classes it knows, as an `Ensemble` of one has it.
        self.known = torch.tensor([[place >= 0 for place in self.order or [0]]])
        self.partial = not bool(self.known.all())
        self.kinds = {split: self._kind_of(split) for split in file.tables if "logits" in file.tables[split]}
        # By split of the file: the row of each sample by id, -1 without one.
        self.rows = {split: self._rows(split) for split in file.tables}
        if data is not None:
            self._check_samples(data)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Raises `UserError`: a method that takes over layers of its teacher, or runs it on other inputs, needs the network."""
        raise UserError(
            f"{self.file.path} is a file of outputs, and here the teacher's network is needed: use method=kd or another that "
            "reads outputs alone, or name the network (teacher.outputs=null, teacher.checkpoint=<run folder>)."
        )

    # -- what others ask -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Returns the name of the network, or of the file without its ending."""
        return str((self.file.manifest.get("network") or {}).get("name") or self.file.path.stem)

    def outputs(self, batch: Batch, split: str = "train") -> Outputs:
        """Returns the outputs for a batch of ids (N,), in its views or as the samples are. `split`: train, val or test.

        Raises `UserError` for a batch without ids, or with ids that the file does not have.
        """
        if batch.ids is None:
            raise UserError(
                f"{self.file.path} has outputs by sample id, and these batches have none: yield dicts with ids, inputs and "
                "labels, or litdistill.Batch(inputs, targets, ids)."
            )
        found = self._find(split, batch.ids.cpu())
        assert found is not None
        name, rows = found
        if bool((rows < 0).any()):
            missing = batch.ids.cpu()[rows < 0]
            raise UserError(f"{self.file.path} has no outputs of {self._first_of(split, missing)}: {REMEDY}")
        views = None if batch.views is None else batch.views.cpu()
        heads = {head: self._head(name, head, rows, views).to(batch.ids.device) for head in self.file.tables[name]}
        if self.partial and split == "train" and "logits" in heads:
            heads["members"] = heads["logits"].log_softmax(-1)[..., None, :]
        return Outputs(heads, {EMBEDDING: heads[EMBEDDING]} if EMBEDDING in heads else {}, batch.ids)

    def of_split(self, split: str) -> Outputs | None:
        """Returns the heads for all of "val" or "test", in order, on the CPU; None where the file lacks one of the samples."""
        if self.data is None:
            return None
        ids = split_ids(self.data, split)
        found = self._find(split, ids)
        if found is None or bool((found[1] < 0).any()):
            return None
        return Outputs({head: self._head(found[0], head, found[1], None) for head in self.file.tables[found[0]]})

    def taps_for(self, taps: Taps) -> list[str]:
        """Returns the names of the features to read: the embedding, where pooled ones are asked for.

        Raises `UserError` for features that no file has.
        """
        if not taps.teacher:
            return []
        if taps.teacher in ("pooled", ["pooled"]) and EMBEDDING in self.file.tables["train"]:
            return [EMBEDDING]
        has = " and ".join("an embedding" if head == EMBEDDING else head for head in self.file.tables["train"])
        raise UserError(
            f"This method reads features of the teacher ({taps.teacher}), and {self.file.path} has {has} alone: use method=kd "
            "or another that reads logits, a file with embeddings for methods that read pooled features, or the network itself."
        )

    # -- the file and the data -----------------------------------------------------------------------------------------

    def _class_order(self, names: tuple[str, ...]) -> list[int] | None:
        """Returns for each class of the data its place among the file's, -1 for one that it lacks; None for the same order."""
        classes = self.file.classes
        if classes is None or not names or classes == names:
            return None
        path, places = self.file.path, {name: i for i, name in enumerate(classes)}
        order = [places.get(name, -1) for name in names]
        gone, more = [n for n in names if n not in places], [c for c in classes if c not in names]
        if (
            len(places) < len(classes)
            or len(names) - len(gone) < 2 <= len(names)
            or (gone and self.kind != CATEGORICAL)
        ):
            raise UserError(
                f"{path} has outputs of the classes {_some(classes)}, and these data have {_some(names)}: name its classes as "
                "the data do, each once."
            )
        if gone or more:
            lacks = f"it lacks {_some(gone)}, and is compared on those that it has" if gone else ""
            extra = f"its {_some(more)} {'is' if len(more) == 1 else 'are'} left out" if more else ""
            log.warning("%s has other classes than these data: %s.", path, "; ".join(filter(None, (lacks, extra))))
        else:
            log.info("The classes of %s are those of the data in another order: they are mapped by name.", path)
        return order

    def _kind_of(self, split: str) -> str:
        """Returns what the numbers of a table are; says so where the file does not. Raises `UserError` for the wrong width."""
        table, path = self.file.tables[split]["logits"], self.file.path
        width, classes = table.values.shape[-1], self.file.classes
        if table.indices is None and self.width is not None and width != self.width:
            if classes is not None:
                raise UserError(
                    f"{path} names {len(classes)} classes and has {width} numbers for each sample: give one a class."
                )
            names = _some(getattr(self.data, "class_names", ()))
            raise UserError(
                f"{path} has {width} numbers for each sample and names no classes, and these data have {self.width} outputs "
                f"({names}): give one for each, or the classes that they are of. Features are named embedding."
            )
        if table.indices is not None:
            self._check_top(table, self.width)
        kind = table.kind or self._guess(table)
        if (kind == "values") != (self.kind == REAL) and kind != "logits":
            raise UserError(f"{path} holds {kind}, and logits of this task are {self.kind}: give logits instead.")
        if kind == "values" and self.units is None:
            raise UserError(f"{path} holds values in the units of the targets, and this task has none: give logits.")
        if table.kind is None and split == "train":
            log.info("%s does not say what its numbers are: they are read as %s.", path, kind)
        then = self.file.manifest.get("units")
        if kind == "logits" and then is not None and then != self.units:
            raise UserError(
                f"The outputs in {path} are in other units than the student's will be ({then} instead of {self.units}): set "
                f"task.mean={then['mean']} task.std={then['std']}."
            )
        return kind

    def _check_top(self, table: Table, count: int | None) -> None:
        assert table.indices is not None
        if self.kind != CATEGORICAL or count is None:
            raise UserError(
                f"{self.file.path} holds the top classes alone, which is for one label a sample and named classes."
            )
        for start, (part,) in chunks(table.indices):
            if bool(((part < 0) | (part >= count)).any()):
                row = start + int(((part < 0) | (part >= count)).flatten(1).any(1).nonzero()[0, 0])
                raise UserError(
                    f"{self.file.path}: row {row} names a class outside of 0 to {count - 1}. Write it anew."
                )
        if self.file.rest not in (None, "spread", "drop"):
            raise UserError(f"{self.file.path}: rest={self.file.rest}; say spread or drop.")

    def _guess(self, table: Table) -> str:
        if self.kind == REAL:
            return "values"
        for _, (part,) in chunks(table.values):
            inside = bool(((part >= 0) & (part <= 1)).all())
            whole = self.kind == BERNOULLI or bool(((part.double().sum(-1) - 1).abs() < 0.02).all())
            if not (inside and whole):
                return "logits"
        return "probabilities"

    def _rows(self, split: str) -> Tensor:
        """Returns the row of each sample by id, -1 for one that the file lacks. Raises `UserError` for ids of other data."""
        table = next(iter(self.file.tables[split].values()))
        count = self._count(split)
        if table.names is not None and table.ids is None:
            return rows_by_name(self.file.path, self.data, "test" if split == "test" else "train", table.names)
        n = len(table.values)
        ids = table.ids.long() if table.ids is not None else torch.arange(n)
        if table.ids is None and count is not None and n != count:
            whole = "all of the training files, those that are validated on too" if split != "test" else "test samples"
            raise UserError(
                f"{self.file.path} has {n:,} rows for {split} samples and no ids, and these data have {count:,} ({whole}): "
                "give a row for each in the data's order, or ids, or file names."
            )
        size = count if count is not None else int(ids.max()) + 1
        beyond = ids[(ids < 0) | (ids >= size)]
        if len(beyond):
            raise UserError(
                f"{self.file.path}: {len(beyond):,} of {n:,} ids of {split} samples are none of these data's, which go from 0 "
                f"to {size - 1}; the first is {int(beyond[0])}. Is it a file for other data?"
            )
        rows = torch.full((size,), -1, dtype=torch.int64)
        rows[ids] = torch.arange(n)
        return rows

    def _count(self, split: str) -> int | None:
        """Returns the number of samples in the files of a split, whose ids count from 0; None without data."""
        if self.data is None:
            return None
        if split != "test":
            return len(self.data.train_targets)
        return int(self.data.test_ids.max()) + 1 if len(self.data.test_ids) else 0

    def _find(self, split: str, ids: Tensor) -> tuple[str, Tensor] | None:
        """Returns the split of the file that has these samples, and their rows; None where it has no such split."""
        names = {"train": ("train",), "test": ("test",), "val": ("val", "train")}[split]
        if split == "val" and (self.views or self.data is None):
            names = ("val",)  # as the samples are, unaugmented; a loader may count its validation samples anew
        for name in names:
            if name in self.rows:
                known = self.rows[name]
                inside = (ids >= 0) & (ids < len(known))
                return name, torch.where(inside, known[ids.clamp(0, len(known) - 1)], -1)
        return None

    def _check_images(self, data: IndexedData) -> None:
        """Raises `UserError` for outputs of other images or views."""
        path, then = self.file.path, self.file.manifest.get("data") or {}
        if then.get("val") is not None and then["val"] != data.identity("val"):
            raise UserError(
                f"{path} has the outputs of other images: it was written for {then.get('name')} with the digest "
                f"{then['val'][:12]}…, and these data have {data.identity('val')[:12]}…. Write it anew for these data."
            )
        self._check_views(data, then)

    def _check_samples(self, data: IndexedData) -> None:
        """Raises `UserError` where training samples are missing; says which other splits are."""
        path, ids = self.file.path, data.train_ids
        _, rows = self._find("train", ids) or ("", ids)
        missing = ids[rows < 0]
        if len(missing):
            raise UserError(
                f"{path} has no outputs of {len(missing):,} of {len(ids):,} training samples, the first is "
                f"{self._first_of('train', missing)}: {REMEDY}"
            )
        for split, words in (("val", "the validation set"), ("test", "the test set")):
            if self.judges(split):
                continue
            if not self.reads_labels:
                raise UserError(
                    f"{path} lacks outputs of {words}, and this task measures a student by nothing else: {REMEDY}"
                )
            log.info("The teacher is not judged on %s: %s lacks outputs of its samples as they are.", words, path)

    def judges(self, split: str) -> bool:
        """Returns whether the file has every sample of "val" or "test", as it is without augmentation."""
        if self.data is None:
            return split in self.rows
        found = self._find(split, split_ids(self.data, split))
        return found is not None and bool((found[1] >= 0).all())

    def _check_views(self, data: IndexedData, then: dict[str, Any]) -> None:
        path, k = self.file.path, self.views
        if not k:
            if getattr(data, "mix", None) is not None:
                raise UserError(f"{path} has outputs of single images, and these data mix them: set data.mix=null.")
            if data.draws_views:
                log.warning(
                    "%s has one output a sample, and the data draw views of it: each view is taught what the sample is. "
                    "`litdistill outputs … views=8` writes the outputs of each view.",
                    path,
                )
            return
        said, now = self.file.manifest["views"], view_facts(data)
        seed = said.get("view_seed")
        remedy = f"set data.fixed_views={k} data.view_seed={seed} and its augmentation, or write a file of these views"
        if not data.draws_views:
            raise UserError(f"{path} has {quantity(k, 'view')} of each image, and these data draw none: {remedy}.")
        for key, words in (("augment", "augmentation"), ("mix", "mixing"), ("view_seed", "view seed")):
            if key in said and said[key] != now.get(key):
                raise UserError(
                    f"{path} has views of another {words} ({said[key]}, and now {now.get(key)}): {remedy}."[:600]
                )
        if (drawn := data.view_count(ALL_ROUNDS)) > k:
            drawn_words = "a new one in each round" if drawn >= ALL_ROUNDS else str(drawn)
            raise UserError(
                f"{path} has {quantity(k, 'view')} of each image, and these data draw {drawn_words}: {remedy}."
            )
        if then.get("train") is not None and then["train"] != data.identity("train"):
            raise UserError(f"{path} has other views than these data draw: {remedy}.")

    def _first_of(self, split: str, ids: Tensor) -> str:
        """Returns the first of these ids in words, with its file name where the data know it."""
        names = getattr(self.data, "sample_names", None)
        known = names("test" if split == "test" else "train") if callable(names) else None
        return f"id {int(ids[0])}" + (f" ({known[int(ids[0])]})" if known else "")

    # -- numbers -------------------------------------------------------------------------------------------------------

    def _head(self, split: str, head: str, rows: Tensor, views: Tensor | None) -> Tensor:
        """Returns one head of the rows (N,), float32."""
        table = self.file.tables[split][head]
        parts = (table.values, table.indices, table.rest)
        if split == "train" and self.views:
            index = rows * self.views + (views if views is not None else 0)
            values, indices, rest = (None if t is None else t.flatten(0, 1)[index] for t in parts)
        else:
            values, indices, rest = (None if t is None else t[rows] for t in parts)
        assert values is not None
        if head == EMBEDDING:
            return values.float()
        logits = to_logits(values, self.kinds[split], self.kind, self.units)
        if indices is not None:
            assert self.width is not None
            others = None if self.file.rest == "drop" else log_rest(values, rest, self.kinds[split])
            logits = of_all_classes(logits, indices.long(), others, self.width)
        return self._in_order(logits)

    def _in_order(self, logits: Tensor) -> Tensor:
        """Returns logits in the order of the data's classes, −∞ for one that the file lacks."""
        if self.order is None:
            return logits
        order = torch.tensor(self.order)
        return torch.where(order >= 0, logits[..., order.clamp(min=0)], -math.inf)


REMEDY = "write the file for these data, or train on the samples that it has (data.fraction, data.omit)."


def view_facts(data: Any) -> dict[str, Any]:
    """Returns what the views of data with ids depend on, in plain values: augmentations, mixing and the view seed."""
    mix = getattr(data, "mix", None)
    return {
        "augment": str([stable_repr(a) for a in getattr(data, "augment", None) or ()]),
        "mix": None if mix is None else str(stable_repr(mix)),
        "view_seed": getattr(data, "view_seed", None),
    }


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:10])) + (", …" if len(names) > 10 else "")
