"""Adapter for any LightningDataModule: gives a run the validation and test batches and the facts of its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from litdistill.data import augment as aug
from litdistill.data.protocol import split_ids, training_labels
from litdistill.types import Batch
from litdistill.utils.errors import UserError
from litdistill.utils.shapes import described


class ForeignData:
    """The view of a run on a data module without ids and views.

    Args:
        module: prepared and set up for a fit. Its optional attributes: `name`, `class_names`, `num_classes`, `input_shape`,
            `mean` and `std` (of images on the scale 0 to 1; without them, networks do not normalize their inputs), and
            `train_labels` ("all", "some" or "none" of the training samples have a label; others have a target of -1).
        to_batch: converts a batch of its loaders to a `Batch` (`Task.batch`).
    """

    def __init__(self, module: LightningDataModule, to_batch: Callable[[Any], Batch]):
        for split in ("val", "test"):
            if not offers(module, split):
                raise UserError(
                    f"{type(module).__name__} has no {split}_dataloader: a run chooses its epoch on the validation set and is "
                    "measured on the test set, so give it both; litdistill.distill() asks for neither."
                )
        self.module, self.to_batch = module, to_batch
        self.example = to_batch(first_batch(module.train_dataloader(), module))
        self.name: str = getattr(module, "name", None) or type(module).__name__
        self.mean, self.std = getattr(module, "mean", None), getattr(module, "std", None)
        self.train_labels = training_labels(module)
        self._tested = False

    @property
    def batch_size(self) -> int:
        """Samples of a minibatch of each process, as of the first one."""
        return len(self.example.targets)

    def batches_of_epoch(self) -> int | None:
        """The minibatches of the training loader; None where it has no length."""
        try:
            return len(self.module.train_dataloader())
        except TypeError:
            return None

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Returns the shape of one input sample; None where inputs are no single tensor."""
        inputs = self.example.inputs
        return getattr(self.module, "input_shape", None) or (
            tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else None
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of classes, labels or values in the order of the outputs; empty where the module has none."""
        names = getattr(self.module, "class_names", None)
        count = getattr(self.module, "num_classes", None) or 0
        return tuple(map(str, names)) if names is not None else tuple(map(str, range(count)))

    @property
    def num_classes(self) -> int | None:
        """Returns the number of outputs of a network; None where the module does not define it."""
        return len(self.class_names) or None

    def count(self, split: str) -> int | None:
        """Returns the number of samples of "train", "val" or "test"; None where the loader's data set has no length."""
        try:
            return len(self._loader(split).dataset)
        except (AttributeError, TypeError):
            return None

    def batches(self, split: str, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yields all batches of "val" or "test" in order."""
        for raw in self._loader(split):
            yield self.to_batch(transferred(self.module, raw, torch.device(device)))

    def _loader(self, split: str) -> Any:
        if split == "test" and not self._tested:
            self.module.setup("test")
            self._tested = True
        loader = getattr(self.module, f"{split}_dataloader")()
        if loader is None or isinstance(loader, (list, dict)):
            raise UserError(f"{type(self.module).__name__}.{split}_dataloader() should give one loader.")
        return loader


def sample_count(data: Any, split: str) -> int | None:
    """Returns the number of samples of "train", "val" or "test"; None if unknown."""
    return data.count(split) if isinstance(data, ForeignData) else len(split_ids(data, split))


def output_names(data: Any, count: int) -> tuple[str, ...]:
    """Returns the names of a network's `count` outputs; their indices where the data has no names."""
    return tuple(data.class_names) or tuple(map(str, range(count)))


def training_inputs(data: Any, count: int) -> Any:
    """Returns `Batch.inputs` of `count` training samples without augmentation; for `ForeignData` those of one batch."""
    if isinstance(data, ForeignData):
        return data.example.inputs
    return data.get_batch("train", aug.order(0, 0, data.train_ids)[:count]).inputs


def sample(data: Any, split: str, index: int) -> Tensor | None:
    """Returns the input of the sample at `index` of "val" or "test"; None where it is no single tensor."""
    if not isinstance(data, ForeignData):
        ids = split_ids(data, split)[index : index + 1]
        return data.get_batch("test" if split == "test" else "train", ids).inputs[0]
    for batch in data.batches(split):
        if index < len(batch.targets):
            return batch.inputs[index] if isinstance(batch.inputs, Tensor) else None
        index -= len(batch.targets)
    raise IndexError(index)


def words(data: Any, split: str, index: int) -> str | None:
    """Returns the sample at `index` of "val" or "test" in words; None for data without a method `show(split, id)`."""
    if not callable(show := getattr(data, "show", None)):
        return None
    found: str | None = show("test" if split == "test" else "train", int(split_ids(data, split)[index]))
    return found


def offers(module: LightningDataModule, split: str) -> bool:
    """Returns whether a data module defines its own loader of "val" or "test", in its class or, as one made of data sets
    (`LightningDataModule.from_datasets`), on the object."""
    name = f"{split}_dataloader"
    return name in vars(module) or getattr(type(module), name) is not getattr(LightningDataModule, name)


def transferred(module: LightningDataModule, raw: Any, device: torch.device) -> Any:
    """Returns a batch as a Trainer passes it to its model: on the device, after the data module's transfer hooks."""
    raw = module.on_before_batch_transfer(raw, 0)
    return module.on_after_batch_transfer(module.transfer_batch_to_device(raw, device, 0), 0)


def first_batch(loader: Any, module: LightningDataModule | None = None) -> Any:
    """Returns the first batch of a loader, `transferred` by its data module.

    Raises `UserError` for what is no loader, for an empty one, and for samples of which no batch can be made.
    """
    try:
        batches = iter(loader)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{described(loader)} is no loader of training batches ({error}): give a DataLoader."
        ) from error
    try:
        raw = next(batches)
    except StopIteration as error:
        count = (
            f": its data set has {len(loader.dataset)} samples" if hasattr(loader, "dataset") and sized(loader) else ""
        )
        raise UserError(
            f"The training loader yields no batch ({type(loader).__name__}){count}. With drop_last=True it needs batch_size "
            "samples at least."
        ) from error
    except (TypeError, RuntimeError) as error:
        text = str(error).strip().splitlines()
        known = next((remedy for start, remedy in UNCOLLATED.items() if text and text[-1].startswith(start)), None)
        if known is None:  # an error of the user's own data set
            raise
        raise UserError(f"The samples make no batch: {text[-1]}. {known}") from error
    return raw if module is None else transferred(module, raw, torch.device("cpu"))


# Remedies by the start of what torch's collate function raises, in a worker process too.
UNCOLLATED = {
    "default_collate: batch must contain": "Convert each sample in the data set, for pictures by a transform "
    "(torchvision.transforms.v2.functional.pil_to_tensor), leave out what is no number, or give a collate_fn.",
    "stack expects each tensor to be equal size": "Bring all samples to one size in the data set (a Resize in its "
    "transform), or give a collate_fn that pads them.",
    "Trying to resize storage": "Bring all samples to one size in the data set (a Resize in its transform).",
}


def sized(loader: Any) -> bool:
    """Returns whether the data set of a loader has a length."""
    try:
        return len(loader.dataset) >= 0
    except TypeError:
        return False
