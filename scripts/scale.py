"""What a step costs at any size: a model of its time, fitted to measurements, checked at other sizes, and its forecasts.

    python scripts/scale.py measure=cpu      measures a grid of networks and batches here, into docs/scale.json
    python scripts/scale.py                  fits, checks, and writes docs/scale.md

The model: seconds = launches x a + operations / b + bytes / c, with at least the times that the measured peaks of the device
allow. A network's operations, bytes and launches are counted on the meta device, module by module; a training step has three
times those of a forward, and its optimizer reads and writes every weight five times. `make gpu` measures the grid of a GPU as
its stage `grid`.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark_parts import network
from gpu import Figures
from gpu_graph import captured
from PIL import Image
from scipy.optimize import lsq_linear
from sklearn.datasets import load_sample_image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from litdistill.benchmarks.tables import read_options, run_script
from litdistill.utils.paths import CONF

DOCS = Path(__file__).resolve().parents[1] / "docs"
DEFAULTS = {"measure": "", "out": "runs/scale", "figures": "", "card": "a GPU"}
TIMES = 10  # measurements of which the median counts


class Work(NamedTuple):
    """What a step does: launched operations, floating-point operations, bytes moved; and the bytes of the weights."""

    launches: float
    flops: float
    moved: float
    weights: float

    def trained(self) -> Work:
        """Of forward, backward and optimizer, for a forward's."""
        return Work(3 * self.launches, 3 * self.flops, 3 * self.moved + 5 * self.weights, self.weights)

    def plus(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class Size(NamedTuple):
    """A network of conf/net (or timm's, after "timm:"), the shape of an image, and a batch."""

    net: str
    options: dict[str, Any]
    shape: tuple[int, int, int]
    batch: int
    fitted: bool = True  # else the model is checked on it

    @property
    def words(self) -> str:
        widths = "-".join(map(str, self.options.get("widths", [])))
        return f"{self.net}{' ' + widths if widths else ''}, {self.shape[-1]} pixels, batch {self.batch}"


def grid(device: str) -> list[Size]:
    """What is measured on a device."""
    if device == "cpu":
        small = [Size("conv4", {"widths": w}, (1, 28, 28), b) for w in ([8, 16, 32], [32, 64, 128]) for b in (16, 64)]
        deep = [Size("resnet8", {}, (3, 32, 32), b) for b in (4, 16)] + [Size("vgg8", {}, (3, 32, 32), 4)]
        checked = [
            *(Size("conv4", {"widths": [16, 32, 64]}, (1, 28, 28), b, False) for b in (32, 96)),
            *(Size("resnet8", {}, (3, 32, 32), 8, False), Size("resnet20", {}, (3, 32, 32), 8, False)),
        ]
        return [*small, *deep, *checked]
    return [
        *(Size(n, {}, (3, 32, 32), b) for n in ("resnet8x4", "resnet32x4") for b in (64, 512)),
        *(Size(n, {}, (3, 224, 224), b) for n in ("resnet18", "timm:vit_small_patch16_224") for b in (32, 256)),
        *(Size("resnet34", {}, (3, 224, 224), b, False) for b in (64, 256)),
        *(Size(n, {}, (3, 224, 224), 128, False) for n in ("resnet18", "timm:vit_small_patch16_224")),
        Size("resnet20", {}, (3, 32, 32), 128, False),
    ]


def built(size: Size, classes: int = 1000) -> nn.Module:
    if size.net.startswith("timm:"):
        import timm

        return timm.create_model(size.net.removeprefix("timm:"), num_classes=classes)
    assert (CONF / "net" / f"{size.net}.yaml").is_file()
    return network((size.net, size.options), size.shape, classes)


def counted(size: Size, element: int) -> Work:
    """The work of a forward; `element`: bytes of an activation."""
    with torch.device("meta"):
        net, images = built(size).eval(), torch.empty(size.batch, *size.shape)
    found = {"launches": 0, "moved": 0}

    def note(module: nn.Module, given: Any, result: Any) -> None:
        if not any(True for _ in module.children()):
            found["launches"] += 1
            tensors = [t for t in (*given, result) if isinstance(t, torch.Tensor)]
            found["moved"] += element * sum(t.numel() for t in [*tensors, *module.parameters(recurse=False)])

    for module in net.modules():
        module.register_forward_hook(note)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(images)
    weights = 4.0 * sum(p.numel() for p in net.parameters())
    return Work(found["launches"], counter.get_total_flops(), found["moved"], weights)


# -- measured --------------------------------------------------------------------------------------------------------


def measured(size: Size, device: torch.device, kind: str) -> float:
    """Median seconds of a forward or a training step; on a GPU captured and in bf16, on a CPU of the processor, one thread."""
    cuda = device.type == "cuda"
    form = torch.channels_last
    net = built(size, 10).to(device).to(memory_format=form).train(kind == "train")
    images = torch.randn(size.batch, *size.shape, device=device).contiguous(memory_format=form)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)
    low = lambda: torch.autocast(device.type, torch.bfloat16, cuda, cache_enabled=False)  # noqa: E731

    def step() -> None:
        with low(), torch.set_grad_enabled(kind == "train"):
            loss = net(images).float().square().mean()
        if kind == "train":
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    run, clock = captured(step, device), time.perf_counter if cuda else time.process_time
    seconds = []
    for _ in range(TIMES + 2):
        start = clock()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return float(np.median(seconds[2:]))


