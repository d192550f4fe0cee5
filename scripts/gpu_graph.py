"""What `gpu.py` measures steps with: one bare step of a pair as one CUDA graph, and the kernels of a GPU in some steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_parts import PAIRS, Bench, Pair
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

STEPS = 160  # ten groups


def pairs_on(device: torch.device) -> tuple[str, ...]:
    """The pairs that are measured: the dry form has the small one."""
    return ("small", "resnet32x4") if device.type == "cuda" else ("small",)


def pair_on(name: str, device: torch.device) -> Pair:
    """A pair with as many steps as the device is to be timed for; on a CPU, as few and small as can be."""
    pair = PAIRS[name]
    if device.type == "cuda":
        return pair._replace(steps=STEPS, light_steps=STEPS)
    return pair._replace(steps=2, light_steps=2, batch=4)


def drawing(bench: Bench) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Draws a batch on the device, cropped, flipped and normalized: images, labels, and the place of each in the data."""
    pair, device = bench.pair, bench.device
    split = bench.data.source.train
    images, labels = split.images[:].to(device), split.targets.to(device)
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (bench.data.mean, bench.data.std))
    draw = functools.partial(torch.randint, device=device)
    rows, side = torch.arange(pair.batch, device=device).view(-1, 1, 1, 1), torch.arange(pair.shape[-1], device=device)
    channels = torch.arange(pair.shape[0], device=device).view(1, -1, 1, 1)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        chosen = draw(len(images), (pair.batch,))
        padded = F.pad(images[chosen], [pair.shift] * 4)
        y, x = (draw(2 * pair.shift + 1, (pair.batch, 1)) + side for _ in range(2))
        crop = padded[rows, channels, y[:, None, :, None], x[:, None, None, :]]
        if pair.flip:
            crop = torch.where(draw(2, (pair.batch, 1, 1, 1)).bool(), crop.flip(3), crop)
        crop = ((crop / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        return crop, labels[chosen], chosen

    return batch


def bare_step(bench: Bench, cached: bool) -> Callable[[], None]:
    """A whole step with nothing around it: images drawn, cropped and flipped on the device, both networks in bf16, the loss
    of KD, SGD. All of it can be captured: it reads nothing but the device."""
    device, draw = bench.device, drawing(bench)
    student, teacher = (net.to(memory_format=torch.channels_last) for net in bench.networks())
    student.train()
    known = torch.randn(len(bench.data.source.train.targets), bench.classes, device=device)
    optimizer = bench.fused(student.parameters())
    low = functools.partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=False)

    def step() -> None:
        batch, labels, chosen = draw()
        with low():
            with torch.no_grad():
                soft = known[chosen] if cached else teacher(batch).float()
            logits = student(batch).float()
        distance = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(soft / 4, 1), reduction="batchmean") * 16
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step recorded as a graph, after three that are not; on a CPU the step itself."""
    if device.type == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds_of(bench: Bench, step: Callable[[], Any], times: int) -> float:
    """Seconds of a step: by events of the GPU over so many, after a tenth of them to warm up."""
    for _ in range(max(1, times // 10)):
        step()
    if bench.device.type == "cpu":
        start = bench.clock()
        for _ in range(times):
            step()
        return (bench.clock() - start) / times
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(times):
        step()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / times


class EventWatch(Callback):
    """Seconds of a step between the ends of the groups in which `warm` and `end` steps are over, by events of the GPU."""

    def __init__(self, bench: Bench, warm: int, end: int):
        self.bench, self.wanted = bench, [warm, end]
        self.read: list[tuple[int, Any]] = []  # steps, and an event or seconds

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if len(self.read) < len(self.wanted) and trainer.global_step >= self.wanted[len(self.read)]:
            self.read.append((trainer.global_step, self._now()))

    def _now(self) -> Any:
        if self.bench.device.type == "cpu":
            return self.bench.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """Of a step."""
        (first, start), (last, end) = self.read
        if self.bench.device.type == "cpu":
            return float(end - start) / (last - first)
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (last - first)


class KernelWatch(Callback):
    """Kernels a step and their seconds, between the ends of the groups in which `warm` and `end` steps are over."""

    def __init__(self, warm: int, end: int):
        self.warm, self.end = warm, end
        self.profiler: Any = None
        self.first, self.last = 0, 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.profiler is None and trainer.global_step >= self.warm:
            torch.cuda.synchronize()
            self.first, self.profiler = trainer.global_step, profile(activities=[ProfilerActivity.CUDA])
            self.profiler.start()
        elif not self.last and self.profiler is not None and trainer.global_step >= self.end:
            torch.cuda.synchronize()
            self.profiler.stop()
            self.last = trainer.global_step

    def found(self) -> dict[str, float]:
        """Kernels a step, copies a step, and the milliseconds that both take."""
        steps = self.last - self.first
        events = [e for e in self.profiler.key_averages() if str(e.device_type).endswith("CUDA")]
        copies = [e for e in events if e.key.startswith(("Memcpy", "Memset"))]
        return {
            "kernels": sum(e.count for e in events if e not in copies) / steps,
            "copies": sum(e.count for e in copies) / steps,
            "kernels_ms": sum(e.self_device_time_total for e in events) / steps / 1e3,
        }
