"""The options of Lightning's Trainer, of torch's optimizers and schedulers, and of the tasks and compressions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from litdistill.config.schema.fields import (
    Count,
    CountFromZero,
    Decay,
    Deviations,
    Node,
    NotNegative,
    Numbers,
    Object,
    Part,
    Positive,
    Share,
    Text,
    option,
)

Batches = Count | Share
Precision = Literal["auto", "32-true", "16-mixed", "bf16-mixed", "32", 32, "16-true", "bf16-true", "64-true", "64", 64]


class Trainer(Node):
    """`trainer`: those arguments of Lightning's Trainer that have a meaning here."""

    target: str = Field(alias="_target_", description="Lightning's Trainer")
    accelerator: Text = option("auto, cpu, gpu, …")
    devices: Literal["auto"] | int | Text | list[CountFromZero] = option(
        "how many, or which; auto: all of this machine"
    )
    num_nodes: Count | None = option("machines; null: as many as were started")
    strategy: Text | Object | None = option("how several devices train together: ddp, or an object")
    max_epochs: Annotated[int, Field(ge=-1)] | None = option("epochs of the run; -1: no limit")
    min_epochs: CountFromZero | None = option("epochs before anything may stop the run")
    max_steps: Count | Literal[-1] | None = option("steps of the run; -1: no limit")
    min_steps: Count | None = option("steps before anything may stop the run")
    max_time: Text | dict[str, CountFromZero] | None = option("the time after which the run stops: 00:12:00:00")
    precision: Precision | None = option(
        "32-true; 16-mixed or bf16-mixed: autocast; auto: bf16-mixed on a GPU that has it, else 32-true"
    )
    gradient_clip_val: NotNegative | None = option("to which gradients are clipped; null: they are not")
    gradient_clip_algorithm: Literal["norm", "value"] | None = option("norm or value")
    accumulate_grad_batches: Count | None = option("minibatches whose gradients make one step")
    log_every_n_steps: CountFromZero | None = option(
        "steps between two logs; null: fits the epoch, at least two logs an epoch and at most 50 steps between two"
    )
    check_val_every_n_epoch: Count | None = option("epochs between two validations")
    val_check_interval: Batches | None = option("batches, or share of an epoch, between two validations")
    limit_train_batches: Batches | None = option("batches of an epoch, or a share of them; null: all")
    limit_val_batches: CountFromZero | Share | None = option("of a validation; null: all")
    limit_test_batches: CountFromZero | Share | None = option("of a test; null: all")
    overfit_batches: NotNegative | None = option("the same few batches in each epoch")
    num_sanity_val_steps: Annotated[int, Field(ge=-1)] | None = option("validation steps before the first epoch")
    reload_dataloaders_every_n_epochs: CountFromZero = option("epochs after which loaders are made anew")
    enable_model_summary: bool | None = option("print Lightning's table of the network")
    use_distributed_sampler: bool = option("the loaders divide the samples among ranks themselves")
    sync_batchnorm: bool = option("on GPUs: BatchNorm over the global batch, as one process would have it")
    deterministic: bool | Literal["warn"] | None = option("on GPU: deterministic kernels")
    benchmark: bool | None = option("let cuDNN try its kernels")
    detect_anomaly: bool = option("look for NaN in the backward pass, slowly")
    fast_dev_run: bool | CountFromZero = option("refused: trainer=debug is the same with a checkpoint")
    profiler: Text | Object | None = option("simple, advanced or pytorch: where the time goes")
    inference_mode: bool = option("validate without autograd's bookkeeping")


class Optimizer(Object):
    """`optimizer`: any of torch.optim or of yours; these options mean the same in all."""

    lr: NotNegative = option("learning rate", usual=0.001)
    weight_decay: NotNegative = option("how fast weights decay")
    momentum: Decay = option("share of the former step in the next")
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = option("decays of both averages")
    eps: NotNegative = option("added to the denominator")
    nesterov: bool = option("Nesterov's momentum")
    fused: bool | None = option("one kernel for all parameters")


