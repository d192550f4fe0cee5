"""The options of `train` and of `sweep`: conf/train.yaml and conf/sweep/base.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from litdistill.config.schema.fields import (
    Count,
    CountFromZero,
    Decay,
    Deviations,
    Name,
    Node,
    Nothing,
    NotNegative,
    Numbers,
    Object,
    Positive,
    Said,
    Seed,
    Share,
    Text,
    Texts,
    option,
)

Side = Count | Annotated[list[Count], Field(min_length=2, max_length=2)]
Point = Annotated[list[NotNegative], Field(min_length=2, max_length=2), Said("[epoch, factor], neither negative")]
Points = Annotated[list[Point], Field(min_length=1)]
COMPILE = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Preprocess(Node):
    """`student.preprocess`, `teacher.preprocess`."""

    mean: Numbers | None = option("of each channel, on the scale 0 to 1")
    std: Deviations | None = option("of each channel, on the scale 0 to 1")
    size: Side | None = option("side in pixels to which images are resized")


class Student(Object):
    """`student`: a network, with its own options beside these."""

    checkpoint: Text | None = option(
        "start from these weights: a run folder, a .ckpt or .safetensors file; teacher: from its; auto: see recipe"
    )
    recipe: dict[str, Any] | None = option("how `auto` trains the starting point, once: a diff on this config")
    head: Literal["new"] | None = option("new: of these weights take all but the classifier, which starts from nothing")
    preprocess: Preprocess | None = option(
        "{mean: [0.5], std: [0.2], size: 64}: how it normalizes (0 to 1) and resizes; null: as its weights say, else the data"
    )
    trainable: Texts | None = option("train these parts alone: [head], [last, head], or names of modules; null: all")
    statistics: Literal["fixed", "learned"] | None = option(
        "of batch normalization: fixed, as the weights bring them, or learned; null: fixed for published weights"
    )


class Cache(Node):
    """`teacher.cache`."""

    mode: Literal["auto", "disk", "memory", "off"] = option(
        "auto: on disk, in <runs>/cache, where that pays; disk, memory, off"
    )
    gb: Positive = option("what all caches together may take; the longest unused go first")
    dtype: Literal["float32", "float16"] = option("float16: half the room, rounded")
    shared: bool = option(
        "more runs with this teacher follow, so that keeping pays even for one pass; known in a sweep"
    )


class Teacher(Object):
    """`teacher`: a network, with its own options beside these; null: none."""

    checkpoint: Text | None = option(
        "auto: trained once by `recipe` and found again; a run folder or file; null: weights as built"
    )
    outputs: Text | None = option(
        "in place of a network: a file of outputs by sample, .safetensors, .npz, .npy, .parquet or .csv (docs/teachers.md), "
        "or boosting for tables: gradient boosting, fitted where it is not there yet"
    )
    head: Literal["new", "cut"] | None = option(
        "new: of these weights take all but the classifier, which starts from nothing; cut: a backbone, without a classifier"
    )
    preprocess: Preprocess | None = option("as for the student; so either can have its own")
    allow_chance: bool = option("go on with a teacher that is no better than chance")
    cache: Cache | None = option(
        "what it says of an image in a view is computed once, and kept for this run and those to come"
    )
    ensemble: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = option(
        "several as one: a list of diffs on this teacher, [{recipe: {seed: 0}}, {recipe: {seed: 1}}]"
    )
    ensemble_weights: Annotated[list[Positive], Field(min_length=1)] | None = option(
        "how much each counts, [2, 1], of any sum; null: equally"
    )
    ensemble_mean: Literal["logits", "probabilities"] = option("what is averaged of them: logits or probabilities")
    generations: Count = option("born again: 2 has the teacher taught by its like, with this run's method")
    recipe: dict[str, Any] | None = option("how `auto` trains it: a diff on this config")


class Scale(Node):
    """`scale`."""

    reference_batch: Count | None = option(
        "the global batch that optimizer.lr is meant for; null: optimizer.lr whatever the batch"
    )
    rule: Literal["linear", "sqrt"] = option("how the rate follows the batch: linear, or sqrt, which suits Adam")


class Compile(Node):
    """`compile`."""

    student: COMPILE | Literal["auto"] | None = option(
        "its mode of torch.compile; null: not compiled; auto: default where that is expected to save time, as a line says"
    )
    teacher: COMPILE | Literal["prepacked"] | None = option(
        "likewise, and one more: prepacked lays weights out once, on CPUs; last bits then depend on the place in a batch"
    )


class Adversarial(Node):
    """`adversarial`."""

    eps: Share = option("the largest change of any pixel, on the scale 0 to 1; published for CIFAR-10: 0.0314")
    step: Positive | None = option("the size of a step, on the same scale; null: 2.5 eps / steps")
    steps: Count = option("of the attack: each costs a forward and a backward of the student")


class Train(Node):
    """conf/train.yaml."""

    name: Name = option("runs go to runs/<name>/<stamp>/")
    technique: Name | None = option("what a comparison of techniques calls this run")
    seed: Seed = option("of weights, order, augmentation and data subset")
    runs: Text = option("the folder of all runs")
    folder: Text = option("what this run leaves is all here")
    data: Object = option("what is learned from: one of conf/data, or a LightningDataModule of yours")
    task: Object = option("what the network is trained for: one of conf/task, or a Task of yours")
    student: Student = option("the network that is trained: one of conf/net, or a function of yours")
    teacher: Teacher | None = option(
        "what the student learns from: one of conf/net, or a function of yours; teacher=null: none"
    )
    method: Object = option("what is learned from the teacher: one of conf/method, or a Method of yours")
    compress: Object | None = option("low_rank, prune or int8: makes the student smaller before it is trained on")
    optimizer: Object = option("one of conf/optimizer, or any of torch.optim")
    scheduler: Object | None = option("one of conf/scheduler, or any of torch.optim.lr_scheduler; null: none")
    method_lr: Positive | None = option(
        "the rate of the method's own layers (FitNet's regressor, MGD's generator), times optimizer.lr; null: that rate"
    )
    trainer: Object = option("Lightning's Trainer: one of conf/trainer")
    callbacks: dict[str, Object | None] | None = option(
        "any Lightning callback by a name of your choice; null drops one"
    )
    logger: dict[str, Object | None] | None = option(
        "any Lightning logger by a name of your choice; null drops one, logger=null all"
    )
    scale: Scale | None = option("data.batch_size is that of each process: the global batch is batch_size x processes")
    min_steps: Count | None = option(
        "at least so many optimizer steps: a small training set has more epochs than trainer.max_epochs"
    )
    schedule: dict[str, Points] | None = option(
        "scale a term of the loss over epochs: {soft: [[0, 0], [20, 1]]} warms `soft` up for 20 epochs"
    )
    balance: Object | Nothing | None = option(
        "auto: weights of hints left at their defaults fit by themselves, by gradients in the first minibatches; uncertainty: "
        "by the terms' values, to the end of the run; none: not"
    )
    adversarial: Adversarial | None = option(
        "pgd: the student is trained at inputs that an attack has changed (docs/security.md); none: at those it is given"
    )
    ema: Decay | None = option(
        "average the student's weights with this decay (0.999); the average is what is evaluated", usual=0.999
    )
    watch_test: bool = option(
        'measure the test set each epoch too, for "best on test" as others report it; it chooses nothing'
    )
    checkpoint_minutes: NotNegative | None = option(
        "saves the state so often in the middle of an epoch too; 0: at each step; null: at the end of each epoch alone"
    )
    resume: Text | None = option("auto: the newest unfinished run with this very command; or a run folder")
    trust: list[Text] | None = option(
        "packages that a resumed run which was not made here may name classes of: trust=[my_package]"
    )
    group: Literal["auto"] | Count = option(
        "minibatches that one step of Lightning holds, so that its own cost is paid once for all; 1: one"
    )
    capture: Literal["auto", "off"] = option(
        "a step as one CUDA graph, which saves the time of launching its kernels; off: kernel by kernel"
    )
    compile: Compile | None = option(
        "torch.compile, which pays on a GPU and for long runs: default, reduce-overhead (CUDA graphs), …"
    )
    latency: bool = option(
        "true: at the end time student and teacher as ONNX files, with and without post-processing, for summary.json"
    )
    threads: Count | None = option("CPU threads; null: all cores, which tiny networks are slower for")
    deterministic: bool | Literal["warn"] = option(
        "on GPU: deterministic kernels (on CPU runs are deterministic as they are)"
    )


class Prune(Node):
    """`sweep.prune`."""

    startup: CountFromZero = option("not before so many trials are finished")
    warmup: CountFromZero = option(
        "nor in a trial's first epochs; the first seed alone is judged, several objectives are not"
    )


Objective = Literal["val", "params", "macs", "bytes", "latency_ms", "fit_s"]


class SweepOptions(Node):
    """conf/sweep/base.yaml."""

    trials: Count | None = option(
        "how many in all, counting those of an earlier start and those that failed; null: the whole grid"
    )
    seed: Seed = option("of the sampler")
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = option(
        "[0, 1, 2]: a trial is one run for each, and its value their mean"
    )
    objectives: Annotated[list[Objective], Field(min_length=1)] = option(
        "val (as callbacks.best has it), params, macs, bytes, latency_ms, fit_s; two or more: a Pareto front"
    )
    sampler: Literal["tpe", "random", "grid"] = option("tpe, random or grid")
    prune: Prune | None = option("stops trials that are worse than the median of the others at that epoch; null: none")
    workers: Count = option(
        "processes of this machine that work on it at once; any number may join from elsewhere, also later, "
        "by litdistill sweep resume=<folder>"
    )
    pack: Count = option(
        "trials that are trained side by side on one pass of images and teacher, on one GPU: those with the same data and "
        "teacher; where seed is searched, set data.seed and data.subset_seed"
    )
    attempts: Count = option("a trial that has died with its process so often is recorded as failed")
    storage: Text = option(
        "sqlite, in the sweep's folder; journal: a file there, for file systems without locks that SQLite can use; "
        "or a database's URL, best as ${oc.env:NAME}, so that no password is written down"
    )
    space: dict[str, Any] | None = option(
        "shaped like the config: where that has a value, this has a list or a range; null leaves one out"
    )


class Sweep(Train):
    """conf/sweep.yaml."""

    sweep: SweepOptions = option("the search: one of conf/sweep")
