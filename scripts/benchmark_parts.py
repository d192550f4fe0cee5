"""The loops that `benchmark.py` times: one function a variant, each giving seconds a step."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from benchmark_peers import peers, torchdistill
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from torch import Tensor, nn

from litdistill.config.instantiate import NETWORK_META_KEYS, instantiate
from litdistill.data.augment import Crop, Flip
from litdistill.data.datamodule import ImageData
from litdistill.data.sources import Source, Split
from litdistill.distillation.cuda_graphs import CudaGraphs
from litdistill.distillation.distiller import Distiller
from litdistill.distillation.teacher import FrozenTeacher
from litdistill.distillation.teacher_cache import CacheOptions, TeacherCache
from litdistill.methods.kd import KD
from litdistill.methods.supervised import Supervised
from litdistill.models.preprocess import Preprocess, Preprocessed
from litdistill.tasks import Classification
from litdistill.training.callbacks import EpochLogger
from litdistill.training.grouping import GROUP, GroupedData, Layout, group_size
from litdistill.training.preemption import GracefulStop
from litdistill.types import Batch, Outputs
from litdistill.utils.paths import CONF


class Pair(NamedTuple):
    """What is timed: networks by their files in conf/net with changed options, images, and how many steps a round, with the
    teacher and without it."""

    name: str
    words: str
    teacher: tuple[str, dict[str, Any]]
    student: tuple[str, dict[str, Any]]
    shape: tuple[int, int, int]
    steps: int
    light_steps: int
    shift: int = 2  # pixels of zeros around an image, out of which it is cropped anew
    flip: bool = False
    batch: int = 64


SMALL = ("conv4", {"widths": [8, 16, 32]})
PAIRS = {
    p.name: p
    for p in (
        Pair(
            "small",
            "conv4 32x64x128 → conv4 8x16x32, 28x28, shifted",
            ("conv4", {"widths": [32, 64, 128]}),
            SMALL,
            (1, 28, 28),
            steps=50,
            light_steps=50,
        ),
        Pair(
            "resnet50",
            "ResNet-50, standard stem → conv4 8x16x32, 28x28, shifted",
            ("resnet50", {"stem": "standard"}),
            SMALL,
            (1, 28, 28),
            steps=6,
            light_steps=32,
        ),
        Pair(
            "resnet50-3x3",
            "ResNet-50, 3x3 stem → conv4 8x16x32, 28x28, shifted",
            ("resnet50_cifar", {}),
            SMALL,
            (1, 28, 28),
            steps=2,
            light_steps=32,
        ),
        Pair(
            "resnet32x4",
            "resnet32x4 → resnet8x4, 32x32, crop and flip",
            ("resnet32x4", {}),
            ("resnet8x4", {}),
            (3, 32, 32),
            steps=2,
            light_steps=2,
            shift=4,
            flip=True,
        ),
    )
}


def hushed() -> None:
    """Lightning's own lines say nothing here."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "litdistill", "torchdistill"):
        logging.getLogger(name).setLevel(logging.ERROR)


def network(node: tuple[str, dict[str, Any]], shape: tuple[int, int, int], classes: int = 10) -> nn.Module:
    """A network of conf/net, with the same first weights each time."""
    name, options = node
    torch.manual_seed(0)
    config = OmegaConf.merge(OmegaConf.load(CONF / "net" / f"{name}.yaml"), options)
    return instantiate(
        {k: v for k, v in config.items() if k not in NETWORK_META_KEYS}, num_classes=classes, input_shape=shape
    )


LOG_EVERY = 50  # steps


class NoiseData(ImageData):
    """Image data whose files are given, and not read."""

    recordable = True

    def __init__(self, given: Source, **options: Any):
        super().__init__("digits", **options)
        self.given = given

    def _load(self) -> Source:
        return self.given


