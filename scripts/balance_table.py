"""Trains a student by every method whose hints a rule of `balance` weighs, and prints the table of docs/balance.md.

    python scripts/balance_table.py seeds=10 jobs=16
    python scripts/balance_table.py dataset=cifar10 root=data seeds=3 keep=docs/balance.json out=docs/balance.md
    python scripts/balance_table.py dataset=mnist split=val seeds=3 rules=[auto,auto:0.3,uncertainty]

A rule is a file of conf/balance, and after a colon its `balance.ratio`; several stand beside each other. Runs are those of
conf/experiment/methods.yaml with that rule, `jobs` at a time, in `runs`; what is finished there is not repeated. `only=true`
trains nothing and prints the table of the methods whose runs are all there. `keep` names a JSON file for what was found, by
data set and rule (`cifar10`, `cifar10 uncertainty`), and `out` a document that has the table between marks of that name,
`<!-- cifar10 -->` and `<!-- end cifar10 -->`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from litdistill.benchmarks.compare import Job, config_of, run_all
from litdistill.benchmarks.tables import between_marks, interval, read_options, run_script
from litdistill.config.recipes import is_complete
from litdistill.utils.command_line import literal
from litdistill.utils.errors import UserError
from litdistill.utils.files import write_text
from litdistill.utils.logging import format_seconds
from litdistill.utils.paths import CONF
from litdistill.utils.text import markdown_table
from litdistill.utils.units import spread
from litdistill.utils.versions import in_words, versions

CONTROL = "supervised"
METHODS = (
    *("at", "cc", "crd", "cwd", "fitnet", "ft", "ickd", "kd_at", "kd_crd", "kdsvd", "nst", "ofd", "pkd", "pkt"),
    *("reviewkd", "rkd", "sp", "srd", "srrl", "vid"),
)
CHOSEN_BY = ("at", "fitnet", "sp", "crd", "kd_at", "pkt", "rkd", "nst", "srd", "cwd")  # the rule was, on MNIST


class Setting(NamedTuple):
    """What is run on a data set: the methods, and what all runs have beside conf/experiment/methods.yaml."""

    methods: tuple[str, ...]
    overrides: tuple[str, ...] = ()


# CIFAR-10's networks, teacher and views are those of docs/few.md. The student's steps were chosen by the time of one run alone,
# MNIST's rate by labels alone on the validation set.
SETTINGS = {
    "digits": Setting(METHODS),
    "mnist": Setting(
        CHOSEN_BY,
        (
            *("data=mnist", "data.batch_size=64", "student.widths=[16,32,64]", "teacher.widths=[32,64,128]"),
            *("optimizer.lr=0.003", "trainer.max_epochs=40"),
            *("++teacher.recipe.optimizer.lr=0.001", "++teacher.recipe.trainer.max_epochs=6"),
        ),
    ),
    "cifar10": Setting(
        CHOSEN_BY,
        (
            *("data=cifar10", "data.per_class=50", "data.batch_size=64", "data.epoch_size=1536", "data.val_size=500"),
            *("data.augment=[{Crop:{pad:4}},Flip]", "student.widths=[16,32,64]", "teacher.widths=[32,64,128]"),
            "++teacher.recipe.trainer.max_epochs=6",
        ),
    ),
}
DEFAULTS: dict[str, Any] = {
    **{
        "dataset": "digits",
        "root": None,
        "seeds": 5,
        "methods": None,
        "rules": ["auto"],
        "split": "test",
        "overrides": [],
    },
    **{"runs": "runs/balance", "jobs": 1, "only": False, "keep": None, "out": None},
}
PUBLISHED = 240  # epochs, of which `init_epochs` is a share
Column = tuple[str, str]  # a method and its rule; "" of the control


def job(method: str, rule: str, seed: int, choices: DictConfig) -> Job:
    """Returns the run of a method with balanced hints, or that of the control."""
    own = (*SETTINGS[choices.dataset].overrides, *([f"data.root={literal(str(choices.root))}"] if choices.root else []))
    own = (*own, *choices.overrides)
    said = ["experiment=methods", f"method={method}", f"seed={seed}", f"runs={literal(str(choices.runs))}", *own]
    if method != CONTROL:
        name, _, ratio = rule.partition(":")
        said += [f"balance={name}", *([f"balance.ratio={ratio}"] if ratio else []), *first_phase(method, own)]
    if choices.split == "val":  # the last epoch alone is validated, so that none is chosen by it; the teacher as ever
        said += ["trainer.check_val_every_n_epoch=${trainer.max_epochs}"]
        said += ["++teacher.recipe.trainer.check_val_every_n_epoch=1"]
    return Job(method, rule.replace(":", "-"), seed, tuple(said), str(choices.runs))


@cache
def first_phase(method: str, overrides: tuple[str, ...]) -> list[str]:
    """Returns how many epochs the first phase of a method takes, if it has one: the same share of them as published."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["experiment=methods", f"method={method}", *overrides])
    if "init_epochs" not in cfg.method:
        return []
    return [f"method.init_epochs={max(1, round(cfg.method.init_epochs / PUBLISHED * cfg.trainer.max_epochs))}"]


