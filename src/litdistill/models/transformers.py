"""Models of Hugging Face's transformers from a folder, as `save_pretrained` writes it. The optional extra `transformers`.

    net@teacher=transformers teacher.path=<folder with config.json and model.safetensors> teacher.checkpoint=null
    net@student=transformers 'student.config={model_type: vit, hidden_size: 64, num_hidden_layers: 2, …}'

Nothing is fetched unless `hub` says so, no code of a folder is run, and weights are read from safetensors alone.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from litdistill.models import transformers_files as files
from litdistill.models.adaptations import adapted, head_change, preprocess_changes
from litdistill.models.parts import evaluating
from litdistill.models.preprocess import Preprocessed, network_modules, network_submodule, transparent_state
from litdistill.types import EMBEDDING
from litdistill.utils.errors import UserError
from litdistill.utils.logging import ONCE

log = logging.getLogger(__name__)

POOLINGS = ("first", "mean", "pooler")
CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification")


class HuggingFace(nn.Module):
    """A model of transformers for one tensor: images (N, C, H, W), or token ids (N, L) whose padding is masked.

    Returns logits (N, classes) of a classifier, `{"embedding": (N, D)}` of a backbone. Names of parameters and submodules and
    keys of the state dict are those of `net`.

    Args:
        net: the model. text: whether inputs are token ids. padding: the id of padding.
        pooling: of a backbone, which vector is its embedding: `first`, the first token's (CLS), `mean`, over the tokens that
            are no padding or over positions, or `pooler`, what the model itself gives. None: a classifier.
    """

    named_modules, get_submodule = network_modules, network_submodule

    def __init__(self, net: nn.Module, text: bool, pooling: str | None = None, padding: int = 0):
        super().__init__()
        self.net, self.text, self.pooling, self.padding = net, text, pooling, padding
        transparent_state(self)

    def forward(self, inputs: Tensor) -> Tensor | dict[str, Tensor]:
        return _run(self.net, inputs, self.text, self.pooling, self.padding)

    def plain(self) -> nn.Module:
        """Returns the same for torch.export, which follows names to modules."""
        return Plain(self.net, self.text, self.pooling, self.padding)


class Plain(nn.Module):
    """A `HuggingFace` whose names begin with `net.`."""

    def __init__(self, net: nn.Module, *options: Any):
        super().__init__()
        self.net, self.options = net, options

    def forward(self, inputs: Tensor) -> Tensor | dict[str, Tensor]:
        return _run(self.net, inputs, *self.options)


def _run(net: nn.Module, inputs: Tensor, text: bool, pooling: str | None, padding: int) -> Tensor | dict[str, Tensor]:
    mask = (inputs != padding).long() if text else None
    given = {"input_ids": inputs, "attention_mask": mask} if text else {"pixel_values": inputs}
    out = net(**given, return_dict=True)
    if pooling is None:
        return out.logits
    x = out.last_hidden_state
    if pooling == "pooler":
        if (found := out.get("pooler_output")) is None:
            raise UserError("pooling=pooler: this model has none. Choose first or mean.")
        return {EMBEDDING: found.flatten(1)}
    if x.ndim == 4:
        return {EMBEDDING: x.mean((2, 3))}
    if pooling == "first":
        return {EMBEDDING: x[:, 0]}
    weights = torch.ones_like(x[..., 0]) if mask is None else mask
    return {EMBEDDING: (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)}


def transformers_model(
    num_classes: int,
    input_shape: Sequence[int],
    path: str | None = None,
    config: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    classifier: str | None = None,
    pooling: str | None = None,
    hub: bool = False,
    class_names: Sequence[str] = (),
    vocab_size: int | None = None,
    padding: int = 0,
    size: int | Sequence[int] | None = None,
    fetch: bool = True,
) -> nn.Module:
    """Returns an image or text classifier, or a backbone, of transformers.

    A folder whose `architectures` are a classifier gives one: with its own classes, mapped by name, where the data have two of
    them or more, else with a new one (zero) for the data's. Any other architecture is a backbone without classes.

    Args:
        num_classes, input_shape, class_names, vocab_size, padding: of the data; padding is the token id that is masked.
        path: a folder with config.json and safetensors, or with `hub` a name of the Hugging Face Hub.
        config: values in place of those in config.json; without a folder all that there are, model_type among them.
        pretrained: whether to load the weights. Without them images have the data's size and channels, texts its vocabulary.
        classifier: "new" gives a backbone, or a classifier of other classes, a new one for the data's.
        pooling: of a backbone, see `HuggingFace`; None: the mean of a text; else `pooler` where that has no weights, or first.
        hub: whether `path` may be fetched. It is kept, and with HF_HUB_OFFLINE=1 not asked for again.
        size: to which images are resized in place of the size in preprocessor_config.json.
        fetch: False leaves weights out, for a caller that loads others of the same structure.

    Raises `UserError` without transformers, for a folder that is none of such a model, and for data that do not fit it.
    """
    if classifier not in (None, "new") or pooling not in (None, *POOLINGS):
        raise UserError(
            f"classifier={classifier} pooling={pooling}: classifier is new or null, pooling {', '.join(POOLINGS)} or null."
        )
    library()
    folder = files.folder_of(path, hub) if path is not None else None
    known = files.read_config(folder, config)
    _check_inputs(known, input_shape)
    if folder is None or not pretrained:
        return _untrained(known, num_classes, input_shape, vocab_size, padding, set(config or ()))
    files.check_weights_file(folder)
    _check_vocabulary(known, input_shape, vocab_size)
    net, changes, classes = _pretrained(known, folder, num_classes, class_names, classifier, pooling, padding, fetch)
    return _preprocessed(net, known, folder, input_shape, size, changes, classes)


def _pretrained(
    known: files.Config,
    folder: Path,
    num_classes: int,
    class_names: Sequence[str],
    classifier: str | None,
    pooling: str | None,
    padding: int,
    fetch: bool,
) -> tuple[HuggingFace, list[str], tuple[str, ...]]:
    """Returns the model with the weights in `folder`, what was changed in it, and the names of its own classes."""
    text, own = _of_text(known), files.classes_of(known.values) if _is_classifier(known) else None
    loaded = folder if fetch and torch.get_default_device().type != "meta" else None
    if own is None and classifier is None:
        net = _made(known, loaded, "AutoModel")
        found = HuggingFace(net, text, _pooling(net, pooling, text), padding)
        return found, [f"no classes, pooling={found.pooling}"], ()
    kept = own if classifier is None and _fit(own, num_classes, class_names) else None
    # A caller that loads weights of its own has the number of their classes.
    known.made.num_labels = kept.number if kept is not None and fetch else num_classes
    found = HuggingFace(_made(known, loaded, _classifier_of(known), new_head=kept is None), text, None, padding)
    if kept is not None:
        return found, [], kept.names if fetch else ()
    changes = head_change(own.number if own is not None else 0, num_classes)
    return found, changes or [f"head new and zero, for {num_classes} other classes"], ()


def library() -> ModuleType:
    """Returns transformers. Raises `UserError` where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError("net=transformers needs transformers: pip install 'litdistill[transformers]'") from error


