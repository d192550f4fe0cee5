"""Published tables: for each cell, the experiment of a pair of networks and a method, and the published value.

`experiment=crd/wrn_40_2_wrn_16_2/kd` is no file: `register` adds it to Hydra's config store as a diff on
conf/experiment/crd/base.yaml. The experiments of hinton2015 are files, as they share no base.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore


class Published(NamedTuple):
    """A published value. `protocol`: the epoch it is reported for; `errors`: it counts errors among 10,000 images."""

    value: float  # top-1 accuracy in %, or errors
    source: str
    protocol: str = "last"  # "last", "best" (on validation) or "best_on_test"
    errors: bool = False


class Table(NamedTuple):
    """Published figures in % by method (rows) and pair (columns)."""

    source: str
    protocol: str
    base: str  # the experiment that all cells are diffs on
    pairs: dict[str, tuple[str, str]]  # teacher and student by column
    figures: str  # a row: the method, and for each pair a value, "-" (no experiment) or "?" (no value)
    methods: dict[str, dict[str, Any]]  # the config changes of a row, by method
    data: str | None = None  # the data set, if not that of the base


# a first phase of 30 epochs, then 240
FIRST_EPOCHS = {"trainer": {"max_epochs": 270}, "scheduler": {"milestones": [180, 210, 240]}}

DECOUPLED = {"schedule": {"tckd": [[0, 0], [20, 1]], "nckd": [[0, 0], [20, 1]]}}
MULTI_LEVEL = {
    "trainer": {"max_epochs": 480},
    "scheduler": {"milestones": [300, 360, 420]},
    "optimizer": {"lr": 0.025},
}
# Standardized logits and learnt temperatures are switches of other methods: the method of such a row, and what is switched. The
# numbers are those of the authors' code: all weights of MLKD times ten but the labels', its temperature of 4 becomes 2.
SWITCHED = {"ctkd": "kd", "ctkd_std": "logit_std", "dkd_std": "dkd", "mlkd_std": "mlkd"}
CURRICULUM = {"learnt": 10, "temperature": 15.62}
MULTI_LEVEL_STD = {
    **{"standardized": True, "instance": 13.5, "batch": 4.5, "classes": 4.5},
    "temperatures": [2.0, 2.0, 3.0, 5.0, 6.0],
}

CRD = Table(
    source="RepDistiller's README; the rows from dkd on are the methods' own papers', which report the best test epoch",
    protocol="last",
    base="crd/base",
    pairs={
        "A": ("wrn_40_2", "wrn_16_2"),
        "B": ("wrn_40_2", "wrn_40_1"),
        "C": ("resnet56", "resnet20"),
        "D": ("resnet110", "resnet20"),
        "E": ("resnet110", "resnet32"),
        "F": ("resnet32x4", "resnet8x4"),
        "G": ("vgg13", "vgg8"),
        "H": ("vgg13", "mobilenet_v2"),
        "I": ("resnet50_cifar", "mobilenet_v2"),
        "J": ("resnet50_cifar", "vgg8"),
        "K": ("resnet32x4", "shufflenet_v1"),
        "L": ("resnet32x4", "shufflenet_v2"),
        "M": ("wrn_40_2", "shufflenet_v1"),
    },
    figures="""
                        A     B     C     D     E     F     G     H     I     J     K     L     M
        student         73.26 71.98 69.06 69.06 71.14 72.50 70.36 64.60 64.60 70.36 70.50 71.82 70.50
        kd              74.92 73.54 70.66 70.67 73.08 73.33 72.98 67.37 67.35 73.81 74.07 74.45 74.83
        fitnet          73.58 72.24 69.21 68.99 71.06 73.50 71.02 64.14 63.16 70.69 73.59 73.54 73.73
        at              74.08 72.77 70.55 70.22 72.31 73.44 71.43 59.40 58.58 71.84 71.73 72.73 73.32
        sp              73.83 72.43 69.67 70.04 72.69 72.94 72.68 66.30 68.08 73.34 73.48 74.56 74.52
        cc              73.56 72.21 69.63 69.48 71.48 72.97 70.71 64.86 65.43 70.25 71.14 71.29 71.38
        vid             74.11 73.30 70.38 70.16 72.61 73.09 71.23 65.56 67.57 70.30 73.38 73.40 73.61
        rkd             73.35 72.22 69.61 69.25 71.82 71.90 71.48 64.52 64.43 71.50 72.28 73.21 72.21
        pkt             74.54 73.45 70.34 70.25 72.61 73.64 72.88 67.13 66.52 73.01 74.10 74.69 73.89
        ab              72.50 72.38 69.47 69.53 70.98 73.17 70.94 66.06 67.20 70.65 73.55 74.31 73.34
        ft              73.25 71.59 69.84 70.22 72.37 72.86 70.58 61.78 60.99 70.29 71.75 72.50 72.03
        fsp             72.91 -     69.95 70.11 71.89 72.62 70.23 -     -     -     -     -     -
        nst             73.68 72.24 69.60 69.53 71.96 73.30 71.53 58.16 64.96 71.28 74.12 74.68 74.89
        crd             75.48 74.14 71.16 71.46 73.48 75.51 73.94 69.73 69.11 74.30 75.11 75.65 76.05
        dkd             76.23 74.81 71.97 71.06 74.11 76.32 74.68 69.71 70.35 -     76.45 77.07 76.70
        dist            -     74.43 71.75 -     -     76.31 -     -     68.66 -     76.34 77.35 -
        logit_std 76.11 74.37 71.43 71.48 74.17 76.62 74.36 68.61 69.02 -     -     75.56 -
        mlkd            76.63 75.35 72.19 71.89 74.11 77.08 75.18 70.57 71.04 -     -     78.44 -
        ofd             75.24 74.33 70.98 71.29 73.23 74.95 73.95 69.48 69.04 -     -     76.82 -
        reviewkd        76.12 75.09 71.89 71.34 73.89 75.63 74.84 70.37 69.89 75.34 77.45 77.78 77.14
        simkd           75.53 74.53 71.05 71.06 73.92 78.08 74.89 69.44 69.97 -     -     78.39 -
        srrl            -     74.64 -     -     -     75.39 -     -     -     -     -     -     -
        nkd             -     -     -     -     -     -     -     68.72 69.39 74.01 75.31 76.26 75.96
        ctkd            75.45 73.93 71.19 70.99 73.52 73.39 73.52 68.50 68.67 -     -     75.37 -
        ctkd_std        76.08 74.58 71.34 71.39 74.01 76.67 74.47 68.98 69.36 -     -     76.18 -
        dkd_std         76.39 74.89 72.32 71.85 74.29 77.01 74.81 69.98 70.45 -     -     77.37 -
        mlkd_std        76.95 75.56 72.33 72.27 74.32 78.28 75.22 70.94 71.19 -     -     78.76 -
    """,
    methods={
        "ft": {"method": {"pool_channels": True, "hint": 200.0}, **FIRST_EPOCHS},
        "ab": FIRST_EPOCHS,
        "fsp": FIRST_EPOCHS,
        "dkd": DECOUPLED,
        "dkd_std": {"method": {"standardized": True, "tckd": 9.0, "temperature": 2.0}, **DECOUPLED},
        "mlkd": MULTI_LEVEL,
        "mlkd_std": {"method": MULTI_LEVEL_STD, **MULTI_LEVEL},
        "ctkd": {"method": CURRICULUM},
        "ctkd_std": {"method": CURRICULUM},
        "reviewkd": {"schedule": {"hint": [[0, 0], [20, 1]]}},
    },
)
NCKD = dict.fromkeys("FKLIM", 8.0) | dict.fromkeys("CDE", 2.0) | dict.fromkeys("ABGHJ", 6.0)
BY_PAIR = {  # a weight of a method by column of the CRD table; its yaml's for other columns
    "dkd": ("nckd", NCKD),
    "dkd_std": ("nckd", {column: 9 * weight for column, weight in NCKD.items()}),
    "reviewkd": ("hint", {"C": 0.6, "E": 1.0}),
}
# Rows reported for the best epoch on the test set.
FROM_BEST_EPOCH = ("dkd", "dist", "logit_std", "mlkd", "ofd", "reviewkd", "simkd", "srrl", "nkd", *SWITCHED)
SMALL_STEPS = ("mobilenet_v2", "shufflenet_v1", "shufflenet_v2")  # learning rate 0.01

CRD_CIFAR10 = Table(
    source="nobody: there are no published figures",
    protocol="last",
    base="crd/base",
    data="cifar10",
    pairs={"F": ("resnet32x4", "resnet8x4")},
    figures="""
                F
        student ?
        kd      ?
        dkd     ?
    """,
    methods={"dkd": CRD.methods["dkd"]},
)

ZAGORUYKO = Table(
    source="Zagoruyko & Komodakis 2017, table 1",
    protocol="last",
    base="zagoruyko2017/base",
    pairs={"A": ("wrn_16_2", "wrn_16_1"), "B": ("wrn_40_1", "wrn_16_1"), "C": ("wrn_40_2", "wrn_16_2")},
    figures="""
                A     B     C
        student 91.23 91.23 93.69
        kd      92.59 91.61 93.92
        at      92.07 91.75 94.15
        kd_at   92.49 91.99 94.29
    """,
    methods={},
)

ZAGORUYKO_SHORT = Table(
    source="nobody: 6 epochs where the paper has 200",
    protocol="last",
    base="zagoruyko2017/short",
    pairs=ZAGORUYKO.pairs,
    figures="""
                A     B     C
        student ?     ?     ?
        kd      ?     ?     ?
        at      ?     ?     ?
        kd_at   ?     ?     ?
    """,
    methods={},
)

ABERHU = Table(
    source="AberHu's Knowledge-Distillation-Zoo, README",
    protocol="best_on_test",
    base="aberhu/base",
    pairs={"A": ("resnet110", "resnet20")},
    figures="""
                  A
        student   92.37
        kd        92.82
        logit_mse 92.98
        at        93.21
        fitnet    93.04
        sp        93.30
        rkd       93.21
        crd       92.92
    """,
    methods={  # the weights of its example_train_script.sh
        "kd": {"method": {"hard": 1.0, "soft": 0.1}},
        "logit_mse": {
            "method": {"hard": 1.0, "soft": 0.02}
        },  # 0.1 times the mean over ten classes: 0.02 times half of the sum
        "fitnet": {"method": {"hint": 0.1}},
        "crd": {"method": {"hint": 0.2, "temperature": 0.1}},
    },
)

IMAGENET = Table(
    source="the methods' own papers, most of which report the best test epoch; srd is torchdistill's run",
    protocol="best_on_test",
    base="imagenet/base",
    pairs={"A": ("resnet34", "resnet18"), "B": ("resnet50", "mobilenet_v1")},
    figures="""
                  A     B
        student   69.75 68.87
        ofd       70.81 71.25
        reviewkd  71.61 72.56
        simkd     71.59 72.25
        srrl      71.73 72.49
        logit_std 71.42 72.18
        dkd       71.70 72.05
        mlkd      71.90 73.01
        srd       71.92 -
        nkd       71.96 72.58
        ctkd      71.38 71.16
        ctkd_std  71.81 72.92
        mlkd_std  72.08 73.22
    """,
    methods={
        "dkd": {"method": {"nckd": 0.5, "temperature": 1.0}},
        "ctkd": {"method": CURRICULUM},
        "ctkd_std": {"method": CURRICULUM},
        "mlkd_std": {"method": MULTI_LEVEL_STD},
    },
)

TABLES = {
    "imagenet": IMAGENET,
    "crd": CRD,
    "crd_cifar10": CRD_CIFAR10,
    "zagoruyko2017": ZAGORUYKO,
    "zagoruyko2017_short": ZAGORUYKO_SHORT,
    "aberhu": ABERHU,
}

HINTON = {  # section 3; the figures of no_threes_bias and only_7_8_bias are with biases chosen on the test set
    "teacher": 67,
    "student": 146,
    "distilled": 74,
    "no_threes": 206,
    "no_threes_bias": 109,
    "only_7_8": 4730,
    "only_7_8_bias": 1320,
}


def cells(table: Table) -> dict[tuple[str, str], float | None]:
    """Returns the value of each (column, method) of a table; None for an experiment without a published value."""
    head, *rows = (line.split() for line in table.figures.strip().splitlines())
    found = {}
    for method, *figures in rows:
        for column, figure in zip(head, figures, strict=True):
            if figure != "-":
                found[column, method] = None if figure == "?" else float(figure)
    return found


def experiments() -> dict[str, dict[str, Any]]:
    """Returns the config nodes of all cells by experiment: a defaults list and a diff on train.yaml."""
    return {
        f"{name}/{'_'.join(table.pairs[column])}/{method}": _node(name, table, column, method)
        for name, table in TABLES.items()
        for column, method in cells(table)
    }


def published() -> dict[str, Published]:
    """Returns the published values by experiment."""
    found = {
        f"hinton2015/{cell}": Published(errors, "Hinton, Vinyals & Dean 2015, section 3", "best", errors=True)
        for cell, errors in HINTON.items()
    }
    for name, table in TABLES.items():
        for (column, method), figure in cells(table).items():
            if figure is not None:
                best = table is CRD and method in FROM_BEST_EPOCH
                protocol = "best_on_test" if best else table.protocol
                found[f"{name}/{'_'.join(table.pairs[column])}/{method}"] = Published(figure, table.source, protocol)
    return found


def _node(name: str, table: Table, column: str, method: str) -> dict[str, Any]:
    teacher, student = table.pairs[column]
    diff = dict(table.methods.get(method, {}))
    if table.base == "crd/base" and method in BY_PAIR:
        weight, by_column = BY_PAIR[method]
        if column in by_column:
            diff["method"] = {**diff.get("method", {}), weight: by_column[column]}
    if table.base == "crd/base" and student in SMALL_STEPS:
        diff.setdefault("optimizer", {"lr": 0.01})
    defaults: list[Any] = [
        f"/experiment/{table.base}",
        {"override /net@student": student},
        {"override /net@teacher": teacher},
        {"override /method": "supervised" if method == "student" else SWITCHED.get(method, method)},
    ]
    if table.data is not None:
        defaults.append({"override /data": table.data})
    node: dict[str, Any] = {"defaults": defaults, "name": "_".join((name, teacher, student, method))}
    if method == "student":
        node["teacher"] = None
    return node | diff


def register(texts: Iterable[str]) -> None:
    """Registers each cell that one of `texts` (a command's arguments) names as an option of Hydra's group `experiment`.

    Only named cells: Hydra copies its store at every lookup of a group, a quarter of a second each time for all cells.
    """
    store, text = ConfigStore.instance(), " ".join(texts)
    for name, node in experiments().items():
        if name in text:
            group, _, cell = f"experiment/{name}".rpartition("/")
            store.store(group=group, name=cell, node=node, package="_global_")
