"""How counts and metrics are written for people: shares in per cent with two digits, other numbers with four that count."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MAPS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
SHARES = ("accuracy", *MAPS, "f1", "agreement")  # from 0 to 1, shown in per cent
THOUSANDTHS = ("nll", "ece", "brier", "kl", "r2")  # shown with three digits
NAMES = {
    "map": "mAP",
    "f1": "F1",
    "nll": "NLL",
    "ece": "ECE",
    "kl": "KL",
    "brier": "Brier",
    "rmse": "RMSE",
    "mae": "MAE",
}
NAMES |= {"r2": "R²", "map_50": "mAP50", "map_75": "mAP75"}
NAMES |= {f"map_{size}": f"mAP of {size} objects" for size in ("small", "medium", "large")}


def quantity(number: int, noun: str) -> str:
    """Returns a count with its noun: `1 output`, `10 classes`, `1,200 boxes`, `2 categories`."""
    many = f"{noun}es" if noun.endswith(("s", "x")) else f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else many}"


def named(name: str) -> str:
    """A metric as it is written in a sentence: `accuracy`, `RMSE`."""
    return NAMES.get(name, name.replace("_", " "))


def heading(name: str) -> str:
    """... at the head of a column: `accuracy %`, `RMSE`."""
    return named(name) + (" %" if name in SHARES else "")


def axis(name: str) -> str:
    """... beside an axis: `accuracy (%)`, `RMSE`."""
    return named(name) + (" (%)" if name in SHARES else "")


def factor(name: str) -> float:
    """By what a value is multiplied before it is shown under its heading."""
    return 100.0 if name in SHARES else 1.0


def shown(name: str, value: float) -> str:
    """A value with its unit: `91.27 %`, `54.21`."""
    return f"{100 * value:.2f} %" if name in SHARES else f"{value:.4g}"


def decimals(name: str, value: float) -> int:
    """How many digits stand behind the point of a value that is shown under its heading."""
    if name in SHARES:
        return 2
    if name in THOUSANDTHS or not math.isfinite(value) or value == 0:
        return 3
    return max(0, 3 - math.floor(math.log10(abs(value))))


class Number(NamedTuple):
    """A figure as tables hold it: a mean, its standard deviation over seeds, and how many digits are shown."""

    mean: float
    deviation: float | None = None
    digits: int = 0
    unit: str = ""
    signed: bool = False

    def __str__(self) -> str:
        """The figure for people: `91.27 ± 2.30`, `24,058`, `+3.40`, `12 s`."""
        text = f"{self.mean:{'+' if self.signed else ''},.{self.digits}f}".replace("-", "−" if self.signed else "-")
        text += "" if self.deviation is None else f" ± {self.deviation:,.{self.digits}f}"
        return text + (f" {self.unit}" if self.unit else "")


def measured(name: str, values: Sequence[float], signed: bool = False) -> Number:
    """Mean and standard deviation over seeds (the sample's, n - 1) of a metric's values, under its heading."""
    scaled = [factor(name) * v for v in values]
    digits = decimals(name, statistics.mean(scaled))
    return Number(statistics.mean(scaled), deviation(scaled), digits, signed=signed)


def deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation (n - 1); None for one value, NaN where a value is not finite."""
    if len(values) == 1:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def shown_mean(name: str, values: Sequence[float]) -> str:
    """`measured` as text."""
    return str(measured(name, values))


def spread(values: Sequence[float], digits: int = 2, signed: bool = False) -> str:
    """Mean ± standard deviation over seeds (the sample's, n - 1), or the value alone where there is one."""
    return str(Number(statistics.mean(values), deviation(values), digits, signed=signed))


def gain(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    """Mean ± standard deviation, with its sign, of the differences seed by seed, of the seeds that both have; – without any."""
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    return spread(differences, signed=True) if differences else "–"
