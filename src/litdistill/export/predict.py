"""Runs an exported student on files, with neither Lightning nor Hydra, and for ONNX without torch.

    python -m litdistill.export.predict <run>/export/student.onnx image1.png image2.png
    python -m litdistill.export.predict <run>/export/student.onnx --json --top 3 *.png
    python -m litdistill.export.predict <run>/export/student.onnx patients.csv
    python -m litdistill.export.predict <run>/export/student.onnx reviews.txt
    python -m litdistill.export.predict <run>/export/student.onnx --text "a joy from start to end"
    python -m litdistill.export.predict <run> street.jpg --score 0.3 --out found    draws boxes, and writes them as JSON

A student takes files of its kind of data (`litdistill.export.readers`): of images, image files; of tables, .npy and .csv files
with one sample per row; of texts, .txt files with one a line, and .tsv, .csv and .jsonl files.

An ONNX file needs numpy, Pillow and onnxruntime. A file is opened only if its SHA-256 is that in `manifest.json` beside it,
and if its loader cannot run code. Formats that torch's loaders read by unpickling and evaluating (.pt2, .pt) are opened
with `--trust` only: use it for files that you exported yourself.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from litdistill.export.language import continuation
from litdistill.export.onnx_safety import external_data
from litdistill.export.pictures import RESULTS, line, new_folder, predict_pictures
from litdistill.export.readers import READERS, words
from litdistill.utils.errors import UserError
from litdistill.utils.manifest import BOXES, MANIFEST, MASK, MISSING, OUTPUT_NAMES, SUFFIXES, ExportMetadata, verified
from litdistill.utils.modality import TOKENS
from litdistill.utils.text import CONTROL_CHARACTERS, one_line, printable
from litdistill.utils.units import quantity

if TYPE_CHECKING:
    from torch import nn

CODE = ("pt2", "torchscript")  # formats that can carry code


class Model(NamedTuple):
    """A loaded exported file."""

    facts: ExportMetadata
    # Inputs as its kind of data has them -> logits (N, outputs) float32. Of other kinds of outputs: boxes (N, K, 6) float32 as
    # x1, y1, x2, y2, score, class; a mask (N, H, W) int64.
    run: Callable[[np.ndarray], np.ndarray]
    folder: Path  # of the exported file


def load(path: str | Path, trust: bool = False) -> Model:
    """Verifies and opens an exported file. Raises `UserError` for a changed, unknown or unsafe file."""
    path = Path(path)
    content, facts = verified(path)
    if facts.format in CODE and not trust:
        raise UserError(
            f"{path}: torch's loaders of {SUFFIXES[facts.format]} files can run code that hides in them: refused. "
            "Use the student's .onnx or .safetensors file, or --trust (allow_code=true) if you exported this one yourself."
        )
    return Model(facts, runtime(content, facts, path), path.parent)


# -- the runtimes ------------------------------------------------------------------------------------------------------


def runtime(content: bytes, facts: ExportMetadata, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from inputs, uint8 images or float32 rows, to logits, which runs a file of `facts.format`.

    `path` is for messages only.

    For "pt2" and "torchscript" the caller is responsible for the bytes: their loaders can run code.
    """
    opened = {"onnx": _onnx, "safetensors": _safetensors, "pt2": _pt2, "torchscript": _torchscript}[facts.format]
    try:
        net = opened(content, facts, path)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(MISSING.format(error.name)) from error
    except Exception as error:  # each runtime raises its own exceptions for an invalid file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no {facts.format} file: {reason}") from error
    column, levels = [len(facts.mean), *(1 for _ in facts.input_shape[1:])], 255 if len(facts.input_shape) > 1 else 1
    scale = (1 / (levels * np.array(facts.std))).astype(np.float32).reshape(column)
    shift = (-np.array(facts.mean) / np.array(facts.std)).astype(np.float32).reshape(column)
    as_they_are = facts.preprocessing or facts.format == "safetensors" or not facts.mean

    def run(images: np.ndarray) -> np.ndarray:
        try:
            logits = _as_one(net(images if as_they_are else images * scale + shift), facts.kind)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # of a runtime, for inputs that the file does not take, or for memory that is not there
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{path} cannot be run on inputs of {'x'.join(map(str, images.shape[1:]))}, which {MANIFEST} states "
                f"(input_shape, preprocessing): {reason}. Export the run again, or fetch both files anew."
            ) from error
        if logits.shape[:1] != images.shape[:1] or not _fits(logits.shape[1:], facts):
            raise UserError(f"{path} gives {logits.shape} for {len(images)} samples and {len(facts.classes)} outputs.")
        return logits

    return run


