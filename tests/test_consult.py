"""The doctor at the end of a run: where the student is far behind its teacher or its control, and there alone."""

import json
import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from litdistill.evaluation import doctor
from litdistill.training.consult import behind, consult
from litdistill.utils.files import write_text
from tests.test_doctor import runs, trained  # noqa: F401

SUMMARY = {
    **{"method": "kd", "seed": 1, "metric": {"name": "accuracy", "direction": "max"}, "val": {"best": 0.80}},
    **{"teacher": {"test": {"accuracy": 0.9}}, "student": {"name": "conv4", "params": 7}, "data": {"name": "digits"}},
    **{"options": {}, "settings": {}},
}


def said_by(caplog, name):
    return [r.getMessage() for r in caplog.records if "Doctor:" in r.getMessage() and name in r.getMessage()]


def test_a_run_far_behind_its_teacher_says_why_and_how_to_read_more(runs, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    trained(runs, "drowned", "method=at", "balance=none", "trainer.max_epochs=2")
    (said,) = said_by(caplog, "drowned")
    assert "The student's accuracy on the validation set is" in said
    assert "and its teacher's" in said
    assert "share of a term (try: balance=auto 'balance.terms={hint: 0.1}')" in said
    assert said.rstrip().endswith("drowned")
    assert "litdistill doctor run=" in said


def test_a_healthy_run_does_not_ask_the_doctor(runs, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(doctor, "brief", lambda *_: pytest.fail("the doctor was asked"))
    caplog.set_level(logging.INFO)
    trained(runs, "well", "method=kd")
    assert said_by(caplog, "well") == []


def test_what_the_doctor_cannot_read_loses_nothing_of_a_run(runs, caplog, monkeypatch):  # noqa: F811
    def fails(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(doctor, "brief", fails)
    caplog.set_level(logging.INFO)
    folder = trained(runs, "failing", "method=at", "balance=none", "trainer.max_epochs=2")
    assert (folder / "summary.json").is_file()
    assert any("The doctor could not look at it: RuntimeError: no memory" in r.getMessage() for r in caplog.records)


def test_the_control_of_the_same_seed_is_what_a_student_is_held_against(tmp_path):
    folder = tmp_path / "kd" / "1"
    assert behind(SUMMARY, {}, tmp_path, folder) is None
    for seed, value in ((1, 0.83), (2, 0.70)):
        control = SUMMARY | {"method": "supervised", "seed": seed, "teacher": None, "val": {"best": value}}
        write_text(tmp_path / "supervised" / str(seed) / "summary.json", json.dumps(control, indent=2))
    assert behind(SUMMARY, {}, tmp_path, folder) == (
        "The student's accuracy on the validation set is 80.00 %, and its control's 83.00 %."
    )
    assert behind(SUMMARY | {"val": {"best": 0.82}}, {}, tmp_path, folder) is None  # within two points
    assert behind(SUMMARY | {"data": {"name": "other"}}, {}, tmp_path, folder) is None
    assert behind(SUMMARY | {"seed": 3}, {}, tmp_path, folder) is None  # 76.5 % is the mean of both
    assert behind(SUMMARY | {"method": "supervised"}, {"teacher_accuracy": 0.99}, tmp_path, folder) is None


def test_a_control_beside_the_run_counts_once(tmp_path):
    for place, value in (("kd/0", 0.84), ("supervised/0", 0.79)):
        control = SUMMARY | {"method": "supervised", "seed": 5, "teacher": None, "val": {"best": value}}
        write_text(tmp_path / place / "summary.json", json.dumps(control))
    assert behind(SUMMARY, {}, tmp_path, tmp_path / "kd" / "1") is None  # 81.5 % is the mean of both


def test_a_damaged_summary_of_another_run_loses_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_text(tmp_path / "kd" / "0" / "summary.json", json.dumps({"method": "supervised"}))
    cfg = OmegaConf.create({"runs": str(tmp_path), "folder": str(tmp_path / "kd" / "1")})
    consult(cfg, None, SimpleNamespace(on_validation=SimpleNamespace(metrics={})), SUMMARY, "cpu")
    assert "The doctor could not look at it: KeyError" in caplog.text


def test_a_larger_error_than_the_teachers_is_far_behind_too(tmp_path):
    errors = SUMMARY | {"metric": {"name": "mae", "direction": "min"}, "val": {"best": 0.5}}
    assert behind(errors, {"teacher_mae": 0.3}, tmp_path, tmp_path / "a") is None
    assert behind(errors, {"teacher_mae": 0.2}, tmp_path, tmp_path / "a") is not None
