"""Augmentations by name, as a command line or a yaml gives them: `data.augment=[Flip,{RandomResizedCrop:{scale:[0.5,1]}}]`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from litdistill.data.augment import Augmentation, Crop, Cutout, Flip
from litdistill.data.colors import ColorJitter
from litdistill.data.crops import RandomErasing, RandomResizedCrop
from litdistill.data.randaugment import RandAugment
from litdistill.data.sound_views import SOUND_VIEWS
from litdistill.utils.errors import UserError

AUGMENTATIONS: dict[str, Any] = {
    made.__name__: made
    for made in (Crop, Flip, Cutout, RandomResizedCrop, ColorJitter, RandAugment, RandomErasing, *SOUND_VIEWS)
}
# What torchvision calls them, and its usual options.
TORCHVISION = {"RandomHorizontalFlip": "Flip", "RandomCrop": "{Crop: {pad: 4}}"}


def augmentations(steps: Any) -> list[Augmentation]:
    """Returns the augmentations of a list of objects, names, and names with options: `[Flip, {Crop: {pad: 4}}]`.

    Raises `UserError` for anything else, with the names and how they are written.
    """
    if isinstance(steps, (str, Mapping)) or not isinstance(steps, Iterable):
        raise UserError(f"data.augment={steps} must be a list of augmentations. {_how_to_write()}")
    return [_augmentation(step) for step in steps]


def _augmentation(step: Any) -> Augmentation:
    if callable(getattr(step, "draw", None)) and callable(getattr(step, "apply", None)):
        return step
    name: Any = step
    options: Any = None
    if isinstance(step, Mapping) and len(step) == 1:
        name, options = next(iter(step.items()))
    made = AUGMENTATIONS.get(name) if isinstance(name, str) else None
    if made is None:
        instead = f" Write {TORCHVISION[name]} for {name}." if name in list(TORCHVISION) else ""
        shown = name if isinstance(name, (str, type)) or isinstance(step, Mapping) else type(step).__name__
        raise UserError(f"data.augment has {shown}, which is no augmentation.{instead} {_how_to_write()}")
    try:
        inspect.signature(made).bind(**(options or {}))
    except TypeError as error:  # also of options that are no mapping
        raise UserError(
            f"data.augment: {name} with {options or 'no options'} does not fit ({error}); it takes "
            f"{name}{inspect.signature(made)}. {_how_to_write()}"
        ) from error
    return made(**(options or {}))


def _how_to_write() -> str:
    return (
        f"There are {', '.join(AUGMENTATIONS)}; on the command line: "
        "'data.augment=[Flip,{RandomResizedCrop:{scale:[0.5,1]}}]'. One of your own: {_target_: my_package.MyAugmentation}."
    )
