"""Any detector of torchvision by name, with published weights or those of a file: one-stage ones as teachers and students,
two-stage ones as teachers.

    net@teacher=torchvision_detector teacher.name=retinanet_resnet50_fpn_v2 teacher.weights=DEFAULT teacher.checkpoint=null
    net@teacher=torchvision_detector teacher.name=fasterrcnn_resnet50_fpn teacher.weights=mine.pth teacher.checkpoint=null
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models
from torchvision.models import detection as zoo

from litdistill.models.adaptations import Published, adapted, preprocess_changes
from litdistill.models.classes import some
from litdistill.models.ensemble import UNKNOWN
from litdistill.models.parts import evaluating, keep_inputs, tensors_only
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.models.torchvision import entry_of, fit_stem
from litdistill.tasks.detection.detector import Detector
from litdistill.tasks.detection.two_stage import TwoStage
from litdistill.utils.checkpoint import COUNTER, load_state_dict_checked, load_weights, names_file, read_metadata
from litdistill.utils.errors import UserError

NO_CLASSES = ("__background__", "N/A")  # in torchvision's list of COCO's categories
TWO_STAGE = ("fasterrcnn", "maskrcnn")
SOFTMAX = ("ssd", *TWO_STAGE)  # with a class for the background, which comes first
# Their batch normalization adds nothing to the variance (torchvision's `overwrite_eps`).
WITHOUT_EPSILON = ("retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")
REMEDY = "Resize the images with preprocess.size, or use net=fcos_slim."
# Where the layer is whose rows are the classes, for each kind of head.
CLASSIFIERS = (
    "roi_heads.box_predictor.cls_score.",
    "head.classification_head.cls_logits.",
    "head.classification_head.module_list.0.",
)


def torchvision_detector(
    num_classes: int,
    input_shape: Sequence[int],
    name: str,
    weights: str | None = None,
    size: int | Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    fetch: bool = True,
) -> nn.Module:
    """Returns the detector `name` of torchvision: of FCOS, RetinaNet, SSD and SSDlite a `Detector`, of Faster R-CNN and Mask
    R-CNN a `TwoStage`, which teaches by its boxes and the maps of its feature pyramid and cannot be trained here.

    `weights`: None; the name of published weights ("DEFAULT", "COCO_V1"); or the path of a file of weights under torchvision's
    keys (.pth, .safetensors). torchvision's mean, std and size come with them, and with every two-stage network. Of the classes
    of published weights, of a file of all their classes, and of a file that names its classes (`classes` in its metadata)
    those of the data are kept, by their names (`class_names`); those that they do not have begin anew, as do all where no name
    fits. Any other file of as many classes as the data's has these, in their order. Without weights the network is built for
    the data's classes.
    `size`: the side, or height and width, to which images are resized in place of torchvision's own.
    `fetch`: False leaves out the loading of `weights`, for a caller that loads others of the same structure.
    Batch normalization of weights has its statistics fixed and learns scale and bias; files are read as tensors only.

    Raises `UserError` for an unknown name, unavailable weights, unsupported images, and a two-stage network none of whose
    classes are the data's.
    """
    known = [n for n in list_models(module=zoo) if not n.startswith("keypoint")]
    if name not in known:
        close = difflib.get_close_matches(name, known, 3) or known
        raise UserError(f"torchvision has no detector {name!r}. Did you mean {', '.join(close)}?")
    model, trained, label = built(name, weights, num_classes, class_names, fetch)
    keep_inputs(model)
    two_stage = name.startswith(TWO_STAGE)
    columns, said = columns_of(trained, class_names, num_classes, not two_stage) if trained else (None, [])
    if label and not trained:
        said = ["its classes are taken to be the data's, in their order"]
    if two_stage:
        net: Detector | TwoStage = TwoStage(model, columns, name)
    else:
        net = Detector(model)
        if columns is not None:
            net.keep_classes(columns, new=True)
    preprocess = published_preprocess(model, input_shape, size) if label or two_stage else None
    shape = tuple(input_shape) if preprocess is None else preprocess.input_shape(input_shape)
    changes = fit_stem(net, name, shape[0], small=False, required=False, keep=label is not None) + said
    check_takes(net, shape, name)
    if preprocess is None:
        return adapted(net, name, changes, label)
    height, width = own_size(model, input_shape)
    own = Published((height, width), "bilinear", 1.0)
    changes += preprocess_changes(input_shape, preprocess, own)
    return adapted(Preprocessed(net, preprocess), name, changes, label)


class Built(NamedTuple):
    """A network of torchvision with its weights, if it has any."""

    model: nn.Module
    trained: list[str]  # the names of its classes without the background; empty where they are the data's
    label: str | None  # of its weights


def built(name: str, weights: str | None, num_classes: int, names: Sequence[str], fetch: bool) -> Built:
    """Returns the network `name` with the published weights of that name, with those of a file, or without weights."""
    background = int(name.startswith(SOFTMAX))
    fetch = fetch and torch.get_default_device().type != "meta"
    if not weights:
        return Built(untrained(name, num_classes + background), [], None)
    if names_file(weights):
        return from_file(name, weights, num_classes, names, background, fetch)
    entry = entry_of(name, weights)
    trained = list(entry.meta["categories"])
    model = untrained(name, len(trained))
    if fetch:
        load_published(model, name, entry)
    if entry.name == "COCO_V1":
        without_epsilon(model, name)
    return Built(model, trained[background:], entry.name)


def untrained(name: str, classes: int) -> nn.Module:
    """Returns the network with initial weights. `classes`: of its classifier, the background included."""
    return get_model(name, weights=None, weights_backbone=None, num_classes=classes)


def without_epsilon(model: nn.Module, name: str) -> None:
    """Sets the epsilon of batch normalization to 0, in place, where torchvision does."""
    if name in WITHOUT_EPSILON:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0


def from_file(name: str, path: str, num_classes: int, names: Sequence[str], background: int, fetch: bool) -> Built:
    """Returns the network with the weights of a file. Without `fetch` it has their structure, and the data's where there is no
    such file.

    Raises `UserError` for a file that is none or does not fit, and for a two-stage network of unknown classes.
    """
    model, label = untrained(name, num_classes + background), Path(path).name
    if not fetch and not Path(path).is_file():
        return Built(model, [], label)
    own = model.state_dict()
    state = load_weights(path, own.keys())
    count = classes_in(state, own, num_classes + background)
    published = list(get_model_weights(name)["COCO_V1"].meta["categories"])
    trained = [*NO_CLASSES[:1] * background, *(read_metadata(path, "classes") or ())]
    if len(trained) != count:
        trained = published if count == len(published) and set(names) & set(published) else []
    if not trained and count != num_classes + background:
        if name.startswith(TWO_STAGE):
            raise UserError(
                f"The weights in {path} are of {count - background} classes without names, and the data have {num_classes}: "
                "name weights of the data's classes, or write their names into its metadata as JSON (save_file(state, path, "
                '{"classes": json.dumps([…])}) of safetensors).'
            )
        trained = [""] * count
    if count != num_classes + background:
        model = untrained(name, count)
    load_state_dict_checked(model, state, path, "network")
    if trained is published and not any(key.endswith(COUNTER) for key in state):
        without_epsilon(model, name)
    return Built(model, trained[background:], label)


def classes_in(state: Mapping[str, Tensor], own: Mapping[str, Tensor], classes: int) -> int:
    """Returns of how many classes weights are, the background included, by those of the same network of `classes`."""
    key = [k for k in own if k.startswith(CLASSIFIERS) and k.endswith(".weight") and own[k].shape[0] % classes == 0][-1]
    return len(state[key]) * classes // len(own[key]) if key in state else classes


def load_published(model: nn.Module, name: str, entry: WeightsEnum) -> None:
    """Loads published weights in place. Raises `UserError` where they cannot be had, or are no plain weights of it."""
    path = f"{torch.hub.get_dir()}/checkpoints/{entry.url.rsplit('/', 1)[-1]}"
    try:
        with tensors_only():
            state = entry.get_state_dict(progress=False, check_hash=True)
        # Theirs is a batch normalization without a counter.
        missing, unexpected = model.load_state_dict(state, strict=False)
    except OSError as error:
        raise UserError(
            f"The weights {entry.name} of {name} could not be had from {entry.url} ({error}): is there a network? "
            f"Use weights=null, or put that file into {torch.hub.get_dir()}/checkpoints."
        ) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} does not hold the plain weights {entry.name} of {name}: delete it and try again."
        ) from error
    if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
        raise UserError(f"{path} does not hold the weights {entry.name} of {name}: delete it and try again.")


def columns_of(
    trained: Sequence[str], names: Sequence[str], count: int, trainable: bool
) -> tuple[list[int], list[str]]:
    """Returns for each class of the data its place among the classes of weights, `UNKNOWN` where they do not have it, and what
    that means in words. `trainable`: whether classes can begin anew.

    Raises `UserError` for names that are equal but for upper and lower case.
    """
    place = {name: i for i, name in enumerate(trained) if name not in (*NO_CLASSES, "")}
    alike = {name.casefold(): name for name in place}
    other = [(alike[n.casefold()], n) for n in names if n not in place and n.casefold() in alike]
    if other:
        raise UserError(
            f"These weights know {some([a for a, _ in other])}, and the data have {some([b for _, b in other])}: names of "
            "classes are compared with their upper and lower case. Rename the data's as they are there, if they are the same."
        )
    names = list(names) if len(names) == count else [""] * count
    columns = [place.get(name, UNKNOWN) for name in names]
    missing = [name for name, column in zip(names, columns, strict=True) if column == UNKNOWN]
    if len(missing) == len(names):
        return columns, [f"head new, {len(place) or len(trained)} to {count} classes"]
    said = f"of its {len(place)} classes the data's {len(names) - len(missing)} are kept"
    what = "new are" if trainable else "not detected are"
    return columns, [said + (f", {what} {some(missing)}" if missing else "")]


def own_size(model: nn.Module, images: Sequence[int]) -> list[int]:
    """Returns the height and width to which torchvision resizes images (C, H, W) for this network."""
    transform: Any = model.transform
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
        return [int(height), int(width)]
    factor = min(transform.min_size[-1] / min(images[1:]), transform.max_size / max(images[1:]))
    return [int(side * factor) for side in images[1:]]


def published_preprocess(
    model: nn.Module, images: Sequence[int], size: int | Sequence[int] | None
) -> Preprocess | None:
    """Returns the weights' preprocessing for images (C, H, W), resized to `size` or as torchvision resizes them; None where the
    number of channels is not theirs."""
    transform: Any = model.transform
    if images[0] not in (1, len(transform.image_mean)):
        return None
    return Preprocess(transform.image_mean, transform.image_std, size or own_size(model, images))


def check_takes(net: nn.Module, input_shape: Sequence[int], name: str) -> None:
    """Raises `UserError` where a one-stage network cannot take images of this shape."""
    if isinstance(net, TwoStage):
        return
    state = {k: torch.empty_like(v, device="meta") for k, v in (*net.named_parameters(), *net.named_buffers())}
    try:
        with evaluating(net):
            torch.func.functional_call(net, state, (torch.empty(2, *input_shape, device="meta"),))
    except Exception as error:  # networks raise many kinds of errors for unsupported sizes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        given = "x".join(map(str, input_shape))
        raise UserError(f"{name} cannot take images of {given} ({reason}). {REMEDY}") from error