def measure_grid(figures: Figures, device: torch.device) -> None:
    """Adds the figures of a device's grid, and its peaks, as the stage `grid`."""
    element = 2 if device.type == "cuda" else 4
    for size in grid(device.type):
        for kind in ("forward", "train"):

            def work(size: Size = size, kind: str = kind) -> dict[str, Any]:
                todo = counted(size, element)
                todo = todo.trained() if kind == "train" else todo
                return {**todo._asdict(), "s": measured(size, device, kind), "fitted": size.fitted}

            figures.measure("grid", f"{size.words}, {kind}", work)
    figures.measure("grid", "peaks", lambda: peaks(device))
    figures.measure("grid", "decoding", decoding)


def peaks(device: torch.device) -> dict[str, float]:
    """Operations a second of a large matrix product, and bytes a second of a copy, counting those read and written."""
    cuda = device.type == "cuda"
    a = torch.randn(8192 if cuda else 1024, 8192 if cuda else 1024, device=device)
    a = a.bfloat16() if cuda else a
    b = torch.empty(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    c, seconds = torch.empty_like(b), []
    for work in (lambda: a @ a, lambda: c.copy_(b)):
        taken = []
        for _ in range(8):
            start = time.perf_counter() if cuda else time.process_time()
            work()
            if cuda:
                torch.cuda.synchronize()
            taken.append((time.perf_counter() if cuda else time.process_time()) - start)
        seconds.append(min(taken))
    return {"flops_per_s": 2 * len(a) ** 3 / seconds[0], "bytes_per_s": 2 * len(b) / seconds[1]}


def decoding() -> dict[str, float]:
    """Photographs of 500x375 a second that one core decodes and crops to 224 pixels."""
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize((500, 375)).save(file, "jpeg", quality=90)
    start, count = time.process_time(), 40
    for _ in range(count):
        with Image.open(io.BytesIO(file.getvalue())) as image:
            np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR, box=(50, 40, 400, 340)))
    return {"photographs_per_s": count / (time.process_time() - start)}


# -- the model -------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """Seconds of a launch, of a floating-point operation, of a byte."""

    launch: float
    flop: float
    byte: float

    def seconds(self, work: Work) -> float:
        return self.launch * work.launches + self.flop * work.flops + self.byte * work.moved


def fitted(measurements: Sequence[Mapping[str, Any]], flops_per_s: float, bytes_per_s: float) -> Model:
    """The model with the least squares of relative errors; no rate is above all that was seen."""
    rows = np.array([[m["launches"], m["flops"], m["moved"]] for m in measurements], dtype=float)
    relative = rows / np.array([[m["s"]] for m in measurements])
    fastest = np.maximum([flops_per_s, bytes_per_s], 1 / least_seconds(rows, measurements))
    lowest = np.array([0.0, *(1 / fastest)])
    unit = 1 / relative.max(0)  # columns of about one
    solved = lsq_linear(relative * unit, np.ones(len(rows)), bounds=(lowest / unit, np.inf))
    return Model(*(float(x) for x in solved.x * unit))