def jobs(choices: DictConfig) -> dict[tuple[Column, int], Job]:
    """Returns the runs by method, rule and seed: all of a seed before the next, so that an interrupted table has few seeds."""
    methods = choices.methods or SETTINGS[choices.dataset].methods
    columns: list[Column] = [(method, str(rule)) for method in methods for rule in choices.rules]
    return {
        (column, seed): job(*column, seed, choices)
        for seed in range(choices.seeds)
        for column in [columns[0], (CONTROL, ""), *columns[1:]]  # the first run trains the teacher of all
    }


def summaries(choices: DictConfig) -> dict[tuple[Column, int], dict[str, Any]]:
    """Trains what is not there, and returns the summaries of finished runs by method, rule and seed."""
    todo = jobs(choices)
    if choices.only:
        folders = {key: Path(config_of(one).folder) for key, one in todo.items()}
    else:
        folders = dict(zip(todo, run_all(list(todo.values()), choices.jobs, choices.split), strict=True))
    return {
        key: json.loads((folder / "summary.json").read_text()) for key, folder in folders.items() if is_complete(folder)
    }


def accuracy(summary: Mapping[str, Any], split: str) -> float:
    """Returns in per cent the accuracy of the last epoch's weights."""
    value: float = summary["val"]["best"] if split == "val" else summary["student"]["test"]["accuracy"]["last"]
    return 100 * value


def differences(choices: DictConfig, runs: Mapping[tuple[Column, int], Mapping[str, Any]]) -> dict[Column, list[float]]:
    """Returns the differences from the control in points, seed by seed, of the columns whose runs are all there."""
    values = {key: accuracy(summary, choices.split) for key, summary in runs.items()}
    seeds = [seed for seed in range(choices.seeds) if ((CONTROL, ""), seed) in values]
    found = {}
    for column in dict.fromkeys(column for column, _ in jobs(choices) if column[0] != CONTROL):
        if all((column, seed) in values for seed in seeds):
            found[column] = [values[column, seed] - values[(CONTROL, ""), seed] for seed in seeds]
    if len(seeds) < 2 or not found:
        raise UserError("Too few finished runs: the control of two seeds at least, and a method of all its seeds.")
    return found


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


def by_rule(found: Mapping[Column, Sequence[float]]) -> str:
    """Returns the table of mean differences from the control, a column for each rule; below it their mean over all methods,
    its interval over seeds, and the worst."""
    rules = list(dict.fromkeys(rule for _, rule in found))
    methods = [m for m in dict.fromkeys(method for method, _ in found) if all((m, r) in found for r in rules)]
    rows = [(f"`{method}`", *(f"{mean(found[method, r]):+.2f}" for r in rules)) for method in methods]
    means = [[mean(found[method, r]) for method in methods] for r in rules]
    rows.append((f"**mean of {len(methods)}**", *(f"**{mean(values):+.2f}**" for values in means)))
    by_seed = [[mean(values) for values in zip(*(found[m, r] for m in methods), strict=True)] for r in rules]
    rows.append(("interval", *("{:+.2f} to {:+.2f}".format(*interval(values)) for values in by_seed)))
    rows.append(("**worst**", *(f"{min(values):+.2f}" for values in means)))
    return markdown_table(("method", *(f"`{rule}`" for rule in rules)), rows)