def random_data(
    shape: tuple[int, int, int], count: int, augment: Any = (), classes: int = 10, batch_size: int = 64, **options: Any
) -> ImageData:
    """`count` images of noise to train on, and as few others as the splits need."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
        return Split(images, torch.arange(n) % classes)

    held = 2 * classes
    source = Source(split(count + held), split(held), tuple(str(i) for i in range(classes)))
    data = NoiseData(source, val_size=held / (count + held), batch_size=batch_size, augment=augment, **options)
    data.setup()
    return data


class Bench:
    """A pair on its device: the data, and a clock that fits the device."""

    def __init__(self, pair: Pair, device: torch.device, classes: int = 10):
        self.pair, self.device, self.classes = pair, device, classes
        augment = [Crop(pair.shift), *([Flip()] if pair.flip else [])]
        count = pair.batch * max(64, 4 * max(pair.steps, pair.light_steps))
        self.data = random_data(pair.shape, count, augment, classes, pair.batch)
        self.optimizer = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.fused = functools.partial(self.optimizer, fused=True)

    def clock(self) -> float:
        """Seconds: of this process's CPU, or where a GPU computes of the wall, when it is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher for normalized images."""
        student, teacher = (
            network(n, self.pair.shape, self.classes).to(self.device) for n in (self.pair.student, self.pair.teacher)
        )
        return student, teacher.eval().requires_grad_(False)

    def preprocessed(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher as this project has them: for images as they are, with their channels last."""
        assert self.data.mean is not None
        assert self.data.std is not None
        facts = (self.data.mean, self.data.std)
        student, teacher = (Preprocessed(n, Preprocess(*facts)).to(self.device) for n in self.networks())
        return student.to(memory_format=torch.channels_last), teacher.eval()


def variants(bench: Bench) -> dict[str, Callable[[], float]]:
    """By name a function that trains for so many steps as the pair says, and gives seconds a step."""
    light = copy.copy(bench)
    light.pair = bench.pair._replace(steps=bench.pair.light_steps)
    found: dict[str, Callable[[], float]] = {
        "peers": peers(bench),
        "live": functools.partial(project, bench, "live"),
        "packed": functools.partial(project, bench, "packed"),
        "cached": functools.partial(project, light, "cached"),
        "hard": functools.partial(project, light, "hard"),
        "floor": floor(light),
    }
    if multiplies_bf16():
        found["bf16"] = functools.partial(project, bench, "bf16")
    with contextlib.suppress(ImportError):
        found["torchdistill"] = torchdistill(bench)
    return found


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16, as far as its torch tells: others are many times slower
    in it."""
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


# -- this project ----------------------------------------------------------------------------------------------------


class Stopwatch(Callback):
    """Reads the clock at the end of the step or group in which `warm` steps are over, and of the one in which `end` are."""

    def __init__(self, bench: Bench, warm: int, end: int):
        self.bench, self.wanted = bench, [warm, end]
        self.read: list[tuple[int, float]] = []  # steps and seconds

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if len(self.read) < len(self.wanted) and trainer.global_step >= self.wanted[len(self.read)]:
            self.read.append((trainer.global_step, self.bench.clock()))

    @property
    def seconds(self) -> float:
        """Of a step."""
        (first, start), (last, end) = self.read
        return (end - start) / (last - first)


class Known(Distiller):
    """A distiller whose teacher has been asked everything before."""

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.teacher is not None
        assert self.data is not None
        self.cache = TeacherCache(self.teacher, self.data, self.device)
        self.cache.store.valid.fill_(True)
        self.cache.store.rows.normal_()


def project(bench: Bench, kind: str, minibatches: int = GROUP, captured: bool = True) -> float:
    """Seconds a step of what `trained` trains, after as many steps to warm up."""
    watch = Stopwatch(bench, bench.pair.steps, 2 * bench.pair.steps)
    trained(bench, kind, 2 * bench.pair.steps, [watch], min(minibatches, bench.pair.steps), captured)
    return watch.seconds


def trained(
    bench: Bench,
    kind: str,
    steps: int,
    callbacks: Sequence[Callback] = (),
    minibatches: int = GROUP,
    captured: bool = True,
    precision: str | None = None,
    compile: Mapping[str, Any] | None = None,
) -> Distiller:
    """A fit with what a run has: callbacks, a TensorBoard log, groups of at most so many `minibatches`.

    `captured`: on a GPU, by a recorded step where there is one. `precision`: of the Trainer; None: bf16 on a GPU, where the
    `kind` says so on a CPU. `compile`: options with which the student is compiled.
    """
    student, teacher = bench.preprocessed()
    ids, hard = bench.data.train_ids[:2].to(bench.device), kind == "hard"
    example = bench.data.get_batch("train", ids, None)
    frozen = FrozenTeacher(teacher, example=example, compile="prepacked" if kind == "packed" else None)
    distiller = (Known if kind == "cached" else Distiller)(
        student,
        Supervised() if hard else KD(hard=0.1, soft=0.9, temperature=4),
        None if hard else frozen,
        example,
        optimizer=bench.fused,
        seed=0,
        allow_chance=True,
        data=bench.data,
        cache=CacheOptions("off"),
        group=minibatches,
        recorder=CudaGraphs() if captured else None,
    )
    group = min(steps, group_size(distiller, bench.data, minibatches))
    if compile is not None:
        distiller.student.compile(**compile)
    low = bench.device.type == "cuda" or kind == "bf16"
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu" if bench.device.type == "cpu" else "gpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[EpochLogger(), GracefulStop(folder), *callbacks],
            logger=TensorBoardLogger(folder),
            log_every_n_steps=1,  # of groups: the Distiller knows after which one something is logged
            limit_val_batches=0,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
            use_distributed_sampler=False,
            precision=precision or ("bf16-mixed" if low else "32-true"),  # type: ignore[arg-type]
        )
        data = GroupedData(bench.data, Layout(group, LOG_EVERY), recorder=distiller.recorder)
        trainer.fit(distiller, datamodule=data)
    return distiller