def least_seconds(rows: np.ndarray, measurements: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The least seconds of an operation and of a byte in any measurement: a shared machine's peak may come out too low."""
    return np.array([min(m["s"] / row[i] for m, row in zip(measurements, rows, strict=True)) for i in (1, 2)])


def errors(model: Model, measurements: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The model's time over the measured one, less 1, by measurement."""
    work = {m["what"]: Work(m["launches"], m["flops"], m["moved"], m["weights"]) for m in measurements}
    return {m["what"]: model.seconds(work[m["what"]]) / m["s"] - 1 for m in measurements}


# -- the forecast ----------------------------------------------------------------------------------------------------

BATCH, IMAGES, EPOCHS, CLASSES, TOP = 256, 1_281_167, 100, 1000, 10
CORES = 16  # beside each card
EXCHANGE = {1: float("inf"), 8: 450e9, 64: 50e9}  # bytes a second of each card: within a machine, between machines
PAIRS = {
    "ResNet-34 → ResNet-18": ("resnet34", "resnet18"),
    "ViT-B/16 → ViT-S/16": ("timm:vit_base_patch16_224", "timm:vit_small_patch16_224"),
}


def forecast(model: Model, photographs_per_s: float) -> list[dict[str, Any]]:
    """For each pair, number of cards, and teacher live or stored: seconds of a step's parts, the limit, hours of a run."""
    found = []
    for pair, (teacher, student) in PAIRS.items():
        of_teacher, of_student = (counted(Size(n, {}, (3, 224, 224), BATCH), 2) for n in (teacher, student))
        for cards, speed in EXCHANGE.items():
            for how in ("live", "stored"):
                work = of_student.trained().plus(of_teacher) if how == "live" else of_student.trained()
                parts = {
                    "networks": model.seconds(work),
                    "decoding": BATCH / (CORES * photographs_per_s),
                    "exchange": 2 * (cards - 1) / cards * of_student.weights / speed,
                }
                limit = max(parts, key=lambda name: parts[name])
                hours = IMAGES * EPOCHS / (BATCH * cards) * parts[limit] / 3600
                found.append({"pair": pair, "cards": cards, "teacher": how, **parts, "limit": limit, "hours": hours})
    return found


def page(kept: Mapping[str, Any]) -> str:
    """docs/scale.md."""
    parts = [HEAD]
    models = {}
    for device, one in kept["devices"].items():
        model = fitted([m for m in one["measured"] if m["fitted"]], one["flops_per_s"], one["bytes_per_s"])
        models[device] = model
        rows = ["| what | measured, ms | model, ms | off by | |", "|---|---:|---:|---:|---|"]
        off = errors(model, one["measured"])
        for m in one["measured"]:
            e = off[m["what"]]
            cells = f"{1e3 * m['s']:.2f} | {1e3 * m['s'] * (1 + e):.2f} | {100 * e:+.0f} %"
            rows.append(f"| {m['what']} | {cells} | {'fitted' if m['fitted'] else 'checked'} |")
        checked = [abs(off[m["what"]]) for m in one["measured"] if not m["fitted"]]
        within = sum(e <= 0.2 for e in checked)
        said = f"Of {len(checked)} sizes that it was not fitted to, {within} are within 20 %." if checked else UNCHECKED
        rates = ", ".join([f"{1e6 * model.launch:.2f} µs a launch", f"{1e-12 / model.flop:.3g} TFLOP/s"])
        parts += [f"## {device}", one["source"], f"{rates}, {1e-9 / model.byte:.3g} GB/s. {said}", "\n".join(rows)]
    card = kept["card"]
    rows = [
        f"| pair | cards | teacher | networks, ms | decoding, ms | exchange, ms | limit | hours of {EPOCHS} epochs |",
        "|---|---:|---|---:|---:|---:|---|---:|",
    ]
    for f in forecast(models[card], kept["photographs_per_s"]):
        cells = " | ".join(f"{1e3 * f[k]:.1f}" for k in ("networks", "decoding", "exchange"))
        rows.append(f"| {f['pair']} | {f['cards']} | {f['teacher']} | {cells} | {f['limit']} | {f['hours']:.2g} |")
    about = (
        f"Of a step of {BATCH} images a card by the model of {card}, at ImageNet-1k's size. Assumed, not measured: {CORES} "
        f"cores beside each card, {EXCHANGE[8] / 1e9:.0f} GB/s for the exchange of gradients within a machine of 8 cards and "
        f"{EXCHANGE[64] / 1e9:.0f} GB/s a card between machines, all three parts at the same time, so that the longest is the "
        f"step. One core decodes {kept['photographs_per_s']:.0f} photographs of 500x375 a second here."
    )
    full, top = IMAGES * CLASSES * 2 / 1e9, IMAGES * TOP * 6 / 1e9
    cache = (
        f"What is stored of a teacher for one view of each image takes {full:.1f} GB with all {CLASSES} logits in 16 bits, and "
        f"{top:.2f} GB with the {TOP} largest and their classes: both fit a card's memory for one view, and for "
        f"{int(80 / full)} and {int(80 / top)} views of 80 GB. A teacher that is run ahead for 16 minibatches at a time is "
        "launched once for all of them; by the model that saves "
        + "; ".join(f"{100 * s:.1f} % of a live step ({p})" for p, s in saved_ahead(models[card]).items())
        + "."
    )
    return "\n\n".join([*parts, "## Forecast", about, "\n".join(rows), cache]) + "\n"


def saved_ahead(model: Model) -> dict[str, float]:
    """By pair the share of a live step of which a teacher run ahead for 16 minibatches saves the launches."""
    found = {}
    for pair, names in PAIRS.items():
        teacher, student = (counted(Size(n, {}, (3, 224, 224), BATCH), 2) for n in names)
        found[pair] = 15 / 16 * model.launch * teacher.launches / model.seconds(student.trained().plus(teacher))
    return found


HEAD = """# Scale on paper

Written by `python scripts/scale.py`, whose head says what the model is. It is a model: what a forecast says of a size that
nobody has measured may be wrong by more than its check. Where a rate comes out as the device's peak, the fit could not tell it
from the other two, and times of larger networks are the least that they can take."""
UNCHECKED = "All measurements there are went into the fit, so that nothing checks it."


def keep(figures: Figures, kept: dict[str, Any], device: str, source: str) -> None:
    """Puts the figures of the stage `grid` into what docs/scale.json holds."""
    found = {f["what"]: f for f in figures.read() if f["stage"] == "grid" and "error" not in f}
    peak, speed = found.pop("peaks"), found.pop("decoding")
    found.pop("ended", None)
    names = ("what", "launches", "flops", "moved", "weights", "s", "fitted")
    rows = [{name: f[name] for name in names} for f in found.values()]
    rates = {name: peak[name] for name in ("flops_per_s", "bytes_per_s")}
    kept["devices"][device] = {"source": source, **rates, "measured": rows}
    kept["photographs_per_s"] = speed["photographs_per_s"]


def main() -> None:
    """See the head of this file. `figures=<figures.jsonl> card=<name>` takes in what `make gpu` has measured."""
    given = read_options(DEFAULTS, among={"measure": ("", "cpu")})
    path = DOCS / "scale.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"devices": {}, "card": ""}
    if given.measure:
        torch.set_num_threads(1)
        figures = Figures(Path(given.out) / "figures.jsonl")
        measure_grid(figures, torch.device("cpu"))
        keep(figures, kept, "CPU", "One thread of a shared machine, float32, milliseconds of its processor.")
    if given.figures:
        keep(Figures(Path(given.figures)), kept, given.card, "By `make gpu`, captured, bf16, milliseconds.")
        kept["card"] = given.card
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (DOCS / "scale.md").write_text(page(kept))


if __name__ == "__main__":
    run_script(main)
