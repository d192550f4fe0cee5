"""Targets that follow their augmented images: boxes and masks under crops, flips and resizing.

An augmentation that moves pixels says how by `affine(code, height, width)`: (N, 4) float32 `ax, bx, ay, by` for each image,
so that the point (x, y) of the image goes to (ax·x + bx, ay·y + by); points are on pixel edges, and the image is 0 to its
width, 0 to its height. One that moves none says `moves = False`. Both follow from the codes of the view alone, as pixels do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.utils.errors import UserError

Geometry = Literal["boxes", "mask"]
IGNORED = 255  # the class of a pixel of a mask that counts for nothing
VISIBLE = 0.25  # a box of which less is left in the view is left out, and so is one narrower than a pixel


def check_followed(augment: Sequence[Any], geometry: Geometry | None) -> None:
    """Raises `UserError` for an augmentation that boxes or masks cannot follow."""
    if geometry is None:
        return
    for step in augment:
        if not hasattr(step, "affine") and getattr(step, "moves", True):
            raise UserError(
                f"data.augment has {type(step).__name__}, and nothing says how {geometry} follow it: use Flip, Crop, "
                "RandomResizedCrop, ColorJitter, Cutout and RandomErasing, or give one of your own the method affine, or "
                "moves = False where it moves no pixel."
            )


class Moves(NamedTuple):
    """How the points of N images moved into their views."""

    affine: Tensor  # (N, 4): ax, bx, ay, by
    window: Tensor  # (N, 4): x1, y1, x2, y2 of the part of each view that shows the image; the rest is padding
    size: tuple[int, int]  # height and width of the views


def moves_of(augment: Sequence[Any], views: Tensor, seed: int, ids: Tensor, size: Sequence[int]) -> Moves:
    """Returns the moves of all augmentations, one after the other, of images of this height and width in the views (N,) that
    `augment.draw_views` numbers."""
    height, width = size
    one = torch.ones(len(views), device=views.device)
    affine = torch.stack([one, 0 * one, one, 0 * one], 1)
    window = torch.stack([0 * one, 0 * one, width * one, height * one], 1)
    for step, code in zip(augment, _codes(augment, views, seed, ids), strict=True):
        if not hasattr(step, "affine"):
            continue
        ax, bx, ay, by = (v[:, None] for v in step.affine(code, height, width).unbind(1))
        affine = torch.cat(
            [ax * affine[:, :1], ax * affine[:, 1:2] + bx, ay * affine[:, 2:3], ay * affine[:, 3:] + by], 1
        )
        height, width = step.output_size(height, width) if hasattr(step, "output_size") else (height, width)
        x, y = _moved(window, torch.cat([ax, bx, ay, by], 1))
        x, y = x.clamp(0, width), y.clamp(0, height)
        window = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    return Moves(affine, window, (height, width))


def _moved(corners: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the left and right, and the upper and lower sides (…, 2) of boxes (…, 4) that are moved by `affine` (…, 4)."""
    ax, bx, ay, by = (v[..., None] for v in affine.unbind(-1))
    x, y = corners[..., 0::2] * ax + bx, corners[..., 1::2] * ay + by
    return x.sort(-1).values, y.sort(-1).values  # a flip exchanges the sides


def follow(geometry: Geometry, targets: Tensor, moves: Moves) -> Tensor:
    """Returns the targets of the views: boxes (N, M, 6), or masks (N, H, W)."""
    return move_boxes(targets, moves) if geometry == "boxes" else move_masks(targets, moves)


def move_boxes(targets: Tensor, moves: Moves) -> Tensor:
    """Returns boxes (N, M, 6) moved and clipped to what is seen; columns as in `litdistill.tasks.detection.boxes`.

    The class becomes −1 of a box of which less than `VISIBLE` of the area, or less than a pixel, is left. Images without
    labels, all NaN, stay so.
    """
    x, y = _moved(targets[..., :4], moves.affine[:, None])
    area = (x[..., 1] - x[..., 0]) * (y[..., 1] - y[..., 0])
    left, up, right, down = (v[:, None, None] for v in moves.window.unbind(1))
    x, y = x.clamp(left, right), y.clamp(up, down)
    wide, tall = x[..., 1] - x[..., 0], y[..., 1] - y[..., 0]
    gone = (wide * tall < VISIBLE * area) | (wide < 1) | (tall < 1)
    corners = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
    absent = targets[..., 4:5] < 0  # False for NaN
    corners = torch.where(absent, targets[..., :4], corners)
    label = torch.where(gone & ~targets[..., 4].isnan(), -1.0, targets[..., 4])
    return torch.cat([corners, label[..., None], targets[..., 5:]], -1)


def move_masks(targets: Tensor, moves: Moves) -> Tensor:
    """Returns masks (N, H, W) moved: the class of the nearest pixel, `IGNORED` where the image is not seen.

    Images without labels, all −1, stay so.
    """
    height, width = targets.shape[1:]
    rows, seen_rows = _read_from(moves, 1, moves.size[0], height)
    cols, seen_cols = _read_from(moves, 0, moves.size[1], width)
    index = rows[:, :, None] * width + cols[:, None, :]
    moved = targets.flatten(1).gather(1, index.flatten(1)).view(index.shape)
    unlabelled = (targets < 0).flatten(1).all(1)[:, None, None]
    return torch.where((seen_rows[:, :, None] & seen_cols[:, None, :]) | unlabelled, moved, IGNORED)


def _read_from(moves: Moves, axis: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns the pixel, of `size`, that each pixel of the views is read from, (N, count), and whether it shows the image."""
    a, b = moves.affine[:, 2 * axis, None], moves.affine[:, 2 * axis + 1, None]
    center = torch.arange(count, device=a.device) + 0.5
    seen = (center > moves.window[:, axis, None]) & (center < moves.window[:, axis + 2, None])
    return ((center - b) / a).floor().long().clamp(0, size - 1), seen


def _codes(augment: Sequence[Any], view: Tensor, seed: int, ids: Tensor) -> list[Tensor]:
    """Returns the code (N,) of each augmentation."""
    if aug.count_views(augment) is None:
        return [step.draw(aug.random_bits(seed, view, ids, stream)) for stream, step in enumerate(augment, start=1)]
    codes: list[Tensor] = []
    for step in reversed(augment):
        codes.insert(0, view % step.views)
        view = view // step.views
    return codes
