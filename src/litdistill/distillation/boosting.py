"""Gradient boosting as a teacher of tables: scikit-learn's, through a file of its outputs by sample.

    python scripts/train.py data=breast_cancer net@student=mlp teacher.outputs=boosting

Boosting fits its training rows nearly exactly, so what it says of them is hardly more than their labels. Each such row is
therefore predicted by a model of the other folds (Wolpert 1992, stacked generalization); `boosting_in_sample` skips that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.types import has_label
from litdistill.utils.distributed import broadcast_from_rank0, is_first_rank
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_atomically
from litdistill.utils.units import quantity

log = logging.getLogger(__name__)

FOLDS = {"boosting": 5, "boosting_in_sample": 0}  # by the name that stands for such a file
FOLD_SEED = -3  # of the folds, the same for every run
Predict = Callable[[np.ndarray], np.ndarray]  # (n, F) -> (n, outputs): probabilities, or values


def boosted_outputs(name: str, data: Any, kind: str, folder: Path) -> Path:
    """Returns the file of the outputs of gradient boosting for these data, which is written into `folder` unless it is there.

    Only training samples with a label are fitted, as they are trained on: not those of the validation set. `name`: one of
    `FOLDS`. `kind`: of the task's logits. Raises `UserError` for data that are no rows of features.
    """
    targets, ids = data.train_targets, data.train_ids
    ids = ids[has_label(targets[ids])]
    if len(data.input_shape or ()) != 1 or getattr(getattr(data, "modality", None), "kind", None) != "table":
        raise UserError(
            f"teacher.outputs={name}: gradient boosting learns from tables, and {data.name} is none: name a network."
        )
    facts = (
        name,
        data.identity("train"),
        data.identity("test"),
        ids.tolist(),
        targets[ids].tolist(),
        kind,
        importlib.metadata.version("scikit-learn"),
    )
    path = folder / f"{name}-{data.name}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}.npz"
    if is_first_rank() and not path.is_file():
        start = time.perf_counter()
        found = _fitted(data, targets, ids, kind, FOLDS[name])
        write_atomically(path, lambda place: _save(place, found))
        how = f" and of {FOLDS[name]} folds for their own outputs" if FOLDS[name] else ""
        took = time.perf_counter() - start
        log.info(
            "Fitted gradient boosting to %s%s, in %.1f s: %s", quantity(len(ids), "training sample"), how, took, path
        )
    broadcast_from_rank0(True)  # others wait until the file is there
    return path


def _save(place: Path, found: dict[str, np.ndarray]) -> None:
    with place.open("wb") as opened:
        np.savez(opened, **found)  # type: ignore[arg-type]


def _fitted(data: Any, targets: Tensor, ids: Tensor, kind: str, folds: int) -> dict[str, np.ndarray]:
    """Returns the arrays of the file: outputs for all samples of the training files, and for those of the test set."""
    split = {name: data.get_batch(name, torch.arange(count)).inputs.numpy() for name, count in _counts(data).items()}
    inputs, truth, rows = split["train"], targets.numpy(), ids.numpy()
    outputs = data.num_classes
    whole = _fit(inputs[rows], truth[rows], kind, outputs)
    train = whole(inputs)
    fold = aug.order(FOLD_SEED, 0, ids).argsort().argsort().numpy() % folds if folds else np.zeros(0)
    for number in range(folds):
        held = fold == number
        train[rows[held]] = _fit(inputs[rows[~held]], truth[rows[~held]], kind, outputs)(inputs[rows[held]])
    head = "values" if kind == "real" else "probabilities"
    return {head: train, f"test.{head}": whole(split["test"]), "classes": np.array(data.class_names)}


def _counts(data: Any) -> dict[str, int]:
    return {"train": len(data.train_targets), "test": data.count("test")}


def _fit(inputs: np.ndarray, targets: np.ndarray, kind: str, outputs: int) -> Predict:
    """Returns the predictions of scikit-learn's histogram gradient boosting at its defaults, but with every sample fitted.

    By default 10,000 samples or more would leave a tenth out, to stop early on.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    options: dict[str, Any] = {"random_state": 0, "early_stopping": False}
    if kind == "categorical":
        known = np.unique(targets)
        if len(known) < 2:
            raise UserError("teacher.outputs=boosting: its training samples are of one class. Keep more labels.")
        model = HistGradientBoostingClassifier(**options).fit(inputs, targets)

        def classes(rows: np.ndarray) -> np.ndarray:
            found = np.zeros((len(rows), outputs))
            found[:, known] = model.predict_proba(rows)  # a class of none of these samples has no probability
            return found

        return classes
    if kind == "bernoulli":
        columns = [_label(inputs, column, options) for column in (targets > 0.5).T]
    else:
        matrix = targets if targets.ndim == 2 else targets[:, None]
        columns = [HistGradientBoostingRegressor(**options).fit(inputs, column).predict for column in matrix.T]
    return lambda rows: np.stack([column(rows) for column in columns], axis=1)


def _label(inputs: np.ndarray, truth: np.ndarray, options: dict[str, Any]) -> Predict:
    """Returns the probability of one label; of one that is the same everywhere that share."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    if truth.all() or not truth.any():
        share = float(truth.mean())
        return lambda rows: np.full(len(rows), share)
    model = HistGradientBoostingClassifier(**options).fit(inputs, truth)
    return lambda rows: model.predict_proba(rows)[:, 1]
