"""The options of the commands that work on finished runs, and of `fetch` and `compare`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from litdistill.config.schema.fields import (
    Count,
    CountFromZero,
    Device,
    Node,
    NotNegative,
    Object,
    Said,
    Seed,
    Share,
    Text,
    Texts,
    Unit,
    option,
)

TRUST = "packages that a run which was not made here may name classes of: trust=[my_package]"
CHANGED = "what has changed about the data since: +data.root=elsewhere"
ATTACKS = (
    "quick: FGSM and PGD of 10 steps; strong: PGD of 20 steps from five starts, APGD-CE and Square, 18 times the gradients and "
    "1,000 queries an image"
)
Png = Annotated[str, Field(pattern=r"\.png$"), Said("the name of a .png file")]
Levels = Annotated[
    list[Annotated[int, Field(ge=1, le=255)]],
    Field(min_length=1),
    Said("a list of whole levels from 1 to 255, of which 26 is 0.1 of the whole range"),
]


class Evaluate(Node):
    """conf/evaluate.yaml."""

    run: Text = option("the run's folder")
    device: Device = option("cpu, cuda, or auto: a GPU if there is one")
    trust: list[Text] | None = option(TRUST)
    pictures: bool | Text = option(
        "true: draw TensorBoard's pictures of the run anew, and measure nothing; a folder: write them there as PNG"
    )
    robustness: CountFromZero = option("test images to attack, of classifiers of images; 0: none")
    eps: Share = option("of the attacks: the largest change of a pixel, on the scale 0 to 1")
    data: dict[str, Any] | None = option(CHANGED)


class Doctor(Node):
    """conf/doctor.yaml."""

    run: Text = option("the run's folder")
    device: Device = option("cpu, cuda, or auto: a GPU if there is one")
    trust: list[Text] | None = option(TRUST)
    data: dict[str, Any] | None = option(CHANGED)


class Tolerance(Node):
    """`tolerance` of an export."""

    difference: NotNegative | None = option(
        "of any logit, as a share of the largest logit; null: fp32 0.0001, fp16 0.02, int8 any"
    )
    agreement: Unit | None = option("least share of equal predictions; null: fp32 0.999, fp16 0.99, int8 0.95")


class Export(Node):
    """conf/export.yaml."""

    run: Text = option("the run's folder")
    format: Literal["onnx", "pt2", "safetensors", "torchscript"] = option(
        "onnx, pt2 (torch.export), safetensors (weights alone) or torchscript (deprecated by PyTorch)"
    )
    precision: Literal["fp32", "fp16", "int8"] = option("fp32; fp16 (not torchscript); int8 (onnx only)")
    preprocessing: bool = option(
        "the file takes uint8 images and normalizes them itself; false: it takes normalized floats"
    )
    calibration: Count = option("how many training images decide the ranges of int8")
    tolerance: Tolerance = option("what the file may differ from the student, on the whole test set")
    verify: bool = option("true: write nothing, check again what is in <run>/export/")
    trust: list[Text] | None = option(TRUST)
    allow_code: bool = option("with verify: open .pt2 and .pt files too, whose loaders can run code")
    data: dict[str, Any] | None = option(CHANGED)


class OutputsOfRun(Node):
    """conf/outputs.yaml."""

    run: Text = option("the run's folder")
    to: Text = option("the file to write, .safetensors")
    of: Literal["student", "teacher"] = option("whose outputs: of the run's student, or of its teacher")
    views: CountFromZero = option("so many augmented views of each training sample; 0: each as it is")
    precision: Literal["float32", "float16"] = option("of the numbers; float16: half the room, rounded")
    top: Count | None = option("the so many largest logits of each sample; null: all")
    rest: Literal["spread", "drop"] = option(
        "with top, the other classes' probability: spread evenly over them, or dropped"
    )
    embedding: bool = option("true: the input of the last layer too, for methods that compare pooled features")
    device: Device = option("cpu, cuda, or auto: a GPU if there is one")
    trust: list[Text] | None = option(TRUST)
    data: dict[str, Any] | None = option(CHANGED)


class Report(Node):
    """conf/report.yaml."""

    runs: Text | Texts = option("a folder that is searched for runs, a run, or a list of either")
    out: Text | None = option(
        "a file for the tables, .md, .csv or .tex; an .html file for the page, or a folder for it and report.md"
    )
    pivot: bool = option(
        "true: a row a method, columns a pair of teacher and student, with what it adds to labels alone"
    )
    picture: Png | None = option("a .png file to draw the test metric of every run to, with the means of the table")
    title: Text = option("of the page")
    threads: Count = option("CPU threads that models are timed with")
    rounds: Count = option("how often each model has its turn to be timed")
    robustness: CountFromZero = option("test images to spoil and to attack, of classifiers; 0: none")
    epsilons: Levels = option("of the attacks, in whole levels of 255: 26 for 0.1")
    attacks: Literal["quick", "strong"] = option(ATTACKS)
    int8: bool = option("measure each student of float weights as an int8 file too, made after its training")
    device: Device = option("where students are evaluated: cpu, cuda, or auto; they are timed on both")
    trust: list[Text] | None = option(TRUST)


class Compare(Node):
    """conf/compare.yaml."""

    dataset: Text = option("any of conf/data")
    seeds: Count = option("runs of each technique")
    techniques: Texts | None = option("[distilled, int8]: only these; null: all")
    family: Annotated[list[Text | list[Count]], Field(min_length=1)] = option("widths of the students of `family`")
    backbone: Text | None = option(
        "of detectors: the folder of the finished classification run that fine_tuned starts from; auto: of digit_scenes one of "
        "digits, trained before; null: leave it out"
    )
    jobs: Count = option("runs at a time; models are timed afterwards, one at a time")
    overrides: list[Text] = option(
        "of every run, as for litdistill train, each in quotes: \"overrides=['trainer.max_epochs=5']\""
    )
    runs: Text = option("finished runs of the same config are not repeated")
    out: Text = option("where the page goes")
    picture: Png | None = option("a .png file for the main picture")
    threads: Count = option("CPU threads that models are timed with")
    rounds: Count = option("how often each model has its turn to be timed")
    robustness: CountFromZero = option("test images to spoil and to attack, of classifiers; 0: none")
    epsilons: Levels = option("of the attacks, in whole levels of 255: 26 for 0.1")
    attacks: Literal["quick", "strong"] = option(ATTACKS)
    device: Device = option("where students are evaluated: cpu, cuda, or auto; they are timed on both")


class Fetch(Node):
    """conf/fetch.yaml."""

    data: Object = option("which data set: one of conf/data")
    weights: Text | None = option("fetch these weights and no data: efficientnet_lite0 or minilm")
    seed: Seed = option("of no meaning here: conf/data refers to it")
