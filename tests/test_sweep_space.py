"""Spaces of a sweep: one teacher for all points, fitted to the student, and what is left out is said."""

import functools

import pytest
from omegaconf import OmegaConf

from litdistill.config.recipes import teacher_folder
from litdistill.utils.errors import UserError
from tests.sweeps import (
    quick_fixture,  # noqa: F401
    start,
)

pytest.importorskip("optuna")

from litdistill.sweep.space import first, fitting, pinned, read_space, unbalanced
from litdistill.sweep.study import typed_keys
from tests.composed import composed


@pytest.mark.parametrize(
    ("space", "given"),
    [
        ({"optimizer": ["adam", "sgd"]}, ()),
        ({"optimizer": ["sgd", "adamw"], "optimizer.lr": [0.1, 0.2]}, ("+teacher.recipe.optimizer.weight_decay=0.5",)),
        ({"scheduler": ["steps", "cosine", "none"], "trainer.max_epochs": [3, 4]}, ("scheduler=cosine",)),
        ({"trainer": ["cpu", "gpu"]}, ()),
        ({"data.epoch_size": [100, 200]}, ("data.epoch_size=50",)),
    ],
)
def test_whatever_is_searched_there_is_one_teacher(space, given):
    own = ["folder=x", *given]
    base = composed("train", own)
    held, distributions = pinned(base, read_space(space)), read_space(space)
    points = [f"{key}={choice}" for key, d in distributions.items() for choice in d.choices]
    found = {teacher_folder(composed("train", [*own, *held, point])) for point in points}
    assert found == {teacher_folder(base)}


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ([], {"method.temperature", "method.hard", "method.soft", "optimizer.lr", "student.widths"}),
        (
            ["net@student=shufflenet_v2"],
            {"method.temperature", "method.hard", "method.soft", "optimizer.lr", "student.width"},
        ),
        (["net@student=lenet"], {"method.temperature", "method.hard", "method.soft", "optimizer.lr"}),
        (["net@student=torchvision"], {"method.temperature", "method.hard", "method.soft", "optimizer.lr"}),
        (["method=supervised", "teacher=null"], {"method.hard", "optimizer.lr", "student.widths"}),
        (["net@student=resnet8", "method=at"], None),
    ],
)
@pytest.mark.parametrize("kind", ["optuna", "grid"])
def test_a_space_of_this_project_fits_any_student(overrides, keys, kind):
    node, base = composed("sweep", [f"sweep={kind}"]).sweep.space, composed("train", ["folder=x", *overrides])
    kept, left = fitting(OmegaConf.to_container(node), base)
    space = read_space(kept)
    composed("train", ["folder=x", *overrides, *(f"{key}={first(d)}" for key, d in space.items())])
    if keys is not None and kind == "optuna":
        assert space.keys() == keys
        assert (
            set(left)
            == {*("method.temperature", "method.hard", "method.soft", "student.width", "student.widths")} - keys
        )


def test_a_weight_that_is_searched_is_kept_also_at_its_default():
    cfg = functools.partial(composed, "train")
    names = ["method.methods.at.hint", "method.methods.kd.soft", "optimizer.lr"]
    assert unbalanced(names, cfg(["method=kd_at"])) == ["+balance.terms.at_hint=null"]
    assert unbalanced(["method.hint"], cfg(["method=at"])) == ["+balance.terms.hint=null"]
    at = {"_target_": "litdistill.methods.AT", "hint": 1000.0}
    inside = OmegaConf.create({"balance": {"terms": {}}, "method": {"method": at}})
    assert unbalanced(["method.method.hint"], inside) == ["+balance.terms.hint=null"]  # the term's own name
    assert unbalanced(["method.soft"], cfg(["method=srrl"])) == ["+balance.terms.soft=null"]
    assert dict(cfg(["method=at", *unbalanced(["method.hint"], cfg(["method=at"]))]).balance.terms) == {"hint": None}
    for overrides in (
        ["balance=none"],
        ["method.hint=0"],
        ["+balance.terms.hint=0.3"],
    ):  # nothing to keep, or typed
        assert unbalanced(["method.hint"], cfg(["method=at", *overrides])) == []


def test_widths_are_multiples_of_the_students_own():
    base = OmegaConf.create({"student": {"widths": [8, 16], "width": 1.0, "depth": 1, "name": "x"}})
    kept, left = fitting({"student": {k: ["x0.5", "x1", "x2"] for k in ("widths", "width", "depth", "none")}}, base)
    assert kept == {"student": {"widths": [[4, 8], [8, 16], [16, 32]], "width": [0.5, 1.0, 2.0], "depth": [1, 2]}}
    assert left == ["student.none"]
    with pytest.raises(UserError, match=r"sweep\.space\.student\.name: x has no multiples"):
        fitting({"student": {"name": ["x0.5"]}}, base)


def test_what_is_left_out_is_said_and_a_typed_key_is_never(quick, tmp_path, caplog):
    caplog.set_level("INFO")
    start(tmp_path / "a", "sweep.trials=1", space={"method.temperature": [4.0], "method.nothing": [1], "ema": [0.9]})
    assert "Left out of the space, since this run has no such key: method.nothing" in caplog.text
    assert typed_keys(["+sweep.space.data.batch_size=[1]", "sweep.space.method.hard.low=0", "seed=1"]) == {
        *("data.batch_size", "data", "method.hard.low", "method.hard"),
    }
