"""Tables: rows of features, (N, F) float32, with targets of any kind.

    python scripts/train.py data=diabetes task=regression net@student=mlp net@teacher=mlp
    python scripts/train.py data=multilabel task=multilabel net@student=mlp net@teacher=mlp

Networks standardize the features by `mean` and `std` (`litdistill.models.preprocess`), so an exported file takes raw ones, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_diabetes, make_multilabel_classification
from torch import Tensor

from litdistill.data.tensors import TensorData, TensorSource, TensorSplit
from litdistill.utils.modality import TABLE, Modality


def diabetes(**options: Any) -> TensorData:
    """Returns scikit-learn's 442 patients: ten measurements, and the disease progression a year later, 25 to 346.

    Efron et al. 2004 (arXiv math/0406456). Targets are as published; the regression task standardizes them.
    `options`: those of `TensorData`.
    """
    return TensorData(_read_diabetes, "diabetes", "regression", standardize=True, **options)


def _read_diabetes() -> TensorSource:
    found = load_diabetes(scaled=False)
    split = TensorSplit(_float(found.data), _float(found.target)[:, None])
    return TensorSource(split, None, ("disease progression",), Modality(TABLE))


def multilabel(**options: Any) -> TensorData:
    """Returns 2,000 synthetic samples of 40 word counts with any number of 10 labels; the same on every machine.

    `sklearn.datasets.make_multilabel_classification` with `random_state=0`. `options`: those of `TensorData`.
    """
    return TensorData(_read_multilabel, "multilabel", "multilabel", standardize=True, **options)


def _read_multilabel() -> TensorSource:
    inputs, targets = make_multilabel_classification(
        n_samples=2000, n_features=40, n_classes=10, n_labels=3, length=60, random_state=0
    )
    split = TensorSplit(_float(inputs), _float(targets))
    return TensorSource(split, None, tuple(f"label {i}" for i in range(10)), Modality(TABLE))


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
