"""Chooses the precision of a training where the config leaves it to the device: bfloat16 on a GPU, float32 on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

log = logging.getLogger(__name__)

GPU = ("auto", "gpu", "cuda")  # accelerators that are a CUDA device where there is one


def precision_of(options: Mapping[str, Any]) -> Any:
    """Returns the Trainer's precision for its `options`; "auto" is bf16-mixed on a GPU with instructions for it, else 32-true.

    Weights, sums and losses are float32 in both; bf16-mixed rounds the operands of convolutions and matrix products to 8 bits.
    """
    wanted = options.get("precision")
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available() or str(options.get("accelerator") or "auto") not in GPU:
        return "32-true"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        log.info("Precision: 32-true, since this GPU has no instructions for bfloat16.")
        return "32-true"
    log.info(
        "Precision: bf16-mixed, the default on a GPU: it rounds the operands of products to bfloat16. "
        "trainer.precision=32-true rounds them to TF32."
    )
    return "bf16-mixed"
