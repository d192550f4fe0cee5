"""Latency, memory and energy against clocks, files and meters whose readings are known."""

import os
import random
import statistics
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from litdistill.evaluation import latency as measure


class Clock:
    """A clock that a model's run moves."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def model(self, name: str, seconds):
        """A model whose n-th call takes `seconds(n)`."""
        count = iter(range(10**9))

        def run(images):
            self.order.append(name)
            self.now += seconds(next(count))

        return run


def test_percentiles_and_throughput_are_numpys_of_all_calls():
    clock, taken, drawn = Clock(), [], random.Random(0)

    def seconds(n: int) -> float:
        taken.append(drawn.uniform(0.001, 0.009))
        return taken[-1]

    found = measure.time_models({"a": clock.model("a", seconds)}, np.zeros((64, 1, 8, 8)), "a", rounds=7, clock=clock)
    timed = taken[-found["a"]["calls"] :]
    assert found["a"]["calls"] % 7 == 0
    assert len(taken) > len(timed)  # the warm-up counts for nothing
    assert found["a"]["p50_ms"] == pytest.approx(1e3 * np.percentile(timed, 50), rel=1e-9)
    assert found["a"]["p95_ms"] == pytest.approx(1e3 * np.percentile(timed, 95), rel=1e-9)
    assert found["a"]["images_per_s"] == pytest.approx(64 * len(timed) / sum(timed), rel=1e-9)
    assert found["a"]["ratio"] == pytest.approx([1, 1, 1])


def test_models_take_turns_and_every_other_round_goes_backwards():
    clock = Clock()
    models = {n: clock.model(n, lambda _: 0.05) for n in "abc"}  # longer than a slice: one call a turn
    measure.time_models(models, np.zeros((1, 1, 8, 8)), "a", rounds=4, clock=clock)
    assert clock.order[:9] == [*"aaabbbccc"]  # warm-up
    assert "".join(clock.order[9:]) == "abccbaabccba"


def test_ratios_are_right_on_a_machine_that_slows_down():
    """Both models become eight times as slow from the first round to the last; their ratio in a round stays 1 to 4."""
    clock = Clock()
    machine = lambda: 1 + clock.now  # noqa: E731
    models = {
        "slow": clock.model("slow", lambda _: 0.04 * machine()),
        "fast": clock.model("fast", lambda _: 0.01 * machine()),
    }
    found = measure.time_models(models, np.zeros((1, 1, 8, 8)), "slow", rounds=30, slice_s=0.02, clock=clock)
    low, middle, high = found["fast"]["ratio"]
    assert low <= middle <= high
    assert middle == pytest.approx(0.25, rel=0.06)
    assert high - low < 0.1 * middle
    assert found["slow"]["p95_ms"] > 2 * found["slow"]["p50_ms"] * 0.9  # ... while latencies themselves drifted


def test_ratios_can_be_of_another_clock_than_latencies():
    """A machine that takes the CPU away for 9 ms out of every 10 falls on long calls alone."""
    wall, work = Clock(), Clock()

    def model(seconds: float):
        def run(images):
            work.now += seconds
            wall.now += seconds if seconds < 0.001 else 10 * seconds

        return run

    models = {"long": model(0.004), "short": model(0.0004)}
    found = measure.time_models(models, np.zeros((1, 1)), "long", rounds=3, clock=wall, work_clock=work)
    assert found["short"]["ratio"] == pytest.approx([0.1] * 3)
    assert found["long"]["ratio"] == pytest.approx([1] * 3)
    assert found["long"]["p50_ms"] == pytest.approx(40)
    assert found["short"]["p50_ms"] == pytest.approx(0.4)


def test_a_model_is_called_as_often_as_fits_into_a_slice():
    clock = Clock()
    models = {"quick": clock.model("quick", lambda _: 0.0001), "long": clock.model("long", lambda _: 0.003)}
    found = measure.time_models(models, np.zeros((1, 1)), "long", rounds=2, slice_s=0.02, clock=clock)
    assert found["quick"]["calls"] == 2 * measure.CALLS
    assert found["long"]["calls"] == 2 * 6


def onnx_file(path, width: int):
    """A network of one hidden layer that takes uint8."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            return self.net(images.float())

    example = (torch.zeros(2, 1, 8, 8, dtype=torch.uint8),)
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        Cast().eval(), example, dynamo=True, external_data=False, dynamic_shapes=dynamic, verbose=False
    )
    path.write_bytes(program.model_proto.SerializeToString())
    return Cast().eval()


