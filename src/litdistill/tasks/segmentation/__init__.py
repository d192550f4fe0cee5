"""Semantic segmentation: a class for each pixel; its task, metrics, networks, data and figures.

litdistill train experiment=segmentation/digit_scenes
"""

from __future__ import annotations

from litdistill.tasks.segmentation.task import Segmentation

__all__ = ["Segmentation"]
