"""Names of the curves in TensorBoard, which sorts its cards by them: the metric and the loss come first."""

from __future__ import annotations

FIRST = (
    "accuracy",
    "map",
    "rmse",
    "spearman",
)  # metrics that select the epoch: a group each, with student, teacher and training
LIKE = ("agreement", "kl", "deviation", "cosine")  # of student and teacher
SCORES = (*FIRST, *LIKE, "absolute_error", "pseudo_share")  # measured in training beside the terms of the loss
DROPPED = ("epoch", "step")  # the x axis has them


def tag(name: str) -> str | None:
    """Returns the tag of a logged value, `<group>/<curve>`; None for values that are no curve.

    `val/accuracy` is `accuracy/validation`, `val/teacher_accuracy` `accuracy/teacher`, `train/loss` `loss/total`, a term of
    the loss `loss/<term>`, other metrics of the validation `validation/<metric>`, and `lr-Adam` `rate/Adam`.
    """
    if name in DROPPED:
        return None
    group, _, what = name.partition("/")
    if group == "watched":
        return f"{what.removeprefix('test_')}/test"
    if group == "val" and what.startswith("teacher_"):
        return f"{what.removeprefix('teacher_')}/teacher"
    if group == "val":
        return f"{what}/validation" if what in FIRST else _like(what, "validation") or f"validation/{what}"
    if group == "train":
        score = f"{what}/training" if what in FIRST else _like(what, "training") or f"training/{what}"
        return score if what in SCORES else f"loss/{'total' if what == 'loss' else what}"
    return f"rate/{name.removeprefix('lr-')}" if name.startswith("lr-") else name


def _like(what: str, split: str) -> str | None:
    return f"teacher/{what}_{split}" if what in LIKE else None
