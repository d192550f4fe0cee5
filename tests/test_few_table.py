"""scripts/few_table.py: which runs it makes, that each composes as the page says, and what it writes of what is kept."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("few_table", CONF.parent / "scripts" / "few_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choices(script: ModuleType, **own: object) -> DictConfig:
    return OmegaConf.create({**script.DEFAULTS, **own})


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist", "cifar10"])
def test_every_run_composes_and_has_what_the_page_says(script: ModuleType, dataset: str) -> None:
    counts = script.SETTINGS[dataset].labels
    found = script.jobs(choices(script, dataset=dataset, seeds=2))
    assert len(found) == len(set(found)) == 3 * len(counts) * 2 + 2
    configs = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in found:
            if job.seed == 1 and job.variant in ("", "10"):
                configs[job.technique] = compose("train", [*job.overrides, "folder=''"])
    alone, tuned, same, everything = (configs[script.slug(way)] for way in script.WAYS)
    assert all(cfg.seed == 1 and cfg.data.name == dataset for cfg in configs.values())
    assert (alone.teacher, alone.method._target_) == (None, "litdistill.methods.Supervised")
    assert tuned.student.recipe.data.classes == [0, 1, 2, 3, 4]
    assert alone.data.per_class == tuned.data.per_class == same.data.per_class == 10
    assert (everything.data.per_class, everything.method.hard, everything.method.soft) == (None, 0, 1)
    assert {cfg.trainer.max_epochs * cfg.data.epoch_size for cfg in configs.values()} == {20 * alone.data.epoch_size}
    assert {json.dumps(OmegaConf.to_container(cfg.student.widths)) for cfg in configs.values()} == {"[16, 32, 64]"}
    assert same.teacher == everything.teacher


def test_what_others_wait_for_comes_first(script: ModuleType) -> None:
    found = script.jobs(choices(script, seeds=3))
    assert [(j.technique, j.seed) for j in found[:4]] == [
        ("distilled-all-images", 0),
        *(("fine-tuned", seed) for seed in range(3)),
    ]


KEPT = {
    "digits": {
        "command": "python scripts/few_table.py",
        "seconds": 61,
        "steps": 640,
        "student": ["small", 1000],
        "teacher": ["large", 20000, 99.2],
        "data": {"test": 500, "input_shape": [1, 8, 8]},
        "device": "cpu",
        "versions": {"python": "3", "torch": None},
        "cells": {
            "alone": {"10": [90.0, 92.0], "20": [95.0, 95.0]},
            "fine-tuned": {"10": [89.0, 91.0], "20": [95.0, 95.0]},
            "distilled, same images": {"10": [93.0, 94.0], "20": [96.0, 97.0]},
            "distilled, all images": {"all": [97.0, 97.0]},
        },
    }
}


def test_the_page_and_the_picture_are_those_of_what_is_kept(script, tmp_path, monkeypatch) -> None:
    keep, out, picture = (tmp_path / f"few.{end}" for end in ("json", "md", "png"))
    keep.write_text(json.dumps(KEPT))
    monkeypatch.setattr("sys.argv", ["x", f"keep={keep}", f"out={out}", f"picture={picture}", "only=true"])
    script.main()
    text = out.read_text()
    assert (
        "| 10 | 91.00 ± 1.41 | 90.00 ± 1.41 (−1.00 ± 0.00) | 93.50 ± 0.71 (+2.50 ± 0.71) | 97.00 ± 0.00 (+6.00 ± 1.41) |"
    ) in text
    assert "| 20 | 95.00 ± 0.00 | 95.00 ± 0.00 (+0.00 ± 0.00) |" in text
    assert "teacher large, 20,000 parameters, 99.20 %" in text
    assert "(few.png)" in text
    assert Image.open(picture).size[0] > 300
    assert json.loads(keep.read_text()) == KEPT


def test_the_page_of_the_docs_is_that_of_what_is_kept(script) -> None:
    docs = CONF.parent / "docs"
    assert (docs / "few.md").read_text() == script.page(json.loads((docs / "few.json").read_text()), "few.png")


def test_nothing_kept_and_unknown_data_are_refused(script, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", f"keep={tmp_path / 'none.json'}", "only=true"])
    with pytest.raises(UserError, match="keeps no runs"):
        script.main()
    monkeypatch.setattr("sys.argv", ["x", "dataset=iris"])
    with pytest.raises(UserError, match="fashion_mnist"):
        script.main()
