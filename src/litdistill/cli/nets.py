"""Prints the size of every network in conf/net, for MNIST-like and for CIFAR-100-like images.

Networks are built on PyTorch's meta device, without memory, computation or downloads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from litdistill.models.profile import count_macs, count_parameters
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from litdistill.utils.terminal import show, stdout

CASES = {"1x28x28, 10 classes": (10, (1, 28, 28)), "3x32x32, 100 classes": (100, (3, 32, 32))}


def sizes(path: Path, num_classes: int, input_shape: tuple[int, int, int]) -> tuple[str, str]:
    """Returns parameters and multiply-accumulates as text; dashes where the network does not take such images."""
    try:
        with torch.device("meta"):
            net = instantiate(OmegaConf.load(path), num_classes=num_classes, input_shape=input_shape)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            return "—", "—"
        raise
    return f"{count_parameters(net):,}", f"{count_macs(net, input_shape) / 1e6:,.2f} M"


def main(arguments: Sequence[str] = (), folder: Path = CONF / "net") -> None:
    """Prints the table of the networks in `folder`."""
    argparse.ArgumentParser("nets", description=__doc__).parse_args(arguments)
    head, rows = ["net"], []
    for case in CASES:
        head += ["parameters\n" + case.replace(", ", ",\n"), "MACs"]
    for path in sorted(folder.glob("*.yaml")):
        rows.append([path.stem, *(text for case in CASES.values() for text in sizes(path, *case))])
    show(head, rows, stdout(140), "conf/net")
