"""The losses that `method=pairs` takes by name, and what each compares of two features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from litdistill.losses import logits, maps, relations, values


class Loss(NamedTuple):
    """A function of (student, teacher, **options) that returns a scalar, and the layout in which it takes both features.

    Layouts: "values": one shape (N, C, ...). "places": the same, and with positions. "maps": (N, C, H, W) of one size.
    "channels": with positions, whose number may differ. "rows": (rows, C), each position a row. "samples": whatever a
    sample's values, which are flattened.
    `widths`: whether both need the same number of channels. `kind`: of logits, for those whose formula is defined for one.
    `fewest_classes`: with fewer, it compares no more than decisions.
    """

    function: Callable[..., Tensor]
    layout: str = "values"
    widths: bool = True
    kind: str | None = None
    fewest_classes: int = 2


CATEGORICAL, BERNOULLI = "categorical", "bernoulli"

LOSSES: dict[str, Loss] = {
    "mse": Loss(values.mse),
    "l1": Loss(values.l1),
    "smooth_l1": Loss(values.smooth_l1),
    "cosine": Loss(values.cosine),
    "pearson": Loss(values.pearson),
    "boundary": Loss(values.boundary),
    "partial_l2": Loss(values.partial_l2),
    "log_power": Loss(values.log_power),
    "consecutive": Loss(values.consecutive),
    "half_squared": Loss(logits.half_squared),
    "kl": Loss(logits.kl, kind=CATEGORICAL),
    "soft_cross_entropy": Loss(logits.soft_cross_entropy, kind=CATEGORICAL),
    "pseudo_label": Loss(logits.pseudo_label, kind=CATEGORICAL),
    "standardized_kl": Loss(logits.standardized_kl, kind=CATEGORICAL, fewest_classes=3),
    "transformed_kl": Loss(logits.transformed_kl, kind=CATEGORICAL),
    "inter_class": Loss(logits.inter_class, "rows", kind=CATEGORICAL, fewest_classes=3),
    "intra_class": Loss(logits.intra_class, "rows", kind=CATEGORICAL),
    "sample_gram": Loss(logits.sample_gram, "rows", kind=CATEGORICAL),
    "class_gram": Loss(logits.class_gram, "rows", kind=CATEGORICAL),
    "binary_kl": Loss(logits.binary_kl, kind=BERNOULLI),
    "kl_places": Loss(maps.kl_places, "places"),
    "attention": Loss(maps.attention, "places", widths=False),
    "mmd": Loss(maps.mmd, "places", widths=False),
    "factor": Loss(maps.factor, "places"),
    "pyramid": Loss(maps.pyramid, "maps"),
    "channel_correlation": Loss(maps.channel_correlation, "channels"),
    "similarity": Loss(relations.similarity, "samples", widths=False),
    "cosines": Loss(relations.cosines, "samples", widths=False),
    "distances": Loss(relations.distances, "samples", widths=False),
    "angles": Loss(relations.angles, "samples", widths=False),
    "neighbors": Loss(relations.neighbors, "samples", widths=False),
    "gaussian": Loss(relations.gaussian, "samples", widths=False),
}
