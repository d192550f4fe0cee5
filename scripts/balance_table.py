"""Trains a student by every method whose hints `balance=auto` weighs, and prints the table of docs/balance.md.

    python scripts/balance_table.py seeds=5
    python scripts/balance_table.py seeds=2 split=val methods=[at,fitnet] 'overrides=[data=mnist, data.batch_size=64]'

Runs are those of conf/experiment/methods.yaml with `balance=auto`, in runs/balance/; what is finished there is not repeated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from scipy.stats import t as student_t

from litdistill.config.recipes import recipe_hash
from litdistill.training.train import train
from litdistill.utils.checkpoint import write_text
from litdistill.utils.errors import UserError
from litdistill.utils.logging import filter_warnings
from litdistill.utils.paths import CONF

CONTROL = "supervised"
METHODS = (
    *("at", "cc", "crd", "cwd", "fitnet", "ft", "ickd", "kd_at", "kd_crd", "kdsvd", "nst", "ofd", "pkd", "pkt"),
    *("reviewkd", "rkd", "sp", "srd", "srrl", "vid"),
)
DEFAULTS = {"seeds": 5, "methods": list(METHODS), "split": "test", "overrides": [], "runs": "runs"}
PUBLISHED = 240  # epochs, of which `init_epochs` is a share


def accuracy(method: str, seed: int, split: str, overrides: Sequence[str], runs: str) -> float:
    """Returns in per cent the accuracy of the last epoch's weights; trains them unless they are there."""
    balance = [] if method == CONTROL else ["balance=auto"]
    named = ["experiment=methods", f"method={method}", f"seed={seed}", f"runs={runs}", "folder=''", *balance]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*named, *overrides])
    if split == "val":  # the last epoch alone is validated, so that none is chosen by it; the teacher as ever
        cfg.trainer.check_val_every_n_epoch = cfg.trainer.max_epochs
        OmegaConf.update(cfg, "teacher.recipe.trainer.check_val_every_n_epoch", 1, force_add=True)
    if "init_epochs" in cfg.method:
        with open_dict(cfg):
            cfg.method.init_epochs = max(1, round(cfg.method.init_epochs / PUBLISHED * cfg.trainer.max_epochs))
    folder = Path(runs) / "balance" / method / f"{seed}-{recipe_hash(cfg)}"
    cfg.folder = str(folder)
    write_text(folder / ".hydra" / "config.yaml", OmegaConf.to_yaml(cfg))
    train(cfg)
    found = json.loads((folder / "summary.json").read_text())
    return 100 * (found["val"]["best"] if split == "val" else found["student"]["test"]["accuracy"]["last"])


def interval(values: Sequence[float], tests: int = 1) -> tuple[float, float]:
    """Returns the 95 % interval of a mean by Student's t, corrected for a number of tests after Bonferroni."""
    half = float(student_t.ppf(1 - 0.025 / tests, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def table(differences: Mapping[str, Sequence[float]]) -> str:
    """Returns the table of differences from the control in points, by method, and below it their mean over all methods."""
    rows = ["| method | over the control | interval |", "|---|---:|---:|"]
    for method, values in differences.items():
        low, high = interval(values, len(differences))
        rows.append(f"| `{method}` | {mean(values):+.2f} ± {stdev(values):.2f} | {low:+.2f} to {high:+.2f} |")
    by_seed = [mean(values) for values in zip(*differences.values(), strict=True)]
    low, high = interval(by_seed)
    rows.append(f"| **mean of {len(differences)}** | **{mean(by_seed):+.2f}** | {low:+.2f} to {high:+.2f} |")
    return "\n".join(rows)


def main() -> None:
    filter_warnings()
    choices = OmegaConf.merge(DEFAULTS, OmegaConf.from_cli())
    if set(choices) != set(DEFAULTS) or choices.seeds < 2:
        raise UserError(
            f"Give {', '.join(f'{k}={v}' for k, v in DEFAULTS.items())} or other values, two seeds at least."
        )
    torch.set_num_threads(1)
    rest = (choices.split, list(choices.overrides), choices.runs)
    control = [accuracy(CONTROL, seed, *rest) for seed in range(choices.seeds)]
    differences = {}
    for method in choices.methods:
        found = [accuracy(method, seed, *rest) for seed in range(choices.seeds)]
        differences[method] = [a - b for a, b in zip(found, control, strict=True)]
        print(f"{method}: {mean(differences[method]):+.2f}", file=sys.stderr, flush=True)
    print(table(differences))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