def _of_text(known: files.Config) -> bool:
    return hasattr(known.made, "vocab_size")


def _is_classifier(known: files.Config) -> bool:
    return any(str(name).endswith(CLASSIFIERS) for name in known.values.get("architectures") or ())


def _classifier_of(known: files.Config) -> str:
    return "AutoModelForSequenceClassification" if _of_text(known) else "AutoModelForImageClassification"


def _fit(own: files.Classes | None, count: int, names: Sequence[str]) -> bool:
    """Returns whether the classes of a folder's classifier are the data's, or two of them at least."""
    if own is None:
        return False
    return len({*own.names} & {*names}) >= 2 if own.names and names else own.number == count


def _check_inputs(known: files.Config, shape: Sequence[int]) -> None:
    """Raises `UserError` for images that a model of texts is given, and the reverse, and for texts that are too long."""
    text = _of_text(known)
    if text != (len(shape) == 1) or (not text and len(shape) != 3):
        takes, given = ("texts", "token ids (N, L)") if text else ("images", "images (N, C, H, W)")
        raise UserError(
            f"{known.name} ({known.values['model_type']}) is a model of {takes}, which takes {given}, and these samples are of "
            f"{'x'.join(map(str, shape))}: choose data of {takes}, or another model."
        )
    longest = getattr(known.made, "max_position_embeddings", None)
    if text and longest is not None and shape[0] > longest:
        raise UserError(
            f"{known.name} reads texts of at most {longest} tokens, and these are of {shape[0]}: set data.length={longest}."
        )


def _check_vocabulary(known: files.Config, shape: Sequence[int], vocab_size: int | None) -> None:
    if _of_text(known) and vocab_size is not None and vocab_size > known.made.vocab_size:
        raise UserError(
            f"{known.name} knows {known.made.vocab_size} tokens, and the data's tokenizer has {vocab_size}: the ids are those "
            "of another tokenizer. Read the texts with the model's own, its tokenizer.json."
        )


def _untrained(
    known: files.Config,
    num_classes: int,
    shape: Sequence[int],
    vocab_size: int | None,
    padding: int,
    given: set[str],
) -> nn.Module:
    """Returns a classifier with new weights, of the size of the data except for what `given` says."""
    text, settings = _of_text(known), {"num_labels": num_classes}
    if text:
        settings |= {"pad_token_id": padding} | ({} if vocab_size is None else {"vocab_size": vocab_size})
    else:
        settings |= {"num_channels": shape[0]}
        if hasattr(known.made, "image_size"):
            settings["image_size"] = shape[1] if shape[1] == shape[2] else tuple(shape[1:])  # type: ignore[assignment]
    for key, value in settings.items():
        if key not in given:
            setattr(known.made, key, value)
    found = HuggingFace(_made(known, None, _classifier_of(known)), text, None, padding)
    _check_runs(found, known, shape)
    return found