def losses(student: nn.Module, teacher_outputs: Outputs, batch: Batch, method: KD) -> Tensor:
    """What a step of KD goes down on."""
    outputs = Outputs.of(student(batch.inputs))
    hard = Classification().loss(student, outputs, batch)["hard"]
    return method.hard * hard + method(outputs, teacher_outputs, batch)["soft"]


def floor(bench: Bench) -> Callable[[], float]:
    """As little as a step can be: gather, augment, two losses, backward, the fused optimizer."""
    student, _ = bench.preprocessed()
    data, method, optimizer = bench.data, KD(hard=0.1, soft=0.9, temperature=4), bench.fused(student.parameters())
    views = data.views or 1
    teacher_outputs = torch.randn(views, len(data.train_targets), bench.classes, device=bench.device)
    generator = torch.Generator().manual_seed(0)
    autocast = functools.partial(torch.autocast, bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda")

    def run() -> float:
        student.train()
        start = bench.clock()
        for _ in range(bench.pair.steps):
            chosen = torch.randint(len(data.train_ids), (bench.pair.batch,), generator=generator)
            ids = data.train_ids[chosen].to(bench.device)
            view = torch.randint(views, (bench.pair.batch,), generator=generator).to(bench.device)
            batch = data.get_batch("train", ids, view if data.augment else None)
            with autocast():
                loss = losses(student, Outputs.of(teacher_outputs[view, ids]), batch, method)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (bench.clock() - start) / bench.pair.steps

    return run


def budget(bench: Bench, rounds: int) -> dict[str, float]:
    """Median seconds of the parts of a step: images, teacher, student's forward with the loss, backward, optimizer."""
    student, teacher = bench.preprocessed()
    data, method, optimizer = bench.data, KD(), bench.fused(student.parameters())
    ids = data.train_ids[: bench.pair.batch].to(bench.device)
    views = torch.arange(bench.pair.batch, device=bench.device) % (data.views or 1) if data.augment else None
    frozen = FrozenTeacher(teacher, example=data.get_batch("train", ids[:2], None))
    parts: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = bench.clock()
        result = work()
        parts.setdefault(name, []).append(bench.clock() - start)
        return result

    for _ in range(rounds + 1):
        batch = timed("images", lambda: data.get_batch("train", ids, views))
        teacher_outputs = timed("teacher", lambda: frozen(batch))  # noqa: B023
        loss = timed("forward", lambda: losses(student, teacher_outputs, batch, method))  # noqa: B023
        optimizer.zero_grad()
        timed("backward", loss.backward)
        timed("optimizer", optimizer.step)
    return {name: statistics.median(times[1:]) for name, times in parts.items()}
