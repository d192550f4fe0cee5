"""The stages of `gpu.py` that measure forms of a step which this project does not take by itself.

vmap: students of one kind that learn from the same batches, side by side on streams, as `sweep.pack` trains them, and stacked
by `torch.func` as one network. The stacked form is worth building where streams take `WORTH` times as long.
compile: a student that `torch.compile` fuses within its recorded step: seconds to compile, at first and with what it has kept
on disk, and milliseconds a step. `litdistill.training.compiling` assumes both.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_parts import Bench, network, random_data, trained
from gpu import Figures
from gpu_graph import EventWatch, captured, drawing, pair_on, pairs_on, seconds_of
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from litdistill.data.loading import Rows
from litdistill.data.named import augmentations
from litdistill.distillation.captured_batches import CapturedBatches
from litdistill.distillation.cuda_graphs import CudaGraphs
from litdistill.training import compiling
from litdistill.training.grouping import moved
from litdistill.types import Group

COUNT, WORTH = 16, 1.5
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}

Given = tuple[Tensor, Tensor, Tensor]  # images, labels, the teacher's logits


def batches(bench: Bench) -> tuple[Given, Callable[[], None]]:
    """Tensors of a batch, and what writes the next one to them."""
    draw = drawing(bench)
    known = torch.randn(len(bench.data.source.train.targets), bench.classes, device=bench.device)
    images, labels, chosen = draw()
    given = images, labels, known[chosen]

    def refresh() -> None:
        images, labels, chosen = draw()
        for kept, new in zip(given, (images, labels, known[chosen]), strict=True):
            kept.copy_(new)

    return given, refresh


def students_of(bench: Bench, count: int) -> list[nn.Module]:
    """Students with their channels last, in train mode, each with first weights of its own."""
    found = []
    for i in range(count):
        net = network(bench.pair.student, bench.pair.shape, bench.classes)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1 + 0.1 * torch.rand(p.shape, generator=generator))
        found.append(net.to(bench.device).to(memory_format=torch.channels_last).train())
    return found


def low(bench: Bench) -> torch.autocast:
    """Products in bf16 on a GPU."""
    return torch.autocast(bench.device.type, torch.bfloat16, bench.device.type == "cuda", cache_enabled=False)


def loss_of_kd(logits: Tensor, soft: Tensor, labels: Tensor) -> Tensor:
    """The loss of KD at temperature 4, a scalar; of operations that `vmap` does not take apart, as it does `F.kl_div`."""
    student, teacher = F.log_softmax(logits / 4, 1), F.log_softmax(soft / 4, 1)
    distance = 16 * (teacher.exp() * (teacher - student)).sum(1).mean()
    return 0.1 * F.cross_entropy(logits, labels) + 0.9 * distance


def alone(bench: Bench, student: nn.Module, given: Given) -> Callable[[], None]:
    """The step of one student."""
    optimizer, (images, labels, soft) = bench.fused(student.parameters()), given

    def step() -> None:
        with low(bench):
            logits = student(images).float()
        optimizer.zero_grad()
        loss_of_kd(logits, soft, labels).backward()
        optimizer.step()

    return step


def stacked(bench: Bench, students: Sequence[nn.Module], given: Given) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """The step of all students as one network, and their weights (students, ...) by name."""
    weights, buffers = stack_module_state([*students])
    body, (images, labels, soft) = copy.deepcopy(students[0]).to("meta"), given
    optimizer = bench.fused(weights.values())

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        with low(bench):
            logits = functional_call(body, (weights, buffers), (images,)).float()
        return loss_of_kd(logits, soft, labels)

    def step() -> None:
        losses = vmap(loss, randomness="different")(weights, buffers)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()

    return step, weights


def side_by_side(steps: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """Runs steps on streams of their own; on a CPU one after the other."""
    streams = [torch.cuda.Stream() for _ in steps] if device.type == "cuda" else []

    def run() -> None:
        if not streams:
            for step in steps:
                step()
            return
        current = torch.cuda.current_stream()
        for step, stream in zip(steps, streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step()
        for stream in streams:
            current.wait_stream(stream)

    return run


def same_batches(device: torch.device) -> dict[str, Any]:
    """Whether groups of 16 augmented minibatches are the same recorded and launched, and milliseconds of both."""
    steps = ["RandomResizedCrop", "Flip", {"ColorJitter": JITTER}, "RandAugment", "RandomErasing"]
    count = 4096 if device.type == "cuda" else 256
    data = random_data((3, 32, 32), count, augmentations(steps), batch_size=64)
    captured = CapturedBatches(data, CudaGraphs())
    rows = [moved(r, device) for r in data.train_loader(group=16)]
    make = captured.make_batch if device.type == "cuda" else data.make_batch
    equal = True
    for _ in range(4):
        for r in rows:
            one, two = make(r), data.make_batch(r)
            assert isinstance(one, Group)
            assert isinstance(two, Group)
            equal &= bool(torch.equal(one.batch.inputs, two.batch.inputs))
            equal &= bool(torch.equal(one.batch.targets, two.batch.targets))

    def ms(make: Callable[[Rows], Any]) -> float:
        start = time.perf_counter()
        for r in rows:
            make(r)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / len(rows)

    found = {"equal": equal, "replayed": captured.replayed, "reason": str(captured.reason)}
    return {**found, "recorded_ms": ms(make), "launched_ms": ms(data.make_batch)}


def many_students(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """The stage `vmap`, of the small pair; one batch a step for all students."""
    bench, count = Bench(pair_on("small", device), device), COUNT if device.type == "cuda" else 3
    batch, refresh = batches(bench)
    draw = captured(refresh, device)

    def timed(step: Callable[[], Any]) -> dict[str, float]:
        return {"step_ms": 1e3 * seconds_of(bench, lambda: (draw(), step()), bench.pair.steps)}

    def streams(count: int) -> dict[str, float]:
        steps = [captured(alone(bench, student, batch), device) for student in students_of(bench, count)]
        return timed(side_by_side(steps, device))

    names = "one student", f"{count} students on streams", f"{count} students stacked"
    figures.measure("vmap", names[0], lambda: streams(1))
    figures.measure("vmap", names[1], lambda: streams(count))
    figures.measure(
        "vmap", names[2], lambda: timed(captured(stacked(bench, students_of(bench, count), batch)[0], device))
    )
    ms = {f["what"]: f["step_ms"] for f in figures.read() if f["stage"] == "vmap" and "step_ms" in f}
    if ms.keys() >= {*names}:
        ratio = ms[names[1]] / ms[names[2]]
        found = {"streams ÷ one": ms[names[1]] / ms[names[0]], "streams ÷ stacked": ratio, "worth": ratio >= WORTH}
        figures.measure("vmap", "ratios", lambda: found)


def compiled_student(figures: Figures, device: torch.device, given: Mapping[str, str]) -> None:
    """The stage `compile`: the cached step of each pair."""
    # The dry form traces alone: a C++ compiler takes minutes for what is fused on a CPU.
    options = {"mode": compiling.MODE} if device.type == "cuda" else {"backend": "aot_eager"}
    for name in pairs_on(device):
        bench = Bench(pair_on(name, device), device)
        figures.measure("compile", f"{name} student", functools.partial(seconds_to_compile, bench, options))
        for how, chosen in (("plain", None), ("compiled", options)):
            figures.measure("compile", f"{name} cached {how}", functools.partial(cached_step, bench, chosen))


def seconds_to_compile(bench: Bench, options: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a first forward and backward: plain, compiled, and compiled again with what was kept on disk; and the layers
    with parameters, by which `compile.student=auto` guesses them."""
    (images, labels, soft), _ = batches(bench)

    def first(options: Mapping[str, Any] | None) -> float:
        torch.compiler.reset()  # forgets what this process has compiled, not what lies on disk
        (student,) = students_of(bench, 1)
        if options is not None:
            student.compile(**options)
        start = time.perf_counter()
        with low(bench):
            logits = student(images).float()
        loss_of_kd(logits, soft, labels).backward()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            found = {"plain_s": first(None), "cold_s": first(options), "kept_s": first(options)}
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            os.environ |= {"TORCHINDUCTOR_CACHE_DIR": kept} if kept is not None else {}
    (student,) = students_of(bench, 1)
    return {**found, "layers": float(sum(any(True for _ in m.parameters(recurse=False)) for m in student.modules()))}


def cached_step(bench: Bench, options: Mapping[str, Any] | None) -> dict[str, float]:
    """Milliseconds of this project's recorded cached step."""
    steps = bench.pair.steps
    watch = EventWatch(bench, steps, 2 * steps)
    trained(bench, "cached", 2 * steps, [watch], min(16, steps), compile=options)
    return {"step_ms": 1e3 * watch.seconds}