def record(choices: DictConfig, runs: Mapping[tuple[Column, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what the section of a data set says of its runs, in plain values."""
    chosen = {key: choices[key] for key in ("dataset", "seeds", "methods", "rules", "overrides")}
    said = [f"{key}={plain(value)}" for key, value in chosen.items() if value != DEFAULTS[key]]
    some = next(s for (column, _), s in runs.items() if column[0] != CONTROL)
    return {
        "command": " ".join(["python scripts/balance_table.py", *said]),
        "seconds": round(sum(s["time"]["core_s"] for s in runs.values())),
        "steps": some["steps"],
        "student": [some["student"]["name"], some["student"]["params"]],
        "teacher": [some["teacher"]["name"], some["teacher"]["params"], 100 * some["teacher"]["test"]["accuracy"]],
        "data": {key: some["data"][key] for key in ("name", "train", "test", "input_shape")},
        "device": some["device"]["type"],
        "versions": versions(),
        "control": [round(accuracy(s, "test"), 4) for (column, _), s in runs.items() if column[0] == CONTROL],
        "methods": {
            method: [round(v, 4) for v in values] for (method, _), values in differences(choices, runs).items()
        },
    }


def plain(value: Any) -> str:
    """Returns an option as it is typed."""
    return (
        f"[{','.join(map(str, value))}]" if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    )


def section(kept: Mapping[str, Any]) -> str:
    """Returns the table of a data set, and what its runs are."""
    (student, params), (large, many, reached), data = kept["student"], kept["teacher"], kept["data"]
    used = in_words(kept["versions"])
    shape = "x".join(map(str, data["input_shape"]))
    return f"""{re.sub("-(?=[0-9])", "−", table(kept["methods"]))}

{verdict(kept["methods"])}

Student {student}, {params:,} parameters, {data["train"]:,} labelled images of {shape} of {data["name"]},
{kept["steps"]:,} steps; teacher {large}, {many:,} parameters, {reached:.2f} %; {data["test"]:,} test images, on which labels
alone have {spread(kept["control"])} %. Made by `{kept["command"]}`,
whose runs took {format_seconds(kept["seconds"])} of a core together (a teacher that was there before not counted; on the
{kept["device"]}), with {used}."""


def verdict(found: Mapping[str, Sequence[float]]) -> str:
    """Returns a line on the methods whose intervals leave out zero, and on the mean."""
    intervals = {f"`{method}`": interval(values, len(found)) for method, values in found.items()}
    low, high = interval([mean(values) for values in zip(*found.values(), strict=True)])
    below = ", ".join(method for method, (_, top) in intervals.items() if top < 0) or "none"
    above = ", ".join(method for method, (bottom, _) in intervals.items() if bottom > 0) or "none"
    place = "above 0" if low > 0 else "below 0" if high < 0 else "on both sides of 0"
    return f"Methods whose interval lies below 0: {below}; above 0: {above}. That of the mean lies {place}."


def name(choices: DictConfig) -> str:
    """Returns the name of what is kept: the data set, and the rule where it is not the default."""
    return choices.dataset if list(choices.rules) == DEFAULTS["rules"] else f"{choices.dataset} {choices.rules[0]}"


def main() -> None:
    choices = read_options(DEFAULTS, {"seeds": 2}, {"dataset": SETTINGS})
    os.environ.setdefault("RUN_STAMP", "balance")
    if choices.keep is not None and (choices.split != "test" or len(choices.rules) != 1):
        raise UserError("keep=… keeps test accuracies of one rule: leave split and further rules out.")
    if choices.out is not None and choices.keep is None:
        raise UserError("out=… writes what is kept: name its file by keep=…")
    if choices.out is not None:
        between_marks(Path(choices.out).read_text(), name(choices), "")  # refused before anything is trained
    runs = summaries(choices)
    found = differences(choices, runs)
    print(table({method: v for (method, _), v in found.items()}) if len(choices.rules) == 1 else by_rule(found))
    if choices.keep is not None:
        keep = Path(choices.keep)
        kept = json.loads(keep.read_text()) if keep.is_file() else {}
        kept[name(choices)] = record(choices, runs)
        write_text(keep, json.dumps(kept, indent=1) + "\n")
        if choices.out is not None:
            out = Path(choices.out)
            write_text(out, between_marks(out.read_text(), name(choices), section(kept[name(choices)])))


if __name__ == "__main__":
    run_script(main)
