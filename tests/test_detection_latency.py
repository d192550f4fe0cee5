"""Detectors as ONNX files are timed with their post-processing and without it, in a run's summary and by the script."""

from __future__ import annotations

import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from litdistill.export.latency import BATCHES, WITHOUT, latency_table, onnx_of, time_files, without_postprocessing
from litdistill.models.preprocess import Preprocess, bare, wrap
from litdistill.tasks.detection.fcos import fcos_slim
from litdistill.tasks.detection.scenes import digit_scenes
from litdistill.tasks.detection.task import Detection
from litdistill.training.finish import latency_of
from litdistill.training.train import train
from litdistill.utils.files import write_text
from litdistill.utils.paths import ROOT
from tests.conftest import compose_config

onnxruntime = pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
TINY = [
    *("data=digit_scenes", "data.count=24", "data.val_size=8", "data.batch_size=8", "task=detection"),
    *("net@student=fcos_slim", "student.width=8", "student.fpn=32", "student.convs=1", "+student.strides=[8]"),
    *("net@teacher=fcos_slim", "teacher.width=8", "teacher.fpn=32", "teacher.convs=1", "+teacher.strides=[8]"),
    *("teacher.checkpoint=null", "teacher.allow_chance=true", "method=dense_kd", "logger=none", "trainer=cpu"),
]


@pytest.fixture(scope="module")
def scenes():
    data = digit_scenes(count=24, size=64, val_size=8)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = fcos_slim(10, (3, 64, 64), width=8, fpn=32, convs=1, strides=[8])
    return wrap(made, Preprocess([0.5] * 3, [0.25] * 3)).eval()


@pytest.fixture(scope="module")
def file(net, scenes):
    return onnx_of(net, scenes, Detection())


def test_a_file_without_post_processing_gives_the_last_convolutions(net, scenes, file):
    """The convolutions by hooks in torch are the reference."""
    images = next(iter(scenes.batches("test"))).inputs[:2]
    head, maps = bare(net).head, []
    last = (head.classification_head.cls_logits, head.regression_head.bbox_reg, head.regression_head.bbox_ctrness)
    hooks = [layer.register_forward_hook(lambda _, __, out: maps.append(out.numpy())) for layer in last]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    session = onnxruntime.InferenceSession(without_postprocessing(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert len(found) == len(maps) == 3
    for one in maps:
        (same,) = [f for f in found if f.shape == one.shape]
        assert np.allclose(same, one, atol=1e-4)


def test_a_file_is_timed_with_and_without_in_each_batch_size(scenes, file):
    inputs = next(iter(scenes.batches("test"))).inputs
    found = time_files({"student": file, "teacher": file}, inputs, "teacher", rounds=1)
    assert {name: list(times) for name, times in found.items()} == {
        who: list(BATCHES) for who in ("student", "teacher")
    }
    for times in found.values():
        for one in times.values():
            assert 0 < one["p50_ms"] <= one["p95_ms"]
            assert 0 < one[WITHOUT]["p50_ms"] < one["p95_ms"]
    assert found["teacher"][8]["ratio"] == found["teacher"][8][WITHOUT]["ratio"] == [1, 1, 1]
    head, *rows = latency_table(found, "teacher")
    assert head[-1] == "times as fast as the teacher"
    assert [row[:2] for row in rows[:2]] == [["student", "1"], [f"student, {WITHOUT}", "1"]]
    assert len(rows) == 2 * 2 * len(BATCHES)


def test_files_without_post_processing_are_left_to_the_page(scenes, net, caplog):
    data = SimpleNamespace(batches=scenes.batches)
    assert latency_of({"student": net}, data, SimpleNamespace(output_kind="categorical")) is None
    assert "latency=true times files with post-processing" in caplog.text


def test_a_summary_has_the_latency_of_both_networks_and_the_script_prints_it(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    cfg = compose_config(folder, *TINY, "trainer.max_epochs=0", "latency=true")
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    found = json.loads((folder / "summary.json").read_text())["latency"]
    assert (found["runtime"], found["threads"]) == ("onnxruntime", 1)
    for who in ("student", "teacher"):
        assert list(found[who]) == ["1", "8"]
        for one in found[who].values():
            assert 0 < one["without_post-processing"]["p50_ms"] < one["p95_ms"]
    main = runpy.run_path(str(ROOT / "scripts" / "benchmark_detector.py"))["main"]
    main(str(folder))
    printed = capsys.readouterr().out
    assert "| student, without post-processing | 8 |" in printed
    assert "| teacher | 1 |" in printed
