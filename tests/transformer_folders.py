"""Folders of small Transformers models, made here, shared by their tests."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litdistill.models.transformers import transformers_model

transformers = pytest.importorskip("transformers")


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 60, "max_position_embeddings": 20}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
STAGES = {"hidden_sizes": [6, 8, 10, 12], "depths": [1, 1, 1, 1]}
NAMES = {0: "cat", 1: "dog", 2: "owl", 3: "ape"}
MODELS = {
    "vit": lambda t: t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=16, patch_size=8, id2label=NAMES)),
    "vit_backbone": lambda t: t.ViTModel(t.ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False),
    "vit_pooler": lambda t: t.ViTModel(t.ViTConfig(**SIZES, image_size=16, patch_size=8)),
    "dinov2": lambda t: t.Dinov2Model(t.Dinov2Config(**SIZES, image_size=28, patch_size=14)),
    "convnext": lambda t: t.ConvNextForImageClassification(t.ConvNextConfig(**STAGES, num_labels=4)),
    "convnext_backbone": lambda t: t.ConvNextModel(t.ConvNextConfig(**STAGES)),
    "resnet": lambda t: t.ResNetForImageClassification(t.ResNetConfig(embedding_size=6, **STAGES, layer_type="basic")),
    "bert": lambda t: t.BertForSequenceClassification(t.BertConfig(**SIZES, **TEXT, num_labels=3)),
    "bert_backbone": lambda t: t.BertModel(t.BertConfig(**SIZES, **TEXT)),
    "distilbert": lambda t: t.DistilBertForSequenceClassification(t.DistilBertConfig(**DISTIL, **TEXT, num_labels=3)),
}
PROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.25, 0.5, 0.2],
    "resample": 3,
}


@pytest.fixture(scope="session", name="folders")
def folders_fixture(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.getbasetemp() / "models")


@cache
def saved(root: Path) -> Path:
    """A folder of each of `MODELS` in `root`, once for all files of tests."""
    for name, make in MODELS.items():
        torch.manual_seed(0)
        net = make(transformers)
        for p in net.parameters():  # so that no bias is zero
            p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        net.save_pretrained(root / name)
        if hasattr(net.config, "num_channels"):
            facts = PROCESSOR | ({} if "net" in name or "next" in name else {"do_center_crop": False, "size": 16})
            facts |= {"size": 28, "do_center_crop": False} if name == "dinov2" else {}
            (root / name / "preprocessor_config.json").write_text(json.dumps(facts))
    return root


@pytest.fixture(name="folder")
def folder_fixture(folders, tmp_path):
    """A copy of one of them, to be damaged."""
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name))


def text_of(name: str) -> bool:
    return "bert" in name


def auto_of(name: str):
    text = text_of(name)
    return transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification


def sample(name: str) -> Tensor:
    g = torch.Generator().manual_seed(2)
    if text_of(name):
        ids = torch.randint(1, 60, (3, 9), generator=g)
        ids[0, 5:] = ids[1, 7:] = 0
        return ids
    return torch.randint(0, 256, (3, 3, 20, 20), generator=g, dtype=torch.uint8)


def made(path: Path, classes: int = 3, names=(), shape=None, **options):
    shape = shape or ((9,) if text_of(path.name) else (3, 20, 20))
    return transformers_model(classes, shape, str(path), class_names=names, **options).eval()


def own_inputs(name: str, path: Path) -> dict[str, Tensor]:
    """Inputs of the model as transformers prepares them, computed here by hand; resizing is ours."""
    x = sample(name)
    if text_of(name):
        return {"input_ids": x, "attention_mask": (x != 0).long()}
    size = {"dinov2": 28}.get(name, 16 if "vit" in name else 32)
    y = torch.nn.functional.interpolate(x.float(), (size, size), mode="bilinear", antialias=True) / 255
    mean, std = (torch.tensor(PROCESSOR[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    return {"pixel_values": (y - mean) / std}
