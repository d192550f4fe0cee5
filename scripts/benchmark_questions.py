"""What `benchmark.py` asks beside the ratios of steps: caches that fill, growth, memory, the share of the peak."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmark_parts import PAIRS, Bench, project, random_data
from lightning import Trainer
from torch import Tensor

from litdistill.data.augment import Crop
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions
from litdistill.methods.kd import KD
from litdistill.training.grouping import GROUP, GroupedData, Layout, group_size

CPU = torch.device("cpu")


def filled_by_views(images: int = 1024, epochs: int = 30) -> dict[str, float]:
    """ResNet-50 → ConvNet on shifted images: the first run that keeps what it asks, and the next with another seed, which sees
    other views of an image or the same, against one that asks anew each time; and how far weights are from each other."""
    pair = PAIRS["resnet50"]
    bench = Bench(pair, CPU)

    def fit(mode: str, seed: int, folder: str, view_seed: int | None = None) -> tuple[float, dict[str, Tensor]]:
        data = random_data(pair.shape, images, [Crop(2)], seed=seed, subset_seed=0, view_seed=view_seed)
        student, teacher = bench.preprocessed()
        example = data.get_batch("train", data.train_ids[:2], None)
        distiller = Distiller(
            student,
            KD(),
            FrozenTeacher(teacher, example=example),
            example,
            optimizer=bench.fused,
            seed=seed,
            allow_chance=True,
            data=data,
            cache=CacheOptions(mode, Path(folder)),
            group=GROUP,
        )
        module = GroupedData(data, Layout(group_size(distiller, data), 0))
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        start = time.process_time()
        trainer.fit(distiller, datamodule=module)
        return time.process_time() - start, distiller.student.state_dict()

    with tempfile.TemporaryDirectory() as folder:
        live, expected = fit("off", 0, folder)
        first, weights = fit("disk", 0, folder)
        same_views, _ = fit("disk", 1, folder, view_seed=0)
        second, _ = fit("disk", 1, folder)
        live_again, _ = fit("off", 1, folder)
    apart = max(float((weights[k] - v).abs().max()) for k, v in expected.items() if v.is_floating_point())
    return {
        "live_s": live,
        "live/first": live / first,
        "live/next": live_again / second,
        "live/next_same_views": live_again / same_views,
        "largest_difference_of_weights": apart,
    }


def growth() -> dict[str, dict[str, float]]:
    """CPU milliseconds of a cached step as images, classes and batch grow; and of a whole run's samples with two ranks."""
    found: dict[str, dict[str, float]] = {"images": {}, "classes": {}, "batch": {}}
    pair = PAIRS["small"]
    for count in (2_000, 20_000, 200_000):
        bench = Bench(pair, CPU)
        bench.data = random_data(pair.shape, count)
        found["images"][str(count)] = 1e3 * statistics.median(project(bench, "cached") for _ in range(3))
    for classes in (10, 100, 1000):
        bench = Bench(pair, CPU, classes)
        found["classes"][str(classes)] = 1e3 * statistics.median(project(bench, "cached") for _ in range(3))
    for size in (16, 64, 256):
        bench = Bench(pair._replace(batch=size), CPU)
        found["batch"][str(size)] = 1e3 * statistics.median(project(bench, "cached") for _ in range(3))
    found["ranks"] = {str(n): _samples_per_s(n) for n in (1, 2)}
    return found


def _samples_per_s(ranks: int) -> float:
    """Of a short run of `scripts/train.py` with that many gloo processes, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(Path(__file__).parent / "train.py"),
            f"runs={folder}",
            f"folder={folder}/run",
            "logger=none",
            "threads=1",
            "trainer=ddp" if ranks > 1 else "trainer=cpu",
            "trainer.accelerator=cpu",
            f"trainer.devices={ranks}",
            "trainer.max_epochs=20",
            f"data.batch_size={64 // ranks}",
            "net@teacher=conv4",
            "+teacher.recipe.trainer.max_epochs=1",
            "teacher.allow_chance=true",
        ]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads((Path(folder) / "run" / "summary.json").read_text())["time"]["samples_per_s"]


MEMORY = """
import resource, sys, torch
sys.path.insert(0, {scripts!r})
import benchmark_parts as parts
parts.hushed()
torch.set_num_threads(1)
pair = parts.PAIRS["resnet32x4"]._replace(steps=16)
parts.project(parts.Bench(pair, torch.device("cpu")), "live")       # what the libraries take when they run
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bench = parts.Bench(pair, torch.device("cpu"))
bench.data = parts.random_data(pair.shape, {count}, bench.data.augment)
data = bench.data.source.train.images.nbytes
parts.project(bench, "cached")
print(before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, data)
"""


def peak_memory(count: int = 200_000) -> dict[str, float]:
    """What a large resident data set adds to a process's peak, in bytes, relative to the images' own; in a fresh process."""
    code = MEMORY.format(scripts=str(Path(__file__).parent), count=count)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    before, after, data = map(int, done.stdout.split()[-3:])
    table = count * 162 * (40 + 8 + 1)  # the cache of 162 views: rows, marks and which are known
    return {
        "images_bytes": data,
        "added_bytes": after - before,
        "cache_bytes": table,
        "added/images": (after - before - table) / data,
    }


def share_of_peak(bench: Bench, teacher_s: float, step_s: float) -> dict[str, float]:
    """FLOPs of a live step and of its teacher's part, and the share of this device's peak that each takes in the given time.

    The peak is measured by large matrix products, in float32 on a CPU and in bfloat16 on a GPU, as the steps are.
    """
    from torch.utils.flop_counter import FlopCounterMode

    student, teacher = bench.networks()
    images = torch.randn(bench.pair.batch, *bench.pair.shape, device=bench.device)
    with FlopCounterMode(display=False) as teacher_counter, torch.no_grad():
        teacher(images)
    with FlopCounterMode(display=False) as student_counter:
        student(images).sum().backward()
    cpu = bench.device.type == "cpu"
    side, times = (2048, 10) if cpu else (8192, 20)
    a = torch.randn(side, side, device=bench.device, dtype=torch.float32 if cpu else torch.bfloat16)
    seconds = []
    for _ in range(times):
        start = bench.clock()
        a @ a
        seconds.append(bench.clock() - start)
    peak = 2 * side**3 / min(seconds)
    of_teacher = teacher_counter.get_total_flops()
    flops = of_teacher + student_counter.get_total_flops()
    return {
        "peak_flops_per_s": peak,
        "teacher_flops": of_teacher,
        "teacher_share": of_teacher / teacher_s / peak,
        "step_flops": flops,
        "step_share": flops / step_s / peak,
    }
