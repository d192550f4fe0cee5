"""The benchmark runs, and computes what it says; what it measures is asserted nowhere."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark
import benchmark_detector_step as detector
import benchmark_parts as parts
import benchmark_questions as questions

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = parts.PAIRS["small"]._replace(steps=3, light_steps=3, batch=8)


def test_every_variant_of_a_pair_gives_its_seconds_a_step():
    bench = parts.Bench(TINY, CPU)
    run = parts.variants(bench)
    assert set(run) >= {"peers", "live", "cached", "hard", "floor"}
    assert all(0 < step() < 60 for step in run.values())
    assert set(parts.budget(bench, 1)) == {"images", "teacher", "forward", "backward", "optimizer"}


def test_the_cached_variant_asks_its_teacher_nothing_and_the_live_one_everything(monkeypatch):
    seen = []
    inner = parts.FrozenTeacher.forward
    monkeypatch.setattr(parts.FrozenTeacher, "forward", lambda self, x: (seen.append(len(x.inputs)), inner(self, x))[1])
    bench = parts.Bench(TINY, CPU)
    parts.project(bench, "cached")
    before = 2 + TINY.batch  # the dry forward, and the step by which the size of a group is found
    assert sum(seen) == before + 2  # the width of a row
    seen.clear()
    parts.project(bench, "live")
    assert sum(seen) == before + 2 * TINY.steps * TINY.batch


def test_quartiles_are_numpys_and_the_table_shows_them():
    values = [3.0, 1.0, 2.0, 8.0, 5.0]
    assert benchmark.quartiles(values) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]))
    one = {
        "ms": {"peers": 53.0, "live": 9.0, "cached": 3.0},
        "ratios": {key: [1.0, 1.1, 1.2] for key in benchmark.TARGETS["small"]},
    }
    assert "53.0 | 9.0 | 3.0 | 1.10 (1.00–1.20), aim ≥ 4" in benchmark.table({"small": one})


def test_the_page_shows_the_figures_that_are_kept():
    kept = json.loads((ROOT / "docs" / "performance.json").read_text())
    assert set(kept) <= set(benchmark.QUESTIONS)
    assert (
        f"<!-- benchmark -->\n\n{benchmark.page(kept)}\n\n<!-- end benchmark -->"
        in (ROOT / "docs" / "performance.md").read_text()
    )


def test_the_bare_loop_of_detectors_has_the_same_loss_on_the_same_pictures():
    data = detector.scenes(8, batch=4)
    tiny = {"width": 4, "fpn": 32, "convs": 1, "strides": [4, 8]}
    student, teacher = detector.networks(data, tiny, {**tiny, "width": 8})
    bare, distiller = detector.Bare(data, student, teacher), detector.distiller_of(data, student, teacher)
    views = torch.tensor([0, 1, 1, 0])
    batch = data.get_batch("train", data.train_ids[:4], views)
    for module in (bare.student, student):
        module.train()
    expected = bare.loss(*bare.view(torch.arange(4), views == 1))
    torch.testing.assert_close(distiller.loss(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_filled_caches_memory_and_growth_can_be_asked():
    found = questions.filled_by_views(images=64, epochs=2)
    assert found["largest_difference_of_weights"] < 1e-5
    assert questions.peak_memory(count=3000)["images_bytes"] > 3000 * 3072


def test_a_gpu_is_left_to_make_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "make gpu" in capsys.readouterr().err
