"""Knowledge distillation with PyTorch Lightning: a small, fast student that is nearly as good as its teacher.

    from litdistill import KD, distill
    distiller = distill(student, teacher, train, val, method=KD(), max_epochs=10)
    distiller.deployed_student

Names are imported when they are first used: what needs no torch, as a prediction with an ONNX file, does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litdistill.distillation.distiller import Distiller
    from litdistill.distillation.outputs_tables import read_outputs
    from litdistill.distillation.teacher import FrozenTeacher
    from litdistill.export.load import load_student
    from litdistill.features.feature_extractor import FeatureExtractor
    from litdistill.methods import (
        AB,
        ARD,
        AT,
        CC,
        CRD,
        CWD,
        DIST,
        DKD,
        FSP,
        FT,
        ICKD,
        KD,
        KDSVD,
        MFT,
        MGD,
        MLKD,
        NKD,
        NST,
        OFD,
        PKD,
        PKT,
        RKD,
        RSLAD,
        SP,
        SRD,
        SRRL,
        VID,
        WKD,
        WTTM,
        BinaryKD,
        Cosine,
        FitNet,
        HardPseudoLabel,
        LogitMSE,
        Mutual,
        Online,
        Pairs,
        ReviewKD,
        Shuffled,
        SimKD,
        SoftTargetCE,
        Sum,
        Supervised,
        TeacherFree,
    )
    from litdistill.methods.base import Method
    from litdistill.methods.pairs import Pair
    from litdistill.models.ensemble import Ensemble
    from litdistill.tasks import Classification, Detection, Embedding, LanguageModel, MultiLabel, Regression, Task
    from litdistill.tasks.detection.dense_kd import DenseKD
    from litdistill.tasks.detection.fcos import fcos_slim
    from litdistill.training.distill import distill
    from litdistill.training.run import run
    from litdistill.types import Batch, Outputs, Taps

    __version__: str

__all__ = [
    "AB",
    "ARD",
    "AT",
    "CC",
    "CRD",
    "CWD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "ICKD",
    "KD",
    "KDSVD",
    "MFT",
    "MGD",
    "MLKD",
    "NKD",
    "NST",
    "OFD",
    "PKD",
    "PKT",
    "RKD",
    "RSLAD",
    "SP",
    "SRD",
    "SRRL",
    "VID",
    "WKD",
    "WTTM",
    "Batch",
    "BinaryKD",
    "Classification",
    "Cosine",
    "DenseKD",
    "Detection",
    "Distiller",
    "Embedding",
    "Ensemble",
    "FeatureExtractor",
    "FitNet",
    "FrozenTeacher",
    "HardPseudoLabel",
    "LanguageModel",
    "LogitMSE",
    "Method",
    "MultiLabel",
    "Mutual",
    "Online",
    "Outputs",
    "Pair",
    "Pairs",
    "Regression",
    "ReviewKD",
    "Shuffled",
    "SimKD",
    "SoftTargetCE",
    "Sum",
    "Supervised",
    "Taps",
    "Task",
    "TeacherFree",
    "__version__",
    "distill",
    "fcos_slim",
    "load_student",
    "read_outputs",
    "run",
]

# Where each name comes from; all others are methods.
_MODULES = {
    "distill": "litdistill.training.distill",
    "run": "litdistill.training.run",
    "load_student": "litdistill.export.load",
    "read_outputs": "litdistill.distillation.outputs_tables",
    "Distiller": "litdistill.distillation.distiller",
    "FrozenTeacher": "litdistill.distillation.teacher",
    "Ensemble": "litdistill.models.ensemble",
    "FeatureExtractor": "litdistill.features.feature_extractor",
    "Method": "litdistill.methods.base",
    "Pair": "litdistill.methods.pairs",
    "Task": "litdistill.tasks",
    "Classification": "litdistill.tasks",
    "Detection": "litdistill.tasks",
    "Embedding": "litdistill.tasks",
    "MultiLabel": "litdistill.tasks",
    "Regression": "litdistill.tasks",
    "LanguageModel": "litdistill.tasks",
    "DenseKD": "litdistill.tasks.detection.dense_kd",
    "fcos_slim": "litdistill.tasks.detection.fcos",
    "Batch": "litdistill.types",
    "Outputs": "litdistill.types",
    "Taps": "litdistill.types",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        from litdistill.utils.versions import version

        value: Any = version("litdistill") or "unknown"  # sources that are not installed have no version
    else:
        value = getattr(importlib.import_module(_MODULES.get(name, "litdistill.methods")), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
