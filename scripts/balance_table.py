"""Trains a student by every method whose hints `balance=auto` weighs, and prints the table of docs/balance.md.

    python scripts/balance_table.py seeds=10 jobs=16
    python scripts/balance_table.py split=val ratios=[0.1,1] methods=[at,fitnet] 'overrides=[data=mnist, data.batch_size=64]'

Runs are those of conf/experiment/methods.yaml with `balance=auto`, `jobs` at a time, in `runs`; what is finished there is not
repeated. `only=true` trains nothing and prints the table of the methods whose runs are all there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from scipy.stats import t as student_t

from litdistill.benchmarks.compare import Job, config_of, run_all
from litdistill.benchmarks.tables import read_options, run_script
from litdistill.config.recipes import is_complete
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from litdistill.utils.text import markdown_table

CONTROL = "supervised"
METHODS = (
    *("at", "cc", "crd", "cwd", "fitnet", "ft", "ickd", "kd_at", "kd_crd", "kdsvd", "nst", "ofd", "pkd", "pkt"),
    *("reviewkd", "rkd", "sp", "srd", "srrl", "vid"),
)
DEFAULTS: dict[str, Any] = {
    **{"seeds": 5, "methods": list(METHODS), "ratios": [0.1], "split": "test", "overrides": []},
    **{"runs": "runs/balance", "jobs": 1, "only": False},
}
PUBLISHED = 240  # epochs, of which `init_epochs` is a share
Column = tuple[str, float]  # a method and its ratio


def job(method: str, ratio: float, seed: int, choices: DictConfig) -> Job:
    """Returns the run of a method with balanced hints, or that of the control."""
    said = ["experiment=methods", f"method={method}", f"seed={seed}", f"runs={choices.runs}", *choices.overrides]
    if method != CONTROL:
        said += ["balance=auto", f"balance.ratio={ratio:g}", *first_phase(method, tuple(choices.overrides))]
    if choices.split == "val":  # the last epoch alone is validated, so that none is chosen by it; the teacher as ever
        said += ["trainer.check_val_every_n_epoch=${trainer.max_epochs}"]
        said += ["++teacher.recipe.trainer.check_val_every_n_epoch=1"]
    return Job(method, "" if method == CONTROL else f"{ratio:g}", seed, tuple(said), str(choices.runs))


@cache
def first_phase(method: str, overrides: tuple[str, ...]) -> list[str]:
    """Returns how many epochs the first phase of a method takes, if it has one: the same share of them as published."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["experiment=methods", f"method={method}", *overrides])
    if "init_epochs" not in cfg.method:
        return []
    return [f"method.init_epochs={max(1, round(cfg.method.init_epochs / PUBLISHED * cfg.trainer.max_epochs))}"]


def jobs(choices: DictConfig) -> dict[tuple[Column, int], Job]:
    """Returns the runs by method, ratio and seed: all of a seed before the next, so that an interrupted table has few seeds."""
    columns: list[Column] = [(method, float(ratio)) for method in choices.methods for ratio in choices.ratios]
    return {
        (column, seed): job(*column, seed, choices)
        for seed in range(choices.seeds)
        for column in [columns[0], (CONTROL, 0.0), *columns[1:]]  # the first run trains the teacher of all
    }


def accuracy(folder: Path, split: str) -> float:
    """Returns in per cent the accuracy of the last epoch's weights of a finished run."""
    found = json.loads((folder / "summary.json").read_text())
    return 100 * (found["val"]["best"] if split == "val" else found["student"]["test"]["accuracy"]["last"])


def differences(choices: DictConfig) -> dict[Column, list[float]]:
    """Trains what is not there, and returns the differences from the control in points, seed by seed."""
    todo = jobs(choices)
    if choices.only:
        folders = {key: Path(config_of(one).folder) for key, one in todo.items()}
    else:
        folders = dict(zip(todo, run_all(list(todo.values()), choices.jobs, choices.split), strict=True))
    values = {key: accuracy(folder, choices.split) for key, folder in folders.items() if is_complete(folder)}
    seeds = [seed for seed in range(choices.seeds) if ((CONTROL, 0.0), seed) in values]
    found = {}
    for column in dict.fromkeys(column for column, _ in todo if column[0] != CONTROL):
        if all((column, seed) in values for seed in seeds):
            found[column] = [values[column, seed] - values[(CONTROL, 0.0), seed] for seed in seeds]
    if len(seeds) < 2 or not found:
        raise UserError("Too few finished runs: the control of two seeds at least, and a method of all its seeds.")
    return found


def interval(values: Sequence[float], tests: int = 1) -> tuple[float, float]:
    """Returns the 95 % interval of a mean by Student's t, corrected for a number of tests after Bonferroni."""
    half = float(student_t.ppf(1 - 0.025 / tests, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def table(found: Mapping[str, Sequence[float]]) -> str:
    """Returns the table of differences from the control in points, by method, and below it their mean over all methods."""
    rows = []
    for method, values in found.items():
        low, high = interval(values, len(found))
        rows.append((f"`{method}`", f"{mean(values):+.2f} ± {stdev(values):.2f}", f"{low:+.2f} to {high:+.2f}"))
    by_seed = [mean(values) for values in zip(*found.values(), strict=True)]
    low, high = interval(by_seed)
    rows.append((f"**mean of {len(found)}**", f"**{mean(by_seed):+.2f}**", f"{low:+.2f} to {high:+.2f}"))
    return markdown_table(("method", "over the control", "interval"), rows)


def by_ratio(found: Mapping[Column, Sequence[float]]) -> str:
    """Returns the table of mean differences from the control, a column for each ratio; below it their mean and the worst."""
    ratios = list(dict.fromkeys(ratio for _, ratio in found))
    methods = [m for m in dict.fromkeys(method for method, _ in found) if all((m, r) in found for r in ratios)]
    rows = [(f"`{method}`", *(f"{mean(found[method, r]):+.2f}" for r in ratios)) for method in methods]
    means = [[mean(found[method, r]) for method in methods] for r in ratios]
    rows.append((f"**mean of {len(methods)}**", *(f"**{mean(values):+.2f}**" for values in means)))
    rows.append(("**worst**", *(f"{min(values):+.2f}" for values in means)))
    return markdown_table(("method", *(f"{r:g}" for r in ratios)), rows)


def main() -> None:
    choices = read_options(DEFAULTS, {"seeds": 2})
    os.environ.setdefault("RUN_STAMP", "balance")
    found = differences(choices)
    print(table({method: v for (method, _), v in found.items()}) if len(choices.ratios) == 1 else by_ratio(found))


if __name__ == "__main__":
    run_script(main)
