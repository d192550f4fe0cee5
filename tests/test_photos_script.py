"""scripts/photos.py: its commands compose, its squares lie in the photograph, and its table says what was not run."""

import importlib.util
from pathlib import Path

import pytest

from litdistill.utils.paths import ROOT
from tests.conftest import compose_config


@pytest.fixture(scope="module")
def photos():
    spec = importlib.util.spec_from_file_location("photos", ROOT / "scripts" / "photos.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_commands_compose(photos, tmp_path):
    for name, count in (("cifar10-20", 5), ("cifar10-100", 4), ("cifar10-500", 4), ("bccd", 3)):
        odd = photos.commands(Path("my pictures"), name, Path("a, b"))
        assert all({f"data.root='my pictures/{name}'", "runs='a, b'"} <= set(options) for options in odd)
        made = photos.commands(Path("pictures"), name, Path("runs"))
        assert len(made) == count
        for options in made:
            cfg = compose_config(tmp_path / "run", *(o for o in options if not o.startswith(("seed=", "runs="))))
            assert cfg.data.root == f"pictures/{name}"
            assert cfg.data.unlabelled == ("pictures/cifar10-unlabelled" if "unlabelled" in cfg.technique else None)
            assert (cfg.teacher is None) == (cfg.technique in ("alone", "fine-tuned", "learned statistics"))
            assert cfg.min_steps == (750 if cfg.teacher or cfg.technique == "alone" else 150)


def test_squares_lie_around_their_boxes_and_in_the_photograph(photos):
    assert photos.square((10, 20, 30, 30), 100, 100) == (10, 15, 30, 35)
    assert photos.square((0, 0, 10, 40), 100, 100) == (0, 0, 25, 40)
    assert photos.square((80, 90, 100, 100), 100, 100) == (80, 85, 100, 100)


def test_the_table_says_what_was_not_run(photos):
    def summary(technique, seed, last):
        test = {"accuracy": {"best": 0.5, "last": last}}
        data, student = {"train": 180, "val": 20, "test": 1000}, {"params": 94762, "test": test}
        return {"experiment": "bccd", "technique": technique, "seed": seed, "data": data, "student": student}

    rows = photos.table([summary("alone", 1, 0.4), summary("alone", 0, 0.6)], ["bccd"])
    columns = {row.count("|") for row in rows}
    assert columns == {9}
    assert "| bccd | 200 | 1,000 | ConvNet on the labels alone | 94,762 | 50.00 ± 14.14 | 50.00 ± 0.00 | 0, 1 |" in rows
    assert sum("not run" in row for row in rows) == 2