class Scheduler(Object):
    """`scheduler`: any of torch's or of yours; these options mean the same in all."""

    interval: Literal["epoch", "step"] | None = option("stepped after each epoch, or after each step of the optimizer")
    monitor: Text | None = option("what a plateau is seen in; null: that of callbacks.best")
    mode: Literal["min", "max"] | None = option("max or min; null follows the metric")
    factor: Share = option("by which the rate is multiplied")
    patience: CountFromZero = option("epochs without a better value before the rate falls")
    gamma: Share = option("by which the rate is multiplied")
    milestones: Annotated[list[Count], Field(min_length=1)] = option("epochs after which the rate falls")
    step_size: Count = option("epochs between two falls")
    T_max: Count | None = option("times that it is stepped; null: to the end of the run")
    eta_min: NotNegative = option("the last rate")
    max_lr: Positive = option("the highest rate")
    total_steps: Count | None = option("null: all steps of the run")
    pct_start: Part = option("the share of them in which the rate rises")
    total: Count | None = option("steps; null: to the end of the run")
    warmup: Decay = option("the share of them in which it rises")
    start: Decay = option("the momentum of the first epoch")
    end: Decay = option("the momentum from epoch `ramp` on")
    ramp: Count = option("epochs in which the momentum rises")


class Balance(Node):
    """`balance=auto`."""

    target: str = Field(alias="_target_", description="the rule")
    ratio: NotNegative = option(
        "the gradient of each term that reads the student's features alone, relative to that of the labels' loss"
    )
    terms: dict[str, NotNegative | None] | None = option(
        "the same of terms by name, also of those that read logits: {soft: 1.0}; null: keeps its weight"
    )
    steps: Count = option("minibatches over which gradients are measured; the factors are fixed after them")


class Uncertainty(Node):
    """`balance=uncertainty`."""

    target: str = Field(alias="_target_", description="the rule")
    ratio: NotNegative = option(
        "the value of each term that reads the student's features alone, relative to that of the labels' loss"
    )
    terms: dict[str, NotNegative | None] | None = option(
        "the same of terms by name, also of those that read logits: {soft: 1.0}; null: keeps its weight"
    )
    decay: Decay = option("of the running means of the values, by minibatch")


class Classification(Node):
    """`task` of one label a sample."""

    target: str = Field(alias="_target_", description="the task")
    label_smoothing: Decay = option("the share of a label's probability that is spread over all classes")
    class_weights: Literal["balanced"] | list[NotNegative] | None = option(
        "of each class in the labels' loss, [1, 3]; balanced: the mean number of images of a class ÷ its own"
    )


class MultiLabel(Node):
    """`task` of several labels a sample."""

    target: str = Field(alias="_target_", description="the task")
    threshold: Part = option("the probability above which a label is predicted")


class Regression(Node):
    """`task` of numbers instead of labels."""

    target: str = Field(alias="_target_", description="the task")
    mean: Numbers | None = option(
        "of each value, by which targets are standardized; null: measured on the training set"
    )
    std: Deviations | None = option("likewise; both are given, or neither")


class Segmentation(Node):
    """`task` of a class for each pixel."""

    target: str = Field(alias="_target_", description="the task")
    ignored: int = option("the class of pixels that count for nothing")
    class_weights: list[NotNegative] | None = option("of each class in the labels' loss, [1, 3]; null: 1 each")


class LanguageModel(Node):
    """`task` of the next token at each place of a sequence."""

    target: str = Field(alias="_target_", description="the task")


class Detection(Node):
    """`task` of boxes with a class each."""

    target: str = Field(alias="_target_", description="the task")
    score_threshold: Decay = option("detections of a lower score are left out of the metrics")
    nms: Share = option("of two boxes of a class with a higher IoU the one of the lower score is left out")
    detections: Count = option("the most that are kept of a picture")


class Embedding(Node):
    """`task` of one vector a sample."""

    target: str = Field(alias="_target_", description="the task")
    width: Count | None = option(
        "of the student's vector; null: its teacher's, in whose place it can then be used", usual=128
    )


class Compression(Object):
    """`compress`: low_rank or prune."""

    budget: Share = option("the share that is left ...")
    of: Literal["parameters", "macs"] = option("... of parameters or macs")


class Callback(Object):
    """One of `callbacks`: any of Lightning's or of yours."""

    monitor: Text | None = option("the metric; null: the task's own, val/accuracy of classification")
    mode: Literal["min", "max"] | None = option("max or min; null follows the metric")
    dirpath: Text | None = option("the folder")
    filename: Text | None = option("the file's name, without its suffix")
    save_on_train_epoch_end: bool | None = option("also of an epoch without validation")
    enable_version_counter: bool = option("false: the file is replaced")
    patience: CountFromZero = option("epochs without a better value")


class Logger(Object):
    """One of `logger`: any of Lightning's or of yours."""

    save_dir: Any = option("the folder")
    name: Any = option("a folder in it")
    version: Any = option("a folder in that")
    default_hp_metric: bool = option("Lightning's placeholder of a metric")