@pytest.mark.process
def test_the_peak_of_memory_is_that_of_the_model(tmp_path):
    """The second file has 16 MB more weights. A process that starts from a large one must not inherit its peak."""
    ballast = torch.ones(100_000_000)  # noqa: F841
    onnx_file(tmp_path / "small.onnx", 8)
    onnx_file(tmp_path / "large.onnx", 8 + 16_000_000 // (4 * 68))
    small = measure.peak_memory(tmp_path / "small.onnx", 64)
    large = measure.peak_memory(tmp_path / "large.onnx", 64)
    if small is None:
        pytest.skip("this system tells no process its peak memory")
    assert 0 <= small < 30e6
    assert 16e6 < large - small < 80e6  # the runtime holds the file and the weights, and their packed copies


def test_onnx_and_torch_give_the_same_through_the_same_door(tmp_path):
    net = onnx_file(tmp_path / "small.onnx", 8)
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    for content in ((tmp_path / "small.onnx").read_bytes(), str(tmp_path / "small.onnx")):
        assert np.allclose(measure.onnx_run(content, 1)(images), measure.torch_run(net, "cpu")(images), atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_runtime_is_given_the_threads_that_are_stated(tmp_path, monkeypatch, threads):
    import onnxruntime

    onnx_file(tmp_path / "small.onnx", 8)
    given, session = [], onnxruntime.InferenceSession

    def watched(content, options, **others):
        given.append((options.intra_op_num_threads, options.inter_op_num_threads))
        return session(content, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    measure.onnx_run(str(tmp_path / "small.onnx"), threads)(np.zeros((2, 1, 8, 8), np.uint8))
    measure._grow(str(tmp_path / "small.onnx"), 2, threads)  # what the process that measures memory does
    assert set(given) == {(threads, 1)}


def test_energy_is_read_from_the_packages_counters_which_start_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RAPL", tmp_path)
    run = lambda images: None  # noqa: E731
    assert measure.energy_per_1000(run, np.zeros((10, 1)), seconds=0) is None
    for name, start in (("intel-rapl:0", 900), ("intel-rapl:1", 100), ("intel-rapl:0:0", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{start}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999\n")

    def works(images):
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("400\n")  # past its maximum: 500 more
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("350\n")
        (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("77\n")  # a core, of which the package knows already

    assert measure.energy_per_1000(works, np.zeros((10, 1)), seconds=0) == pytest.approx(1000 * 750e-6 / 10)


def test_a_run_that_fails_ends_the_meter_of_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 20\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        measure.energy_per_1000(lambda images: 1 / 0, np.zeros((10, 1)), "cuda", seconds=0)
    assert time.monotonic() - begun < 10


def test_energy_of_a_gpu_is_its_mean_power_times_the_time(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.energy_per_1000(lambda images: None, np.zeros((1, 1)), "cuda", seconds=0) is None
    script = f"#!{sys.executable}\nimport time\nprint('[N/A]\\n100.00\\n140.00', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    seen = []

    def run(images):
        time.sleep(0.2)
        seen.append(len(images))

    joules = measure.energy_per_1000(run, np.zeros((10, 1)), "cuda", seconds=1)
    assert joules == pytest.approx(1000 * statistics.mean([100, 140]) * 0.02, rel=0.3)
