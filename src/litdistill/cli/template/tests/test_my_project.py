"""The method against its formula, and a short run of the experiment."""

from pathlib import Path

import pytest
import torch
from litdistill import Batch, Outputs, run

from my_project.methods import Margin

CONF = Path(__file__).resolve().parents[1] / "conf"


def test_the_method_is_its_formula():
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    difference = student - teacher
    expected = 0.1 * sum(((row - row.mean()) ** 2).mean() for row in difference) / 5
    found = Margin()(Outputs.of(student), Outputs.of(teacher), Batch(torch.zeros(5), torch.zeros(5, dtype=torch.int64)))
    assert found["soft"].item() == pytest.approx(expected.item())


def test_a_constant_in_the_logits_teaches_nothing():
    logits = torch.randn(4, 3)
    shifted = Outputs.of(logits + torch.arange(4.0)[:, None])
    terms = Margin()(Outputs.of(logits), shifted, Batch(torch.zeros(4), torch.zeros(4, dtype=torch.int64)))
    assert terms["soft"].item() == pytest.approx(0, abs=1e-10)


def test_the_experiment_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("LITDISTILL_STATE", str(tmp_path / "state"))
    short = ["trainer.max_epochs=2", "++teacher.recipe.trainer.max_epochs=3", "logger=none", f"runs={tmp_path}"]
    data, distiller = run("experiment=first", *short, config_dir=CONF, folder=tmp_path / "run")
    assert data.num_classes == 10
    assert (tmp_path / "run" / "student.safetensors").is_file()
    assert not distiller.deployed_student.training
