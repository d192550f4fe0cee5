"""Losses between what two networks give: plain functions of (student, teacher) that return a scalar.

    from litdistill import losses
    losses.kl(student_logits, teacher_logits, temperature=4.0)
    losses.attention(student_map, teacher_map)

Both arguments have samples in dimension 0 and channels or classes in dimension 1: (N, C), (N, C, T) or (N, C, H, W). No
function has parameters, draws at random or scales by a weight; all compute in float32 at least, also under autocast. The
methods use these very functions, and `method=pairs` takes any of them by name (`litdistill.losses.named.LOSSES`).
"""

from __future__ import annotations

from litdistill.losses.logits import (
    binary_kl,
    class_gram,
    gram_distance,
    half_squared,
    inter_class,
    intra_class,
    kl,
    pseudo_label,
    sample_gram,
    soft_cross_entropy,
    standardized_kl,
    transformed_kl,
)
from litdistill.losses.maps import attention, channel_correlation, factor, kl_places, mmd, pyramid, same_size
from litdistill.losses.members import members_cross_entropy, members_kl
from litdistill.losses.relations import (
    angles,
    cosines,
    distances,
    distances_and_angles,
    gaussian,
    neighbors,
    similarity,
)
from litdistill.losses.values import (
    boundary,
    consecutive,
    cosine,
    l1,
    log_power,
    mse,
    partial_l2,
    pearson,
    smooth_l1,
)

__all__ = [
    "angles",
    "attention",
    "binary_kl",
    "boundary",
    "channel_correlation",
    "class_gram",
    "consecutive",
    "cosine",
    "cosines",
    "distances",
    "distances_and_angles",
    "factor",
    "gaussian",
    "gram_distance",
    "half_squared",
    "inter_class",
    "intra_class",
    "kl",
    "kl_places",
    "l1",
    "log_power",
    "members_cross_entropy",
    "members_kl",
    "mmd",
    "mse",
    "neighbors",
    "partial_l2",
    "pearson",
    "pseudo_label",
    "pyramid",
    "same_size",
    "sample_gram",
    "similarity",
    "smooth_l1",
    "soft_cross_entropy",
    "standardized_kl",
    "transformed_kl",
]
