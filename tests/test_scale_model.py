"""The cost model of docs/scale.md: what it counts and fits, against closed forms; and the page is what the figures give."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import gpu
import scale

from litdistill.utils.errors import UserError

ROOT = Path(__file__).parents[1]


def measurement(what: str, work: scale.Work, seconds: float) -> dict:
    return {"what": what, **work._asdict(), "s": seconds, "fitted": True}


WORKS = [scale.Work(10, 1e9, 2e8, 1e6), scale.Work(100, 3e9, 1e8, 1e6), scale.Work(30, 1e8, 9e8, 1e6)]


def test_the_fit_finds_the_model_that_made_the_times():
    true = scale.Model(5e-6, 2e-12, 3e-11)
    rows = [measurement(str(i), w, true.seconds(w)) for i, w in enumerate(WORKS)]
    assert scale.fitted(rows, 1e15, 1e13) == pytest.approx(true, rel=1e-4)
    assert scale.errors(true, rows) == pytest.approx({"0": 0, "1": 0, "2": 0}, abs=1e-9)


def test_no_rate_is_above_the_peak():
    rows = [measurement(str(i), w, 1e-5 * w.launches) for i, w in enumerate(WORKS)]  # arithmetic and bytes cost nothing
    found = scale.fitted(rows, 1e15, 1e14)
    assert found.flop >= 1e-15 * (1 - 1e-6)
    assert found.byte >= 1e-14 * (1 - 1e-6)


def test_a_networks_work_is_counted_as_by_hand():
    found = scale.counted(scale.Size("mlp", {"widths": [20], "dropout": 0.0}, (1, 8, 8), 3), 4)
    classes = 1000
    assert found.flops == 2 * 3 * (64 * 20 + 20 * classes)
    assert found.weights == 4 * (64 * 20 + 20 + 20 * classes + classes)
    trained = found.trained()
    assert (trained.flops, trained.moved) == (3 * found.flops, 3 * found.moved + 5 * found.weights)


def test_the_page_is_what_the_figures_give():
    kept = json.loads((ROOT / "docs" / "scale.json").read_text())
    assert (ROOT / "docs" / "scale.md").read_text() == scale.page(kept)


def test_a_measured_grid_is_taken_into_the_figures(tmp_path, monkeypatch):
    one = scale.Size("conv4", {"widths": [4, 4]}, (1, 12, 12), 2)
    monkeypatch.setattr(scale, "grid", lambda device: [one])
    monkeypatch.setattr(scale, "peaks", lambda device: {"flops_per_s": 1e12, "bytes_per_s": 1e11})
    figures, kept = gpu.Figures(tmp_path / "figures.jsonl"), {"devices": {}}
    scale.measure_grid(figures, torch.device("cpu"))
    scale.keep(figures, kept, "a card", "source")
    forward, train = kept["devices"]["a card"]["measured"]
    assert train["flops"] == 3 * forward["flops"]
    assert 0 < forward["s"] < 60
    assert kept["photographs_per_s"] > 0


def test_the_command_in_its_head_measures_here(monkeypatch, tmp_path):
    devices = []
    monkeypatch.setattr(scale, "DOCS", tmp_path)
    monkeypatch.setattr(scale, "measure_grid", lambda figures, device: devices.append(str(device)))
    monkeypatch.setattr(scale, "keep", lambda figures, kept, device, source: devices.append(device))
    monkeypatch.setattr(scale, "page", lambda kept: "measured")
    monkeypatch.setattr("sys.argv", ["scale.py", "measure=cpu", f"out={tmp_path}"])
    scale.main()
    assert devices == ["cpu", "CPU"]
    monkeypatch.setattr("sys.argv", ["scale.py", "measure=gpu"])
    with pytest.raises(UserError, match="measure: , cpu"):
        scale.main()
    assert scale.DEFAULTS["out"] == "runs/scale"