def _as_one(found: Any, kind: str) -> np.ndarray:
    """Returns the outputs of a file as the one array of `Model.run`."""
    if kind != BOXES:
        return np.asarray(found[0] if isinstance(found, (tuple, list)) else found)
    boxes, scores, labels = (np.asarray(x, np.float32) for x in found)
    return np.concatenate([boxes, scores[..., None], labels[..., None]], 2)


def _fits(shape: tuple[int, ...], facts: ExportMetadata) -> bool:
    """Returns whether the outputs for one sample have the shape that the manifest states."""
    if facts.kind == BOXES:
        return len(shape) == 2 and shape[1] == 6
    if facts.kind == MASK:
        return len(shape) == 2
    return shape == (*(facts.input_shape if facts.modality["kind"] == TOKENS else ()), len(facts.classes))


def _onnx(content: bytes, facts: ExportMetadata, path: Path) -> Callable[[np.ndarray], Any]:
    try:
        outside = external_data(memoryview(content))
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged or no ONNX file.") from error
    if outside:
        raise UserError(
            f"{path} takes weights from other files, and such a path may lead anywhere: refused. "
            "Export it with its weights inside (litdistill export, or torch.onnx.export(external_data=False))."
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.load_model_format", "ONNX")  # the format that was checked
    options.log_severity_level = 4  # what it says of a file that it refuses is in its exception
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    names = OUTPUT_NAMES.get(facts.kind, ()) if facts.kind in (BOXES, MASK) else None
    return lambda images: session.run(names, {given.name: images})


def _safetensors(content: bytes, facts: ExportMetadata, path: Path) -> Callable[[np.ndarray], Any]:
    return _torch(_network(content, facts, path))


def load_network(path: Path) -> nn.Module:
    """Returns the network of a safetensors file in eval mode; it takes images as uint8 or from 0 to 1.

    Raises `UserError` for any other file, and for one that its manifest does not list.
    """
    content, facts = verified(path)
    if facts.format != "safetensors":
        raise UserError(f"{path} is no safetensors file: export the run with format=safetensors.")
    return _network(content, facts, path)


def _network(content: bytes, facts: ExportMetadata, path: Path) -> nn.Module:
    import safetensors.torch

    from litdistill.models.preprocess import Preprocess, wrap
    from litdistill.utils.checkpoint import load_state_dict_checked

    weights = safetensors.torch.load(content)
    net = build_net(facts)
    load_state_dict_checked(
        net, {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}, path, "student"
    )
    preprocess = Preprocess(facts.mean, facts.std, facts.size) if facts.mean else None
    return wrap(net.eval(), preprocess)


def _pt2(content: bytes, facts: ExportMetadata, path: Path) -> Callable[[np.ndarray], Any]:
    import torch

    if facts.kind == BOXES:
        import torchvision  # noqa: F401  (its operator nms is in the file)

    return _torch(torch.export.load(io.BytesIO(content)).module())


def _torchscript(content: bytes, facts: ExportMetadata, path: Path) -> Callable[[np.ndarray], Any]:
    import torch

    return _torch(torch.jit.load(io.BytesIO(content), map_location="cpu"))


def _torch(net: Callable[..., Any]) -> Callable[[np.ndarray], Any]:
    import torch

    def run(images: np.ndarray) -> Any:
        with torch.inference_mode():
            found = net(torch.from_numpy(images))
        return [x.numpy() for x in found] if isinstance(found, (tuple, list)) else found.numpy()

    return run


def build_net(facts: ExportMetadata) -> nn.Module:
    """Returns the network that `facts.net` names, for preprocessed images.

    Only functions of `litdistill.models` with their named options are allowed. Pretrained weights and options of a library's
    builder are refused, so that nothing is downloaded or read: the manifest may come from an untrusted source.
    """
    options = dict(facts.net)
    target = str(options.pop("_target_", ""))
    named = re.fullmatch(r"(litdistill\.models\.[a-z0-9_]+)\.([a-z][a-z0-9_]*)", target)
    function = getattr(importlib.import_module(named[1]), named[2], None) if named else None
    parameters = inspect.signature(function).parameters if inspect.isfunction(function) else {}
    known = {k for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    known -= {"num_classes", "input_shape", "weights", "pretrained"}
    if list(parameters)[:2] != ["num_classes", "input_shape"] or function.__module__ != named[1]:  # type: ignore
        raise UserError(
            f"The network {target or '(none named)'} is refused: only those of litdistill.models are built."
        )
    if not options.keys() <= known or not re.fullmatch(r"[\w.-]*", str(options.get("name", ""))):
        raise UserError(f"The options {options} of {target} are refused; it is built with {', '.join(known)} alone.")
    shape = (len(facts.mean), *(facts.size or facts.input_shape[1:])) if facts.mean else tuple(facts.input_shape)
    try:
        return function(num_classes=len(facts.classes), input_shape=shape, **options)  # type: ignore
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, MemoryError) as error:
        raise UserError(f"{target} cannot be built with {options} ({type(error).__name__}).") from error


# -- files and the command ---------------------------------------------------------------------------------------------


def decoded(logits: np.ndarray, facts: ExportMetadata, top: int) -> list[dict[str, Any]]:
    """Returns the prediction of each sample from logits (N, outputs), by the kind of the task.

    Classes and labels: `{"top": [{"class", "index", "probability"}]}`, at most `top` entries in descending order of
    probability. Regression: `{"values": {name: value}}`, in the targets' units. Embeddings: `{"embedding": [value]}`.
    """
    if facts.kind == "embedding":
        return [{"embedding": row.tolist()} for row in logits]
    x = logits.astype(np.float64)
    if facts.kind == "real":
        units = facts.units or {"mean": 0.0, "std": 1.0}
        values = x * np.array(units["std"]) + np.array(units["mean"])
        return [{"values": dict(zip(facts.classes, row.tolist(), strict=True))} for row in values]
    if facts.kind == "bernoulli":
        p = np.exp(-np.logaddexp(0, -x))
    else:
        odds = np.exp(x - x.max(1, keepdims=True))
        p = odds / odds.sum(1, keepdims=True)
    best = np.argsort(-p, axis=1, kind="stable")[:, :top].tolist()
    name = facts.classes
    return [
        {"top": [{"class": name[i], "index": i, "probability": float(row[i])} for i in chosen]}
        for row, chosen in zip(p, best, strict=True)
    ]


def predict(
    model: Model,
    paths: Sequence[str | Path],
    top: int = 5,
    more: int = 0,
    texts: Sequence[str] = (),
    out: Path | None = None,
    score: float = 0.5,
) -> list[dict[str, Any]]:
    """Returns for each sample what it is called, such as `{"image": path}`, with the result of `decoded`.

    `more`: the tokens by which a language model continues each text. `texts`: for a student of texts, texts themselves, before
    those of files. `out`, `score`: of boxes and masks; see `litdistill.export.pictures.predict_pictures`.
    """
    found, facts = [], model.facts
    if facts.kind in (BOXES, MASK):
        if texts:
            raise UserError("This student takes pictures and no texts: name files.")
        return predict_pictures(model.run, facts, paths, out, score)
    said = list(words(texts, facts, model.folder))
    if facts.modality["kind"] == TOKENS:
        return [continuation(model.run, facts, model.folder, path, top, more) for path in paths]

    def run(inputs: np.ndarray) -> np.ndarray:
        logits = model.run(inputs)
        if (bad := ~np.isfinite(logits).all(1)).any():
            raise UserError(
                f"The student's outputs for {quantity(int(bad.sum()), 'sample')} of {len(bad)} are no finite numbers, so that "
                "it predicts nothing. Its weights are damaged, or its training diverged: export another run."
            )
        return logits

    rows = READERS[facts.modality["kind"]](paths, facts, model.folder)
    for labels, inputs in itertools.chain(said, rows):
        given = decoded(run(inputs), facts, top)
        found += [{**label, **one} for label, one in zip(labels, given, strict=True)]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m litdistill.export.predict", description="Predicts with an exported student."
    )
    parser.add_argument(
        "model", help="an exported file, manifest.json beside it; or a run folder, for its student.onnx"
    )
    parser.add_argument(
        "files", nargs="*", help="of the student's kind of data: image files; .npy and .csv files, a sample a row; …"
    )
    parser.add_argument("--text", action="append", default=[], help="a text, for a student of texts")
    parser.add_argument("--encoding", help="of files of texts, where it is not that of the training texts")
    parser.add_argument("--column", help="of the texts in a table, where it is not that of the training texts")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name for each sample (5)")
    parser.add_argument(
        "--continue", type=int, default=0, dest="more", help="tokens by which a language model continues each text (0)"
    )
    parser.add_argument("--score", type=float, default=0.5, help="the least score of a box (0.5)")
    parser.add_argument("--out", type=Path, help="folder of drawings of boxes or masks, and their JSON (predictions)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--trust", action="store_true", help="open .pt2 and .pt too, whose loaders can run code")
    args = parser.parse_intermixed_args(arguments)
    if args.top < 1:
        parser.error("--top must be at least 1")
    if not 0 <= args.score <= 1:
        parser.error("--score must be from 0 to 1")
    if args.more < 0:
        parser.error("--continue must be at least 0")
    if not args.files and not args.text:
        parser.error("name the files to predict")
    try:
        model = load(file_of(args.model), args.trust)
        pictures = model.facts.kind in (BOXES, MASK)
        if args.out is not None and not pictures:
            raise UserError("--out is for students that find boxes or masks, and this one finds neither: leave it out.")
        out = new_folder() if args.out is None and pictures and not args.json else args.out
        said = {key: value for key in ("encoding", "column") if (value := getattr(args, key)) is not None}
        model = model._replace(facts=model.facts._replace(modality={**model.facts.modality, **said}))
        found = predict(model, args.files, args.top, args.more, args.text, out, args.score)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print("\n".join(lines(found)))
    if out is not None:
        print(f"Drawn to {one_line(out)}, with {RESULTS}")


def file_of(source: str) -> Path:
    """Returns the exported file that `source` names: itself, or the `export/student.onnx` of a run folder."""
    path = Path(source.removeprefix("run="))
    return path / "export" / "student.onnx" if path.is_dir() else path


def lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields what `predict` returns as lines."""
    for one in found:
        # A file name need not be valid UTF-8, and may hold characters that control a terminal.
        name = CONTROL_CHARACTERS.sub("?", os.fsencode(next(iter(one.values()))).decode(errors="replace"))
        if "boxes" in one or "areas" in one:
            yield f"{name}: {line(one)}"
            continue
        texts = [f"'{c['class']}'" if "perplexity" in one else c["class"] for c in one.get("top", ())]
        texts = [f"{t} {100 * c['probability']:.1f} %" for t, c in zip(texts, one.get("top", ()), strict=True)]
        texts += [f"{k} {v:.6g}" for k, v in one.get("values", {}).items()]
        if "perplexity" in one:
            name += f": perplexity {one['perplexity']:.4g} over {quantity(one['tokens'], 'token')}; next"
        yield f"{name}: " + ", ".join(texts)
        if "continuation" in one:
            yield f"… {printable(one['continuation'])}"


if __name__ == "__main__":
    main()
