"""scripts/few_table.py: which runs it makes, that each composes as the page says, and what it writes of what is kept."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.composed import composed


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
    for job in found:
        if job.seed == 1 and job.variant in ("", "10"):
            configs[job.technique] = composed("train", [*job.overrides, "folder=''"])
    alone, tuned, same, everything = (configs[script.slug(way)] for way in script.WAYS)
    assert all(cfg.seed == 1 and cfg.data.name == dataset for cfg in configs.values())
    assert (alone.teacher, alone.method._target_) == (None, "litdistill.methods.Supervised")
    assert tuned.student.recipe.data.classes == [0, 1, 2, 3, 4]
    assert alone.data.per_class == tuned.data.per_class == same.data.per_class == 10
    assert (everything.data.per_class, everything.method.hard, everything.method.soft) == (None, 0, 1)
    assert {cfg.trainer.max_epochs * cfg.data.epoch_size for cfg in configs.values()} == {20 * alone.data.epoch_size}
    assert len({json.dumps(OmegaConf.to_container(cfg.student.widths)) for cfg in configs.values()}) == 1
    assert all(large > small for large, small in zip(same.teacher.widths, same.student.widths, strict=True))
    assert same.teacher == everything.teacher


def test_what_others_wait_for_comes_first_and_a_seed_before_the_next(script: ModuleType) -> None:
    found = script.jobs(choices(script, seeds=3))
    size = len(found) // 3
    for seed in range(3):
        assert {job.seed for job in found[seed * size : (seed + 1) * size]} == {seed}
        assert [j.technique for j in found[seed * size :][:2]] == ["distilled-all-images", "fine-tuned"]
    assert found[:size] == script.jobs(choices(script, seeds=1))


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
    assert "| digits | 10 | 91.00 | 90.00 (10) | 93.50 (20) | 97.00 (over 20) | 99.20 |" in text
    assert "Not run yet: `make few DATA=mnist`, `make few DATA=fashion_mnist`, `make few DATA=cifar10`." in text
    assert "(few.png)" in text
    assert Image.open(picture).size[0] > 300
    assert json.loads(keep.read_text()) == KEPT


def test_a_difference_counts_where_its_interval_leaves_out_zero(script) -> None:
    cells = {
        "alone": {"10": [90.0, 91.0, 92.0], "20": [95.0, 95.0, 95.0]},
        "fine-tuned": {"10": [89.0, 89.9, 91.1], "20": [95.0, 95.0, 95.0]},
        "distilled, same images": {"10": [93.0, 94.1, 94.9], "20": [95.0, 95.1, 95.9]},  # the last: 0.33 ± 1.19
        "distilled, all images": {"all": [97.0, 97.0, 97.0]},
    }
    assert script.verdict(cells).splitlines() == [
        "- fine-tuned: worse at 10; no difference that 3 seeds can tell at 20.",
        "- distilled, same images: better at 10; no difference that 3 seeds can tell at 20.",
        "- distilled, all images: better at 10, 20.",
    ]
    one = {way: {count: values[:1] for count, values in found.items()} for way, found in cells.items()}
    assert script.verdict(one) == "Of one seed nothing can be said of differences."


def test_a_command_of_the_page_composes(script) -> None:
    commands = [line.split() for line in script.QUESTION.splitlines() if line.startswith("litdistill train")]
    assert len(commands) == 4
    for words in commands:
        said = [word.split(",")[0].replace("<", "").replace(">", "") for word in words[2:] if word != "-m"]
        assert composed("train", [*said, "folder=''"]).data.root == "folder"


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
