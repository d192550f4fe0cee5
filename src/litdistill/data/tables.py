"""Tables that need no file: rows of features, (N, F) float32, with targets of any kind. `own_table` reads one's own.

    python scripts/train.py data=breast_cancer net@student=mlp net@teacher=mlp
    python scripts/train.py data=diabetes task=regression net@student=mlp net@teacher=mlp

Networks standardize the features by `mean` and `std` (`litdistill.models.preprocess`), so an exported file takes raw ones, too;
how columns become features (`litdistill.data.encoding`) is in its manifest, so `predict` takes a table of the same columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine, make_multilabel_classification
from torch import Tensor

from litdistill.data import encoding as enc
from litdistill.data.columns import Table
from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.utils.modality import TABLE, Modality

SHOWN = 8  # columns of a row in words


def breast_cancer(**options: Any) -> TensorData:
    """Returns scikit-learn's 569 tumors: thirty measurements of cell nuclei, and whether each is malignant or benign.

    Street, Wolberg & Mangasarian 1993. `options`: those of `TensorData`.
    """
    read = functools.partial(_bundled, load_breast_cancer)
    return TensorData(read, "breast_cancer", "classification", standardize=True, **options)


def wine(**options: Any) -> TensorData:
    """Returns scikit-learn's 178 wines: thirteen chemical measurements, and which of three growers made each.

    Aeberhard & Forina 1992. `options`: those of `TensorData`.
    """
    return TensorData(functools.partial(_bundled, load_wine), "wine", "classification", standardize=True, **options)


def diabetes(**options: Any) -> TensorData:
    """Returns scikit-learn's 442 patients: ten measurements, and the disease progression a year later, 25 to 346.

    Efron et al. 2004 (arXiv math/0406456). Targets are as published; the regression task standardizes them.
    `options`: those of `TensorData`.
    """
    read = functools.partial(_bundled, functools.partial(load_diabetes, scaled=False))
    return TensorData(read, "diabetes", "regression", standardize=True, **options)


def multilabel(**options: Any) -> TensorData:
    """Returns 2,000 synthetic samples of 40 word counts with any number of 10 labels; the same on every machine.

    `sklearn.datasets.make_multilabel_classification` with `random_state=0`. `options`: those of `TensorData`.
    """
    return TensorData(_read_multilabel, "multilabel", "multilabel", standardize=True, **options)


def _bundled(load: Callable[[], Any]) -> TensorSource:
    found = load()
    classes = found.get("target_names")
    targets = torch.from_numpy(found.target.astype(np.int64)) if classes is not None else _float(found.target)[:, None]
    names = tuple(map(str, classes)) if classes is not None else ("disease progression",)
    return _source(_float(found.data), targets, names, list(map(str, found.feature_names)))


def _read_multilabel() -> TensorSource:
    inputs, targets = make_multilabel_classification(
        n_samples=2000, n_features=40, n_classes=10, n_labels=3, length=60, random_state=0
    )
    names = tuple(f"label {i}" for i in range(10))
    return _source(_float(inputs), _float(targets), names, [f"word {i}" for i in range(40)])


def _source(inputs: Tensor, targets: Tensor, names: tuple[str, ...], features: Sequence[str]) -> TensorSource:
    """Returns a data set of numbers alone, as a table of these columns is read by `predict`."""
    options = enc.Encoding(tuple(enc.Column(name) for name in features)).options()
    return TensorSource(
        TensorSplit(inputs, targets), None, names, Modality(TABLE, options), show=in_words({"train": inputs}, features)
    )


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def in_words(
    inputs: Mapping[str, Tensor], features: Sequence[str], tables: Mapping[str, Table] | None = None
) -> Callable[[str, int], str]:
    """Returns a function that says a row: where it stands, and the features furthest from the training mean, in deviations."""
    mean, std = inputs["train"].mean(0), inputs["train"].std(0).clamp(min=1e-12)

    def show(split: str, i: int) -> str:
        row = inputs[split][i]
        far = ((row - mean) / std).nan_to_num()
        order = far.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
        place = f"{tables[split].place(i)}: " if tables is not None else ""
        return place + ", ".join(f"{features[j]} {float(row[j]):.4g} ({float(far[j]):+.1f} σ)" for j in order)

    return show
