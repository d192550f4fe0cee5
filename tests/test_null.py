"""`null` for a group or for one of its entries leaves it out."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from litdistill.methods import Supervised
from litdistill.tasks import Classification
from litdistill.training.train import train
from litdistill.training.trainer import build_trainer, named_callbacks
from litdistill.utils.command_line import check_null, without_null
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.conftest import compose_config


@pytest.mark.parametrize("override", ["callbacks=null", "callbacks.learning_rate=null"])
def test_callbacks_of_null_are_the_two_that_a_run_ends_with(small, override):
    cfg = small(*without_null([override]))
    _, found = named_callbacks(cfg, Classification())
    assert [type(callback) for callback in found.values()] == [ModelCheckpoint, ModelCheckpoint]
    _, usual = named_callbacks(small(), Classification())
    assert LearningRateMonitor in [type(callback) for callback in usual.values()]


@pytest.mark.parametrize("override", ["logger=null", "logger.tensorboard=null"])
def test_a_logger_of_null_is_none(small, override):
    cfg = small("teacher=null", "method=supervised", *without_null([override]))
    trainer = build_trainer(cfg, Path(cfg.folder), Supervised(), Classification(), object()).trainer
    assert trainer.loggers == []


def test_a_run_of_nulls_ends(small):
    nulls = ["callbacks=null", "logger=null", "scheduler=null", "compress=null", "data.augment=null", "teacher=null"]
    cfg = small(*without_null(nulls), "+callbacks.mine=null", "method=supervised", "trainer.max_epochs=1")
    assert 0 < train(cfg) < 1


def test_a_null_for_a_group_that_has_a_file_none_is_that_file():
    for file in CONF.glob("*/none.yaml"):
        assert without_null([f"{file.parent.name}=null"]) == [f"{file.parent.name}=none"]


def test_an_experiment_of_null_is_the_default(tmp_path):
    assert compose_config(tmp_path, *without_null(["experiment=null", "seed=3"])) == compose_config(tmp_path, "seed=3")


def test_a_null_for_what_a_run_needs_is_refused_in_a_line_of_what_there_is():
    check_null(["teacher=null", "data.labels=null", "seed=0", "logger=none", "-m"])
    with pytest.raises(UserError, match=r"^data=null: a run needs one of conf/data: base, bccd, .*$"):
        check_null(["seed=0", "data=null"])
    with pytest.raises(UserError, match=r"net@teacher=null.*Without a teacher: teacher=null"):
        check_null(["net@teacher=null"])