def _made(known: files.Config, folder: Path | None, kind: str, new_head: bool = False) -> nn.Module:
    """Returns the model with the weights in `folder`; None: with new ones. `kind`: the class of transformers that chooses it.

    Raises `UserError` where there is no such model, and for weights that lack tensors (`_loaded`).
    """
    auto, options = getattr(library(), kind), {}
    with _quiet():
        try:
            with torch.device("meta"):
                made = type(auto.from_config(known.made))
            if "add_pooling_layer" in inspect.signature(made.__init__).parameters:
                options["add_pooling_layer"] = False  # it is not read, and many weights lack it
            return made(known.made, **options) if folder is None else _loaded(made, known, folder, new_head, options)
        except UserError:
            raise
        except Exception as error:  # transformers raises many kinds of errors
            raise UserError(
                f"transformers makes no {kind.removeprefix('AutoModel') or 'model'} of {known.name} ({_reason(error)}): take "
                "another model, or correct its config."
            ) from error


def _loaded(made: Any, known: files.Config, folder: Path, new_head: bool, options: dict[str, Any]) -> nn.Module:
    """Returns the model with its weights. Raises `UserError` for weights that lack tensors, but for those of a new classifier,
    of which it warns; the classifier's last layer is set to zero."""
    net, found = made.from_pretrained(
        folder,
        config=known.made,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    other = {one[0] for one in found["mismatched_keys"]}  # a classifier of other classes
    lacking, within = sorted({*found["missing_keys"], *other}), f"{net.base_model_prefix}."
    new = [name for name in lacking if new_head and (not name.startswith(within) or ".pooler." in name)]
    if others := [name for name in lacking if name not in new]:
        remedy = (
            "copy them and config.json anew"
            if others[0].startswith(within)
            else "or have a new one with classifier: new"
        )
        raise UserError(
            f"The weights in {folder} lack {len(others)} of {len(net.state_dict())} tensors of {made.__name__}, or have them "
            f"in another shape, {others[0]} first: these would be random. Take the folder of the whole model, {remedy}."
        )
    zero = [n for n, p in net.named_parameters() if n in new and len(p) == known.made.num_labels]
    for name in zero:
        nn.init.zeros_(net.get_parameter(name))
    if shown := ", ".join(f"{n} ({'zero' if n in zero else 'random'})" for n in new if n not in other):
        log.warning("%s: NOT among its weights, and untrained: %s.", known.name, shown, extra=ONCE)
    return net


def _pooling(net: nn.Module, wanted: str | None, text: bool) -> str:
    """Returns which vector of a backbone is its embedding."""
    layer = getattr(net, "pooler", nn.Identity())  # None: without it
    own = layer is not None and not any(True for _ in layer.parameters())
    if wanted == "pooler" and text:
        raise UserError(
            "pooling=pooler: of texts choose mean or first, as most weights have no pooler that was trained."
        )
    if wanted is not None:
        return wanted
    return "mean" if text else "pooler" if own else "first"


def _check_runs(net: nn.Module, known: files.Config, shape: Sequence[int]) -> None:
    """Raises `UserError` for samples of a shape that the model does not take."""
    like = next(net.parameters())
    inputs = torch.zeros(1, *shape, dtype=torch.long if _of_text(known) else like.dtype, device=like.device)
    try:
        with evaluating(net):
            net(inputs)
    except UserError:
        raise
    except Exception as error:  # models raise many kinds of errors
        fixed = getattr(known.made, "image_size", None)
        remedy = f"give it images of {fixed} (preprocess.size)" if fixed else "give it others"
        raise UserError(
            f"{known.name} cannot take samples of {'x'.join(map(str, shape))} ({_reason(error)}): {remedy}, or set image_size "
            "and patch_size in its config."
        ) from error


def _preprocessed(
    net: HuggingFace,
    known: files.Config,
    folder: Path,
    shape: Sequence[int],
    size: int | Sequence[int] | None,
    changes: Sequence[str],
    classes: Sequence[str] = (),
) -> nn.Module:
    """Returns the model with weights behind its own preprocessing, with what was changed and its classes noted."""
    changes = list(changes)
    if net.text:
        _check_runs(net, known, shape)
        return adapted(net, known.name, changes, "of its folder", classes)
    found = files.image_preprocessing(folder, known.made, shape, size)
    if found is None:
        _check_runs(net, known, shape)
        changes.append(f"no {files.PREPROCESSOR}, so normalized as the data are")
        return adapted(net, known.name, changes, "of its folder", classes)
    preprocess, published = found
    _check_runs(net, known, preprocess.input_shape(shape))
    changes += preprocess_changes(shape, preprocess, published)
    return adapted(Preprocessed(net, preprocess), known.name, changes, "of its folder", classes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the bars and lines of transformers: what matters of them is said in ours."""
    logs, trees = library().utils.logging, logging.getLogger("torch.utils._pytree")  # torchao's import has it warn
    level, bars, before = logs.get_verbosity(), logs.is_progress_bar_enabled(), trees.level
    trees.setLevel(logging.ERROR)
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        trees.setLevel(before)
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
